"""Whether intruder dimensions (arXiv 2410.21228) carry what an adapter forgets: errors where they are scaled down.

    python benchmarks/intruders.py --foundation foundation.model --adapter run_adapter --home test.xyz \\
        --away pretrain_valid.xyz

An intruder is a leading singular direction of an adapted weight that is like none of the foundation's. Weights are the
matrices that take low-rank updates: one for each irrep or path. Errors are those at home and away, for each threshold
and factor, beside those at strengths of the same adapter, which cost as little. The script runs what has no result yet,
adds each to results/intruders.json, and writes the table of docs/results/kinds.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import ase.io
import mace  # noqa: F401  before e3nn
import torch
from environment import environment
from errors import errors, known
from pages import DOCS, fill, table
from studies import RESULTS
from torch import Tensor

from mace_peft import load_adapter
from mace_peft.blocks.adapted import Updated, adapted_blocks, weights_of
from mace_peft.methods import LowRank, join, matrices
from mace_peft.model.inject import fold

THRESHOLDS = (0.5, 0.7, 0.9)  # of the cosine below which a direction is like none of the foundation's
FACTORS = (0.75, 0.5, 0.25, 0.0)  # of their singular values
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def intruders(before: Tensor, after: Tensor, rank: int, threshold: float) -> list[int]:
    """Which of the ``rank`` leading singular directions of ``after`` (rows, columns) have an absolute cosine below the
    threshold with every one of ``before``, by their places in its decomposition.

    Left directions count, as in the paper; those of ``before`` without a singular value are none of its.
    """
    U, S, _ = torch.linalg.svd(before, full_matrices=False)
    U = U[:, S > S.max() * 1e-6]
    found = torch.linalg.svd(after, full_matrices=False)[0][:, :rank]
    likeness = (U.T @ found).abs().amax(0) if U.shape[1] else torch.zeros(found.shape[1])
    return torch.nonzero(likeness < threshold).flatten().tolist()


def softened(after: Tensor, places: list[int], factor: float) -> Tensor:
    """The matrix with these singular values scaled by the factor."""
    U, S, V = torch.linalg.svd(after, full_matrices=False)
    S[places] *= factor
    return (U * S) @ V


@torch.no_grad()
def soften(adapted: torch.nn.Module, threshold: float, factor: float) -> tuple[torch.nn.Module, dict[str, int]]:
    """The model with its updates folded and its intruders scaled; and how many intruders each matrix has."""
    model, counts = fold(copy.deepcopy(adapted)), {}
    for name, block in adapted_blocks(adapted).items():
        low_rank = getattr(block.adapter, "low_rank", block.adapter)  # inside of scales
        if not isinstance(block, Updated) or not isinstance(low_rank, LowRank):
            continue
        before = matrices(low_rank.parts, block.own_weights())
        after = matrices(low_rank.parts, block.adapted_weights())
        places = {key: intruders(before[key], matrix, low_rank.rank, threshold) for key, matrix in after.items()}
        counts |= {f"{name} {key}": len(found) for key, found in places.items()}
        if not any(places.values()):
            continue
        changed = {key: softened(after[key], found, factor) for key, found in places.items()}
        pieces = [changed[part.factors][part.row : part.row + part.rows, part.column : part.column + part.columns]
                  for part in low_rank.parts]
        target = weights_of(model.get_submodule(name), block.adapter.names)
        for weight, value in join(low_rank.parts, pieces, target).items():
            target[weight].copy_(value)
    return model, counts


def report(cells: dict[str, dict]) -> str:
    """Force MAE (meV/A) of each adapter as it is, weaker, and with its intruders at half of their singular values."""
    shown = {"strength 1": "as trained", "strength 0.75": "at a strength of 0.75",
             **{f"threshold {threshold:g}, factor 0.5": f"intruders below a cosine of {threshold:g} halved"
                for threshold in THRESHOLDS}}
    rows = []
    for key, cell in cells.items():
        adapter, _, change = key.partition(": ")
        if change in shown:
            rows.append([adapter.replace("_", " "), shown[change], str(sum(cell["intruders"].values())),
                         *(f"{1000 * cell[where]['mae_f']:.1f}" for where in ("home", "away"))])
    return table(["adapter", "", "intruders", "F", "F abroad"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("foundation", "adapter", "home", "away"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "intruders.json")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"environment": environment(), "cells": {}}
    foundation = torch.load(args.foundation, map_location="cpu", weights_only=False)
    home, away = ase.io.read(args.home, ":"), ase.io.read(args.away, ":")

    def measure(key: str, make) -> None:
        key = f"{args.adapter.resolve().name}: {key}"
        if key in result["cells"]:
            return
        model, counts = make()
        model = model.to(args.device).eval().requires_grad_(False)
        # the foundation's data have its level of theory: energies may differ by a constant for each element
        found = {"home": errors(model, home, args.device), "away": errors(model, known(model, away), args.device, True)}
        result["cells"][key] = {**found, "intruders": counts}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        forces = ", ".join(f"{where} {1000 * found[where]['rmse_f']:.1f}" for where in found)
        print(f"{key}: force RMSE (meV/A) {forces}; {sum(counts.values())} intruders")

    for strength in STRENGTHS:
        measure(f"strength {strength:g}", lambda s=strength: (
            load_adapter(copy.deepcopy(foundation), args.adapter, s), {}))
    adapted = load_adapter(copy.deepcopy(foundation), args.adapter)
    for threshold in THRESHOLDS:
        for factor in FACTORS:
            measure(f"threshold {threshold:g}, factor {factor:g}", lambda t=threshold, f=factor: soften(adapted, t, f))
    fill(DOCS / "results" / "kinds.md", {"intruders": report(result["cells"])})


if __name__ == "__main__":
    main()
