"""A study is a set of fine-tunes (cells), each with a result in one JSON file: what is missing there runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms

RESULTS = Path(__file__).resolve().parent / "results"
CLIP = 10  # of gradients, as by default in MACE


def key(cell: dict) -> str:
    return "; ".join(f"{name} {value}" for name, value in cell.items())


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def mae(one: np.ndarray, other: np.ndarray) -> float:
    return rounded(np.abs(one - other).mean())


def labelled_forces(structures: list[Atoms]) -> np.ndarray:
    """(atoms of all structures, 3)"""
    return np.concatenate([atoms.arrays["REF_forces"] for atoms in structures])


def run_cells(cells: list[dict], run: Callable[[dict, argparse.Namespace], dict], args: argparse.Namespace) -> dict:
    """Run those whose key has the text of ``--only`` and that have no result in ``--out`` yet; all results, by key."""
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for cell in cells:
        if key(cell) not in results and args.only in key(cell):
            results[key(cell)] = run(cell, args)
            print(json.dumps(results[key(cell)]), flush=True)
            lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items()]
            args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return results


def read_arguments(text: str, out: str, **paths: str) -> argparse.Namespace:
    """The options of a study. text: its docstring; out: the name of its results; paths: files that it needs, and what
    they are."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in paths.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=meaning)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that recipes/data.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    parser.add_argument("--only", default="", help="cells whose key has this text")
    return parser.parse_args()
