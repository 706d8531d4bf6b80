"""Adapters that act where their training was: errors at home and abroad, beside the same adapters everywhere.

    pip install tblite
    python recipes/data.py rmd17/ethanol rmd17/malonaldehyde acac
    python benchmarks/within_range.py --foundation foundation_float32.model --pretraining pretrain_valid.xyz

The distance d of an atom from the training set decides how much of the adapter acts there, s = 1 / (1 + (d / d0)^8).
It is that of Mahalanobis, for each element, in the scalars that the frozen base has after its first and last product
block. d0 is ``reach`` times the distance within which 95 % of the atoms of the validation set are. Forms:

    energies    E_base + sum of s (E_adapted - E_base) over atoms, after the training
    updates     h W + s h (W' - W) in each linear layer, after the training
    learnt      the same, in the training as well; ``keep``: beside self-replay of that weight

All else is as in kinds.py. The script runs the cells that have no result yet, adds each to results/within_range.json,
and writes the table of docs/results/kinds.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ase.io
import gates
import kinds
import mace  # noqa: F401  before e3nn
import numpy as np
import torch
from ase import Atoms
from environment import environment
from errors import predict
from kinds_report import TARGETS, grouped, mean
from pages import DOCS, fill, table
from studies import CLIP, labelled_forces, mae, read_arguments, run_cells
from torch import Tensor, nn

from mace_peft.blocks.adapted import Updated, over, plain
from mace_peft.model.adapted import base_of
from mace_peft.patching import replaced
from mace_peft.train import self_replay

POWER = 8  # of the distance: s is near to 1 up to d0, and near to 0 from twice d0 on
WITHIN = 0.95  # of the validation set
RIDGE = 1e-3  # added to the variances, of the largest
TARGETS_OF_BOTH_KINDS = (("near", "acac"), ("near", "ethanol"), ("near", "malonaldehyde"), ("far", "acac"),
                         ("far", "ethanol"))


def cells() -> list[dict]:
    """The forms on one target; then what decides on all, with a second seed."""
    forms = [("near", "acac", *form, 1) for form in (("everywhere", 0, 0), ("energies", 2, 0), ("updates", 2, 0),
                                                     ("learnt", 2, 0), ("learnt", 3, 0))]
    decide = [(*target, *form, seed) for seed in (1, 2) for target in TARGETS_OF_BOTH_KINDS
              for form in (("everywhere", 0, 0), ("learnt", 2.5, 0), ("learnt", 3, 0.02))]
    return [dict(zip(("kind", "data", "form", "reach", "keep", "seed"), cell, strict=True))
            for cell in dict.fromkeys((*forms, *decide))]


class Range(nn.Module):
    """How much of an adapter acts on an atom: s, from 0 to 1."""

    def __init__(self, base: nn.Module, training: list[Atoms], validation: list[Atoms], reach: float):
        super().__init__()
        x, element = scalars_of(base, training)
        count, width = len(base.atomic_numbers), x.shape[1]
        self.center, self.whitening = torch.zeros(count, width), torch.zeros(count, width, width)
        self.d0 = torch.zeros(count)
        for number in element.unique().tolist():
            known = x[element == number]
            variances, directions = torch.linalg.eigh(torch.cov(known.T.double()))
            self.center[number] = known.mean(0)
            self.whitening[number] = directions / (variances.clamp(min=0) + RIDGE * variances.max()).sqrt()
        seen, element = scalars_of(base, validation)
        for number in element.unique().tolist():
            d = self.square(seen[element == number], number).sqrt()
            self.d0[number] = reach * torch.quantile(d, WITHIN)

    def square(self, x: Tensor, number: int) -> Tensor:
        return ((x - self.center[number]) @ self.whitening[number]).square().sum(1)

    def forward(self, x: Tensor, element: Tensor) -> Tensor:
        s = x.new_zeros(len(x))  # of elements that the training set lacks
        for number in element.unique().tolist():
            if self.d0[number] > 0:
                which = (element == number).nonzero()[:, 0]
                near = 1 / (1 + (self.square(x[which], number) / self.d0[number] ** 2) ** (POWER // 2))
                s = s.index_put((which,), near)
        return s


def scalars(model: nn.Module, features: Tensor) -> Tensor:
    """Those after the first and the last product block, of what MACE calls ``node_feats``."""
    first, last = (model.products[i].linear.irreps_out.count("0e") for i in (0, -1))
    return torch.cat([features[:, :first], features[:, -last:]], 1)


def scalars_of(model: nn.Module, structures: list[Atoms]) -> tuple[Tensor, Tensor]:
    """Those of all atoms, and the place of each one's element in the model's table."""
    found = [(scalars(model, model(batch.to_dict(), compute_force=False)["node_feats"]).detach(),
              batch.node_attrs.argmax(1)) for batch in gates.loader(model, structures, shuffle=False)]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


class Ranged(nn.Module):
    """A model whose adapters act within a range of the base, which has passed over the structures before."""

    def __init__(self, model: nn.Module, base: nn.Module, within: Range, form: str):
        super().__init__()
        self.model, self.within, self.form, self.base = model, within, form, [base]  # whose parameters are the model's
        self.atomic_numbers, self.heads, self.r_max = base.atomic_numbers, base.heads, base.r_max

    def forward(self, data: dict[str, Tensor], training: bool = False, compute_force: bool = True) -> dict[str, Tensor]:
        data["positions"].requires_grad_(True)
        base = self.base[0](data, training=True, compute_force=False)
        s = self.within(scalars(self.base[0], base["node_feats"]), data["node_attrs"].argmax(1))
        if self.form != "energies":
            with scaled(s):
                return self.model(data, training=training, compute_force=compute_force)
        adapted = self.model(data, training=True, compute_force=False)["node_energy"]
        of_atoms = base["node_energy"] + s * (adapted - base["node_energy"])
        forces, = torch.autograd.grad(of_atoms.sum(), data["positions"])
        energies = of_atoms.new_zeros(int(data["batch"].max()) + 1).index_add(0, data["batch"], of_atoms)
        return {"energy": energies, "forces": -forces}


@contextmanager
def scaled(s: Tensor) -> Iterator[None]:
    """What each update adds to the features of an atom is multiplied by the atom's s."""
    def forward(block: Updated, features: Tensor) -> Tensor:
        before = plain(block).forward(block, features)
        return before + s.unsqueeze(-1) * (over(block, block.adapted_weights()).forward(features) - before)

    with replaced(Updated, "forward", forward):
        yield


def kept(model: nn.Module, wrap: Callable[[nn.Module], nn.Module], weight: float, seed: int) -> Callable[[], Tensor]:
    """The loss of self-replay, of the model within its range."""
    loss, without_E0s = kinds.kept(model, weight, seed), self_replay.without_E0s

    def next_loss() -> Tensor:
        with replaced(self_replay, "without_E0s", lambda found: wrap(without_E0s(found))):
            return loss()

    return next_loss


def run(cell: dict, args) -> dict:
    """Fine-tune, and measure at home and abroad."""
    torch.set_default_dtype(torch.float32)
    training, testing = kinds.read(args, cell)
    validation = ase.io.read(args.data / gates.SETS[cell["data"]][0] / "valid.xyz", f":{kinds.TRAINED}")
    model = gates.fit_E0s(torch.load(args.foundation, weights_only=False), training)
    unmoved, row = copy.deepcopy(model), kinds.ROWS["best"]
    within = Range(unmoved, training, validation, cell["reach"])
    torch.manual_seed(cell["seed"])
    kinds.adapt(model, row.config, training)
    base = base_of(model)

    def wrap(found: nn.Module) -> nn.Module:
        return found if cell["form"] == "everywhere" else Ranged(found, base, within, cell["form"])

    trained = wrap(model) if cell["form"] == "learnt" else model
    further = kept(model, wrap, cell["keep"], cell["seed"]) if cell["keep"] else kinds.kept(model, None, cell["seed"])
    gates.train(trained, training, getattr(row, cell["kind"]), CLIP, further)
    result = wrap(model)
    abroad = [atoms for atoms in ase.io.read(args.pretraining, "::3")
              if set(model.atomic_numbers.tolist()) >= set(atoms.numbers)]
    (energies, forces), (_, away), (_, before) = (
        predict(*of, "cpu") for of in ((result, testing), (result, abroad), (unmoved, abroad)))
    missing = energies - np.array([atoms.info["REF_energy"] for atoms in testing])  # E0s are not fitted again
    labels = labelled_forces(abroad)
    return {**cell, "mae_e": mae(missing, missing.mean()), "mae_f": mae(forces, labelled_forces(testing)),
            "moved": mae(away, before), "abroad": mae(away, labels), "abroad_base": mae(before, labels),
            "environment": environment()}


def report(results: dict[str, dict]) -> str:
    """A row for each target and form: means over seeds, in meV/A."""
    rows = []
    groups = grouped(list(results.values()), "kind", "data", "form", "reach", "keep")
    for (kind, data, form, reach, keep), found in groups.items():
        rows.append([kind, TARGETS[data], form, f"{reach:g}" if reach else "", f"{keep:g}" if keep else "",
                     str(len(found)), *(f"{mean(found, name):.1f}" for name in ("mae_f", "moved")),
                     f"{mean(found, 'abroad'):.1f} ({mean(found, 'abroad_base'):.1f})" if kind == "near" else ""])
    return table(["target", "of", "adapter acts", "reach", "keep", "seeds", "F", "F abroad moved by",
                  "F abroad (before)"], rows)


def main() -> None:
    args = read_arguments(__doc__, "within_range.json", **gates.FOUNDATION)
    fill(DOCS / "results" / "kinds.md", {"range": report(run_cells(cells(), run, args))})


if __name__ == "__main__":
    main()
