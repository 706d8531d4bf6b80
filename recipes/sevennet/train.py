"""``sevenn train`` with adapters.

    python train.py input.yaml --peft elora                 all other options are those of sevenn train
    python train.py input.yaml --peft scales --peft_targets '*_self_interaction_2.*' -w scales

The input is sevenn's, and names the foundation under ``continue: checkpoint``. Each checkpoint that sevenn writes holds
the merged weights, so that all of its commands take it, and has an adapter directory beside it.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from sevenn.logger import Logger
from sevenn.main import sevenn as command
from sevenn.scripts import train as training
from sevenn.train.trainer import Trainer

from mace_peft import PeftConfig, PeftError, disable_adapter, inject, save_adapter
from mace_peft.model.adapted import fingerprint
from mace_peft.model.summary import summary
from mace_peft.sevennet import checkpoint_entries, load_foundation

E0S = "rescale_atomic_energy"


class AdapterTrainer(Trainer):
    """sevenn's trainer of an adapted model: the optimizer finds the adapters alone, for all else is frozen."""

    fitted = False
    of_foundation = None

    @property
    def adapted(self) -> torch.nn.Module:
        return self.model.module if self.distributed else self.model

    def load_state_dicts(self, model=None, optimizer=None, scheduler=None, strict=True):
        """The model has its weights; the state of an optimizer is that of other parameters."""
        if optimizer is not None or scheduler is not None:
            raise PeftError("the optimizer of the foundation has trained other parameters than adapters: set "
                            "reset_optimizer and reset_scheduler to True under continue")

    def run_one_epoch(self, loader, is_train=False, error_recorder=None, **options):
        if is_train and not self.fitted:
            self.fit_reference_energies(loader)
            self.fitted = True
        if not is_train and self.of_foundation is None:
            recorder = copy.deepcopy(error_recorder)
            with disable_adapter(self.adapted):
                super().run_one_epoch(loader, error_recorder=recorder)
            forces = [text for name, text in recorder.get_dct().items() if name.startswith("Force")]
            self.of_foundation = f"The foundation's error of the forces on these data: {', '.join(forces)} eV/A"
            Logger().writeline(self.of_foundation)
        super().run_one_epoch(loader, is_train, error_recorder, **options)

    def fit_reference_energies(self, loader) -> None:
        """Shift them, by least squares, to the level of theory of the training set."""
        model, shift = self.adapted, self.adapted.get_submodule(E0S).adapter.s["shift"]
        counts, differences = [], []
        for batch in loader:
            batch = batch.to(self.device)
            labels, graph = batch["total_energy"], batch["batch"]
            predicted = model(batch)
            elements = torch.nn.functional.one_hot(predicted["atom_type"].flatten(), shift.numel())
            counts.append(torch.zeros(len(labels), shift.numel()).index_add(0, graph.cpu(), elements.float().cpu()))
            differences.append((labels - predicted["inferred_total_energy"]).detach().cpu())
        fit = torch.linalg.pinv(torch.cat(counts).double()) @ torch.cat(differences).double()
        shift.data.copy_(fit.view(shift.shape))

    def write_checkpoint(self, path: str, config: dict, **extra) -> None:
        if self.rank == 0:
            super().write_checkpoint(path, **extra, **checkpoint_entries(self.adapted, config))
            save_adapter(self.adapted, f"{Path(path).with_suffix('')}_adapter")


def adapt(model: torch.nn.Module, config: dict, peft: PeftConfig) -> Trainer:
    """A trainer of the foundation with new adapters, in the place of the model that sevenn has made for it."""
    name = config["continue"]["checkpoint"]
    if not name:
        raise PeftError("the input names no foundation: give one under continue: checkpoint, such as 7net-0")
    foundation = load_foundation(name)
    shapes, wanted = ({key: tensor.shape for key, tensor in one.state_dict().items()} for one in (model, foundation))
    if shapes != wanted:
        odd = min(key for key, _ in shapes.items() ^ wanted.items())
        raise PeftError(f"{odd} is not as in {name}, for the input describes another model: take its section "
                        f"model from sevenn checkpoint {name} --get_yaml continue, and no accelerator")
    inject(foundation, peft, {"name": Path(name).name, "fingerprint": fingerprint(foundation)})
    checkpoint_entries(foundation, config)  # raises now for gates
    Logger().writeline(summary(foundation))
    trainer = Trainer.from_config(foundation, config)
    trainer.__class__ = AdapterTrainer
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", default="elora", metavar="METHOD", help="elora (default), scales or elora+scales")
    parser.add_argument("--peft_rank", type=int, metavar="RANK", help="default: 16")
    parser.add_argument("--peft_targets", metavar="TARGETS", help="linears, published, all, or glob patterns")
    given, of_sevenn = parser.parse_known_args()
    try:
        peft = PeftConfig(given.peft, rank=given.peft_rank, targets=given.peft_targets, train_also=f"{E0S}.shift")

        class Adapted:
            """The one name of sevenn that is replaced."""

            from_config = staticmethod(lambda model, config: adapt(model, config, peft))

        training.Trainer = Adapted
        sys.argv = ["sevenn", "train", *of_sevenn]
        command.main()
    except PeftError as error:
        sys.exit(f"train.py: error: {error.on_command_line()}")


if __name__ == "__main__":
    main()
