"""The errors that MACE logs, of the labels that are there.

Of MACE's own, some take labels of weight 0 for labels of 0 (errors per atom, and the labels that relative errors are
relative to; before 0.3.14 all of them), and ``--loss=virials`` reports the stress labels themselves as errors.
"""

import torch
from mace.tools import compute_mae, compute_q95, compute_rel_mae, compute_rel_rmse, compute_rmse
from torchmetrics import Metric

# label: what its errors end on in MACE's log, and whether they are relative, and per atom, as well
ERRORS = {"energy": ("e", False, True), "forces": ("f", True, False), "stress": ("stress", False, False),
          "virials": ("virials", False, True), "dipole": ("mu", True, True)}


class NoLabel(float):
    """NaN, which the log and the tables print as ``none``: there is no label to take an error of."""

    def __mul__(self, other: float) -> "NoLabel":
        return self

    def __format__(self, form: str) -> str:
        return "none"


NONE = NoLabel("nan")


class Errors(dict):
    """Errors by MACE's names. Those of labels that are not there are ``NoLabel``.

    MACE asks for errors of the stress, and for None in their place turns to virials: it has that where only those are.
    """

    def __missing__(self, name: str) -> NoLabel | None:
        return None if "stress" in name and "rmse_stress" not in self and "rmse_virials" in self else NONE


class MACELoss(Metric):
    """In the place of MACE's metric of this name: adds up loss and errors, over processes too."""

    def __init__(self, loss_fn: torch.nn.Module):
        super().__init__()
        self.loss_fn = loss_fn
        for name in ("total_loss", "num_data"):
            self.add_state(name, default=torch.tensor(0.0), dist_reduce_fx="sum")
        for name in ERRORS:
            for what in ("error", "label", "atoms"):
                self.add_state(f"{name}_{what}", default=[], dist_reduce_fx="cat")

    def update(self, batch, output: dict) -> None:
        self.total_loss += self.loss_fn(pred=output, ref=batch)
        self.num_data += batch.num_graphs
        atoms = batch.ptr.diff()
        for name in ERRORS:
            label, predicted = batch[name], output.get(name)
            if label is None or predicted is None:
                continue
            weight = batch.weight.view(-1, 1) * batch[f"{name}_weight"].view(len(batch.weight), -1)
            count = atoms.view(-1, 1)
            if name == "forces":
                weight, count = (torch.repeat_interleave(each, atoms, dim=0) for each in (weight, count))
            flat = label.reshape(len(weight), -1)
            there = (weight > 0).expand_as(flat)
            for what, value in (("error", flat - predicted.detach().reshape(flat.shape)), ("label", flat),
                                ("atoms", count.expand_as(flat))):
                getattr(self, f"{name}_{what}").append(value[there])

    def compute(self) -> tuple[float, Errors]:
        errors = Errors(loss=(self.total_loss / self.num_data).item())
        for name, (end, relative, per_atom) in ERRORS.items():
            held = [getattr(self, f"{name}_{what}") for what in ("error", "label", "atoms")]
            error, label, atoms = (torch.cat(value) if isinstance(value, list) and value else value for value in held)
            if not len(error):
                continue
            error, label, atoms = (value.cpu().numpy() for value in (error, label, atoms))
            errors |= {f"mae_{end}": compute_mae(error), f"rmse_{end}": compute_rmse(error),
                       f"q95_{end}": compute_q95(error)}
            if relative:
                errors |= {f"rel_mae_{end}": compute_rel_mae(error, label),
                           f"rel_rmse_{end}": compute_rel_rmse(error, label)}
            if per_atom:
                errors |= {f"mae_{end}_per_atom": compute_mae(error / atoms),
                           f"rmse_{end}_per_atom": compute_rmse(error / atoms)}
        return errors["loss"], errors


def without_stress(errors: Errors, output_args: dict[str, bool]) -> Errors:
    """The errors, without those of a stress that the run does not compute: the model says 0 then."""
    if not output_args["stress"]:
        for name in [name for name in errors if "stress" in name]:
            del errors[name]
    return errors
