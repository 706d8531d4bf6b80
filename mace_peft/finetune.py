"""A fine-tune inside ``mace_run_train``: with ``--peft`` no other module knows the seams of ``mace.cli.run_train``.

While it lasts, methods of ``FineTune`` stand in for a few names of run_train and of modules that run_train calls.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import types
from collections.abc import Iterator

import torch
from torch import nn

from mace_peft.backward import backward_to
from mace_peft.checkpoints import AdapterCheckpointHandler, chosen_before
from mace_peft.config import PeftError, one_line
from mace_peft.contractions import contract_as_mace, contract_by_element
from mace_peft.files import NO_ROOM, complete, one_line_errors
from mace_peft.foundation import check_taken_over, first_E0s, given_E0s, keep_constants, keep_les, put_E0s_right
from mace_peft.injection import eject, fold, freeze, trainability_kept
from mace_peft.losses import FiniteLosses, reach_all
from mace_peft.messages import restore_messages, split_messages
from mace_peft.models import is_adapted, trainable_parameters
from mace_peft.options import adapter_directory
from mace_peft.ranks import choose_ranks, differentiate
from mace_peft.replaced import replaced
from mace_peft.replay import apply_pseudolabels
from mace_peft.report import summary
from mace_peft.start import Start, check_elements, check_heads, go_on
from mace_peft.storage import save_adapter


class FineTune:
    """One run with ``--peft``: its methods stand in for names of run_train, see ``replaced_names``."""

    def __init__(self, run_train: types.ModuleType, args, start: Start):
        self.original = types.SimpleNamespace(**vars(run_train))
        # not an attribute of mace.tools, where a function has this name
        self.training = importlib.import_module("mace.tools.train")
        self.evaluate_of_mace = self.training.evaluate
        self.plotting = importlib.import_module("mace.cli.visualise_train")
        self.inference_of_mace = self.plotting.model_inference
        self.jit_save = torch.jit.save
        self.run_train = run_train
        self.args = args
        self.start = start
        self.base: nn.Module | None = None  # of an adapted foundation of which MACE has taken one head
        self.loss: nn.Module | None = None
        self.model: nn.Module | None = None  # what trains
        self.plain: nn.Module | None = None  # what is saved: the same, or its form without cuEquivariance
        self.checkpoints: AdapterCheckpointHandler | None = None

    @contextlib.contextmanager
    def replaced_names(self) -> Iterator[None]:
        """Replace the names in run_train, and in the two packages that it reaches through a module."""
        run_train = self.run_train
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_line_errors("a file of this run", NO_ROOM))
            stack.enter_context(replaced(torch, "save", complete(torch.save)))
            stack.enter_context(replaced(torch.jit, "save", self.save_compiled))
            for name in ("remove_pt_head", "configure_model", "run_e3nn_to_cueq", "run_cueq_to_e3nn",
                         "get_params_options", "get_loss_fn", "ExponentialMovingAverage", "LBFGS", "DDP", "deepcopy"):
                stack.enter_context(replaced(run_train, name, getattr(self, name)))
            stack.enter_context(replaced(run_train, "jit", types.SimpleNamespace(compile=self.compile)))
            stack.enter_context(replaced(run_train.tools, "CheckpointHandler", self.CheckpointHandler))
            stack.enter_context(replaced(self.training, "evaluate", self.evaluate))
            stack.enter_context(replaced(self.plotting, "model_inference", self.model_inference))
            losses = FiniteLosses(self.training, lambda: self.checkpoints.io.of_this_run())
            stack.enter_context(losses.replaced_names())
            stack.enter_context(backward_to(self.trained))
            stack.enter_context(contract_by_element())
            if hasattr(run_train, "apply_pseudolabels_to_pt_head_configs"):  # mace-torch 0.3.14 and later
                label = functools.partial(apply_pseudolabels, run_train.apply_pseudolabels_to_pt_head_configs)
                stack.enter_context(replaced(run_train, "apply_pseudolabels_to_pt_head_configs", label))
            if hasattr(run_train.data, "estimate_e0s_from_foundation"):  # mace-torch 0.3.15 and later
                estimate = functools.partial(self.estimate_e0s, run_train.data.estimate_e0s_from_foundation)
                stack.enter_context(replaced(run_train.data, "estimate_e0s_from_foundation", estimate))
            yield

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def evaluate(self, model: nn.Module, **kwargs):
        """Below 0.3.15, MACE's evaluation leaves every parameter trainable."""
        with trainability_kept(model):
            return self.evaluate_of_mace(model=model, **kwargs)

    def model_inference(self, loaders: dict, model: nn.Module, *args, **kwargs):
        """In every version, so does the evaluation for its plots."""
        with trainability_kept(model):
            return self.inference_of_mace(loaders, model, *args, **kwargs)

    def estimate_e0s(self, original, foundation_model: nn.Module, foundation_e0s: dict, z_table, **kwargs):
        """``--E0s=estimated`` from the model that the run starts from, in the run's dtype.

        mace-torch 0.3.16 fails if the foundation has another dtype.
        """
        adapted = foundation_model if is_adapted(foundation_model) else self.start.adapted
        check_elements(z_table.zs, adapted or foundation_model)
        if adapted is not None:
            if len(adapted.heads) > 1:
                raise PeftError(f"--E0s=estimated cannot choose among the adapter's heads {', '.join(adapted.heads)}: "
                                "give the E0s, or start from the foundation")
            foundation_model, foundation_e0s = copy.deepcopy(adapted), first_E0s(adapted)
        model = foundation_model.to(torch.get_default_dtype())
        return original(foundation_model=model, foundation_e0s=foundation_e0s, z_table=z_table, **kwargs)

    # The run's dtype first, here and below: both divide weights, and a reload has to give the same numbers.
    def remove_pt_head(self, foundation: nn.Module, head: str | None) -> nn.Module:
        foundation = foundation.to(torch.get_default_dtype())
        if is_adapted(foundation):  # what its readouts were before is known only here
            self.base = self.original.remove_pt_head(eject(copy.deepcopy(foundation)), head)
        return self.original.remove_pt_head(foundation, head)

    def chosen_head(self, foundation: nn.Module, head_configs: list) -> nn.Module:
        """The foundation with one head. Below 0.3.15, MACE takes ``--foundation_head`` for replay alone.

        Raises PeftError for ``--E0s=foundation`` where MACE has taken those of another head by now.
        """
        if len(getattr(foundation, "heads", ())) < 2:
            return foundation
        first = first_E0s(foundation)
        chosen = self.remove_pt_head(foundation, self.args.foundation_head)
        if first_E0s(chosen) != first and any(str(head.E0s).lower() == "foundation" for head in head_configs):
            raise PeftError(f"--E0s foundation takes those of the head {foundation.heads[0]} before mace-torch 0.3.15, "
                            f"and this run starts from the head {chosen.heads[0]}: give the E0s as numbers")
        return chosen

    def configure_model(self, args, train_loader, atomic_energies, foundation, heads, z_table, head_configs):
        foundation = self.chosen_head(foundation.to(torch.get_default_dtype()), head_configs)
        adapted = foundation if is_adapted(foundation) else self.start.adapted
        elements = foundation.atomic_numbers.tolist() if args.foundation_model_elements else z_table.zs
        check_elements(elements, adapted or foundation)
        if adapted is not None:
            check_heads(heads, adapted)
        if adapted is foundation:
            foundation = self.base or eject(copy.deepcopy(adapted))
        try:
            model, output_args = self.original.configure_model(
                args, train_loader, atomic_energies, foundation, heads, z_table, head_configs)
        except Exception as error:  # MACE fails in many ways on blocks whose weights it cannot take over
            blocks = ", ".join(sorted({type(block).__name__ for block in foundation.interactions}))
            raise PeftError(f"mace_run_train cannot fine-tune foundation model {args.foundation_model}, a "
                            f"{type(foundation).__name__} of {foundation.num_interactions} {blocks} "
                            f"({one_line(error)}): give another foundation model") from error
        keep_constants(model, foundation)
        keep_les(model, foundation)
        check_taken_over(model, foundation)
        if atomic_energies is not None:
            given = {head.head_name: given_E0s(head) for head in head_configs}
            known = first_E0s(foundation if adapted is None else adapted)
            put_E0s_right(model, known, atomic_energies, [given[head] for head in heads])
        if self.start.config.rank == "auto" and self.start.config.rank_pattern is None:
            look = functools.partial(differentiate, args, train_loader.dataset, self.loss, output_args)
            self.start.config = chosen_before(args, self.start.config) or choose_ranks(model, self.start.config, look)
        new = go_on(model, self.start.config, self.start.foundation, adapted)
        self.model = self.plain = split_messages(model)
        logging.info(f"Adapters: {self.start.config.options()}\n{summary(model)}")
        if adapted is not None:
            source = getattr(args, "peft_adapter", None) or args.foundation_model
            logging.info(f"The adapters go on from {source}; {len(new)} of their tensors are new")
        if len(heads) > 1 and not any(p.requires_grad for p in model.readouts.parameters()):
            logging.warning("No readout trains, so that the heads differ in their E0s alone: to let them differ, add "
                            "--peft_train_also 'readouts.*'")
        return model, output_args

    def get_loss_fn(self, *args, **kwargs) -> nn.Module:
        self.loss = self.original.get_loss_fn(*args, **kwargs)
        return self.loss

    def run_e3nn_to_cueq(self, model: nn.Module, **kwargs) -> nn.Module:
        from mace_peft.accelerated import accelerate

        convert = functools.partial(self.original.run_e3nn_to_cueq, **kwargs)
        self.model = freeze(accelerate(self.plain, eject(model), convert))
        return self.model

    def run_cueq_to_e3nn(self, model: nn.Module, **kwargs) -> nn.Module:
        from mace_peft.accelerated import copy_trained

        return self.save(copy_trained(model, self.plain))

    def get_params_options(self, args, model: nn.Module) -> dict:
        """MACE's parameter groups without what is frozen, and a group for what trains and has none there."""
        options = self.original.get_params_options(args, model)
        left = {id(parameter): parameter for parameter in trainable_parameters(model).values()}
        for group in options["params"]:
            group["params"] = [left.pop(id(parameter)) for parameter in group["params"] if id(parameter) in left]
        groups = [group for group in options["params"] if group["params"]]
        if left:
            groups.append({"name": "other", "params": list(left.values()), "weight_decay": 0.0})
        return {**options, "params": groups}

    def ExponentialMovingAverage(self, parameters, **kwargs):
        return self.original.ExponentialMovingAverage(trainable_parameters(self.model).values(), **kwargs)

    def LBFGS(self, parameters, **kwargs):
        return self.original.LBFGS(trainable_parameters(self.model).values(), **kwargs)

    def DDP(self, model: nn.Module, **kwargs) -> nn.Module:
        """DDP waits for the gradient of every parameter that trains: those that a loss does not reach get zeros."""
        distributed = self.original.DDP(model, **kwargs)
        distributed.register_forward_hook(reach_all)
        return distributed

    def CheckpointHandler(self, *args, **kwargs) -> AdapterCheckpointHandler:
        self.checkpoints = AdapterCheckpointHandler(*args, config=self.start.config, options=self.args, **kwargs)
        return self.checkpoints

    def deepcopy(self, value):
        """A copy; of the trained model, once there are checkpoints to load it from, the one that MACE saves."""
        if value is not self.model or self.checkpoints is None:
            return copy.deepcopy(value)
        return self.save(value) if value is self.plain else value  # run_cueq_to_e3nn comes next, and saves

    def save(self, model: nn.Module) -> nn.Module:
        """Save the adapter to its directory, and give MACE the model to save: a copy with the updates folded in."""
        stage = "_stagetwo" if self.checkpoints.stage_two else ""
        directory = adapter_directory(self.args, stage)
        with one_line_errors(directory):
            logging.info(f"Saved the adapter to {save_adapter(model, directory)}")
        # MACE freezes or frees all parameters for its error tables
        return fold(freeze(restore_messages(copy.deepcopy(model))))

    def compile(self, model: nn.Module):
        """MACE hides a model that does not compile: say so."""
        try:
            with contract_as_mace():
                return self.original.jit.compile(model)
        except Exception as error:
            logging.error(f"No compiled model is written: TorchScript cannot compile the model ({one_line(error)})")
            raise

    def save_compiled(self, *args, **kwargs) -> None:
        """MACE hides a file that cannot be written, too."""
        try:
            complete(self.jit_save)(*args, **kwargs)
        except PeftError as error:
            logging.error(f"No compiled model is written: {error}")
            raise
