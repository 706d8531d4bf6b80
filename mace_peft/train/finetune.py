"""A fine-tune inside ``mace_run_train``: what stands in for the names of ``mace_peft.train.seams`` while it lasts."""

import copy
import functools
import logging
import types

import torch
from torch import nn

from mace_peft import labels
from mace_peft.backbones.foundation import first_E0s, take_over_rest
from mace_peft.errors import PeftError, one_line
from mace_peft.fast.backward import backward_to
from mace_peft.fast.contraction import by_element
from mace_peft.fast.messages import summed
from mace_peft.files import complete
from mace_peft.inspect.gain_ranges import gain_ranges
from mace_peft.model.adapted import is_adapted, trainable_parameters
from mace_peft.model.inject import eject, freeze, trainability_kept
from mace_peft.model.summary import summary
from mace_peft.train import losses, metrics
from mace_peft.train.adapt import Given, adapt, choose_method
from mace_peft.train.checkpoints import AdapterCheckpointHandler
from mace_peft.train.data import datasets
from mace_peft.train.data.batches import whole_batches
from mace_peft.train.data.e0s import put_E0s_right, with_energy
from mace_peft.train.data.kept_structures import kept_structures
from mace_peft.train.data.reading import Reading
from mace_peft.train.foundation_head import with_one_head
from mace_peft.train.gradients import reach_all
from mace_peft.train.learning_rates import groups_of, settle_rates
from mace_peft.train.loop import train
from mace_peft.train.no_effect import warn_of_no_effect
from mace_peft.train.not_finite import FiniteLosses
from mace_peft.train.pseudolabels import apply_pseudolabels
from mace_peft.train.record import Record
from mace_peft.train.results import Results
from mace_peft.train.seams import originals
from mace_peft.train.self_replay import SelfReplay
from mace_peft.train.start import Start, check_heads


class FineTune:
    """One run with ``--peft``: what ``SEAMS`` names here takes the place of what is in ``original``.

    fast: whether cheaper arithmetic of the same numbers takes the place of MACE's.
    """

    contract, sum_messages = staticmethod(by_element), staticmethod(summed)
    # modules of stand-ins that need to know nothing of the run
    labels, datasets, losses, metrics = labels, datasets, losses, metrics

    def __init__(self, run_train: types.ModuleType, args, start: Start, fast: bool):
        self.original = originals(run_train)
        self.args = args
        self.asked = copy.copy(args)  # MACE changes some options on its way
        self.start = start
        self.fast = fast
        self.base: nn.Module | None = None  # of an adapted foundation of which MACE has taken one head
        self.loss: nn.Module | None = None
        self.newest_set = ()  # of which MACE has made a loader last
        self.model: nn.Module | None = None  # what trains
        self.plain: nn.Module | None = None  # what is saved: the same, or its form without cuEquivariance
        self.kept: list | None = None  # the structures of --peft_keep
        self.checkpoints: AdapterCheckpointHandler | None = None
        self.finite = FiniteLosses(self.original)
        self.reading = Reading(self.original, args, start.check_known)
        self.save_file = complete(self.original.save_file)
        self.results = Results(self.original, args, self.save_file)

    # Not set above: an attribute that knows this object would keep its model and data until a garbage collection.
    @property
    def backward(self):
        return backward_to(self.trained)

    @property
    def jit(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(compile=self.results.compile)

    def begun(self) -> bool:
        """Whether the training has: the start has been evaluated."""
        return self.checkpoints is not None and self.checkpoints.progress is not None

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def evaluate(self, model: nn.Module, **kwargs):
        """Below 0.3.15, MACE's evaluation leaves every parameter trainable; and a loss of NaN stops the run."""
        with trainability_kept(model):
            loss, errors = self.finite.evaluate(model=model, **kwargs)
        return loss, metrics.without_stress(errors, kwargs["output_args"])

    def model_inference(self, loaders: dict, model: nn.Module, *args, **kwargs):
        """In every version, the evaluation for MACE's plots leaves every parameter trainable."""
        with trainability_kept(model):
            return self.original.model_inference(loaders, model, *args, **kwargs)

    def apply_pseudolabels(self, **kwargs) -> bool:
        return apply_pseudolabels(self.original.apply_pseudolabels, **kwargs)

    def estimate_e0s(self, foundation_model: nn.Module, foundation_e0s: dict, collections_train: list, **kwargs):
        """``--E0s=estimated`` from the model that the run starts from, in the run's dtype.

        mace-torch 0.3.16 fails if the foundation has another dtype.
        """
        adapted = foundation_model if is_adapted(foundation_model) else self.start.adapted
        if adapted is not None:
            if len(adapted.heads) > 1:
                raise PeftError(f"--E0s=estimated cannot choose among the adapter's heads {', '.join(adapted.heads)}: "
                                "give the E0s, or start from the foundation")
            foundation_model, foundation_e0s = copy.deepcopy(adapted), first_E0s(adapted)
        return self.original.estimate_e0s(foundation_model=foundation_model.to(torch.get_default_dtype()),
                                          foundation_e0s=foundation_e0s,
                                          collections_train=with_energy(collections_train), **kwargs)

    # The run's dtype first, here and below: both divide weights, and a reload has to give the same numbers.
    def remove_pt_head(self, foundation: nn.Module, head: str | None) -> nn.Module:
        logging.info(f"The run starts from the head {head} of the foundation, which has {', '.join(foundation.heads)}")
        foundation = foundation.to(torch.get_default_dtype())
        if is_adapted(foundation):  # what its readouts were before is known only here
            self.base = self.original.remove_pt_head(eject(copy.deepcopy(foundation)), head)
            return with_one_head(foundation, head, self.original.remove_pt_head)
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
        self.reading.check_tests(z_table, heads)
        self.kept = None if args.peft_keep is None else kept_structures(args.peft_keep, z_table.zs)
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
        take_over_rest(model, foundation)
        if atomic_energies is not None:
            known = first_E0s(foundation if adapted is None else adapted)
            put_E0s_right(model, known, atomic_energies, [self.reading.given(head) for head in heads])
        given = Given(args, self.start, train_loader, self.newest_set, self.loss, output_args,
                      list(self.reading.E0s.values()), self.original, self.fast)
        if self.start.tried:
            self.start.config, args.lr = choose_method(given, model)
        new = adapt(given, model, self.start.config, adapted)
        self.start.config, self.model, self.plain = model.peft_config, model, model
        logging.info(f"Adapters: {self.start.config.options()}\n{summary(model)}")
        settle_rates(args, self.start.config.row)
        if adapted is not None:
            source = getattr(args, "peft_adapter", None) or args.foundation_model
            logging.info(f"The adapters go on from {source}; {len(new)} of their tensors are new")
        if len(heads) > 1 and not any(p.requires_grad for p in model.readouts.parameters()):
            logging.warning("No readout trains, so that the heads differ in their E0s alone: to let them differ, add "
                            "--peft_train_also 'readouts.*'")
        return model, output_args

    def DataLoader(self, dataset, **kwargs):
        self.newest_set = dataset  # when the model is made, the validation set of the last head
        return self.original.DataLoader(dataset, **whole_batches(dataset, **kwargs))

    def get_loss_fn(self, *args, **kwargs) -> nn.Module:
        self.reading.check_before_training()
        warn_of_no_effect(self.asked)
        self.loss = self.original.get_loss_fn(*args, **kwargs)
        return self.loss

    def run_e3nn_to_cueq(self, model: nn.Module, **kwargs) -> nn.Module:
        from mace_peft.train.cuequivariance import accelerate

        convert = functools.partial(self.original.run_e3nn_to_cueq, **kwargs)
        self.model = freeze(accelerate(self.plain, eject(model), convert))
        return self.model

    def run_cueq_to_e3nn(self, model: nn.Module, **kwargs) -> nn.Module:
        return self.result()

    def get_params_options(self, args, model: nn.Module) -> dict:
        return groups_of(trainable_parameters(model).values(), self.original.get_params_options(args, model))

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
        self.checkpoints = AdapterCheckpointHandler(
            *args, config=self.start.config, foundation=self.start.foundation["fingerprint"], options=self.args,
            **kwargs)
        self.finite.checkpoints = self.checkpoints.io.of_this_run
        return self.checkpoints

    def train(self, **arguments) -> None:
        """The training; at its end its results are saved, so that nothing that fails after it can cost them."""
        run = types.SimpleNamespace(**arguments)
        replay = None if self.kept is None else SelfReplay(
            self.kept, self.model, self.plain, run.loss_fn, self.args, run.train_loader.batch_size)
        progress = train(self.checkpoints, self.args.restart_latest, self_replay=replay, **arguments)
        self.results.record = Record(self.args, self.start, self.reading.heads, self.checkpoints, run)
        for stage_two in (False, True)[:len(progress.stages)]:
            if arguments["rank"] == 0:
                with self.checkpoints.result_in(self.model, stage_two):
                    self.save(stage_two, gain_ranges(self.model, arguments["train_loader"]))

    def save(self, stage_two: bool, gains: dict | None = None) -> nn.Module:
        """Save the adapter and the model that the stage has trained; returns the model."""
        plain, self.plain.peft_gains = self.plain, gains
        if self.model is not plain:
            from mace_peft.train.cuequivariance import copy_trained

            copy_trained(self.model, plain)
        return self.results.save(plain, stage_two)

    def deepcopy(self, value):
        """A copy; once the training is done, of its model, what was saved of the stage that MACE has loaded."""
        if value is not self.model or not self.results.saved:
            return copy.deepcopy(value)
        return self.result() if value is self.plain else value  # run_cueq_to_e3nn comes next

    def result(self) -> nn.Module:
        """The model of the stage that MACE has loaded; there is none yet of a stage none of whose epochs came."""
        stage_two = self.checkpoints.stage_two
        return self.results.saved[stage_two] if stage_two in self.results.saved else self.save(stage_two)
