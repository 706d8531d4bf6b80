"""The studies of methods near to a foundation and far from it: what they run, and what they report."""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import ase.io
import pytest
import torch
from tiny import configurations, tiny_mace

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (ROOT / "benchmarks" / f"{name}.py").exists():
            del sys.modules[name]


def test_what_is_missing_runs_and_is_kept_at_once(benchmark, tmp_path):
    studies, ran, out = benchmark("studies"), [], tmp_path / "found.json"
    cells = [{"row": row, "seed": seed} for row in ("full", "best") for seed in (1, 2)]

    def run(cell, args):
        if cell == cells[2]:
            raise KeyboardInterrupt
        ran.append(cell)
        return {**cell, "mae_f": 0.1}

    with pytest.raises(KeyboardInterrupt):
        studies.run_cells(cells, run, argparse.Namespace(out=out, only=""))
    assert list(json.loads(out.read_text())) == ["row full; seed 1", "row full; seed 2"]
    found = studies.run_cells(cells, run, argparse.Namespace(out=out, only="row best; seed 2"))
    assert ran == [cells[0], cells[1], cells[3]] and list(found) == list(json.loads(out.read_text()))


def made(kind, data, row, lr, seed, **found):
    values = {"mae_e": 0.01, "mae_f": 0.02, "moved": 0.1, "abroad": 0.07, "abroad_base": 0.05, "trained": 1000}
    return {"kind": kind, "data": data, "row": row, "lr": lr, "clip": 10, "seed": seed, **values, **found,
            "environment": {"commit": "c", "machine": "m", "versions": {"torch": "1"}}}


def test_the_summary_compares_with_full_fine_tuning_target_by_target(benchmark):
    cells = [
        made("near", "ethanol", "full", 0.01, 1, mae_f=0.03), made("near", "ethanol", "full", 0.02, 1),
        made("near", "ethanol", "best", 0.04, 1, mae_f=0.017, abroad=0.055),
        made("near", "ethanol", "best", 0.04, 2, mae_f=0.019, abroad=0.055),
        made("near", "ethanol", "best", 0.02, 1, mae_f=0.0185), made("near", "ethanol", "best", 0.04, 1, clip=100),
        made("near", "acac", "full", 0.02, 1), made("near", "acac", "best", 0.04, 1, mae_f=0.016, abroad=0.06),
        made("near", "malonaldehyde", "best", 0.04, 1),  # which full fine-tuning has not
        made("far", "ethanol", "full", 0.01, 1), made("far", "ethanol", "best", 0.01, 1, mae_e=0.005, moved=0.05)]
    report = benchmark("kinds_report")
    assert report.in_short(cells).splitlines()[2:] == [
        "| `--peft best` | 0.85 / 1.00, 0.38 | 1.00 / 0.50 |  |", "| `--peft best --peft_keep auto` |  |  |  |",
        "| `--lora` |  |  |  |"]
    rows = report.summary(cells).splitlines()[2:]
    assert rows == [
        "| near | full | 0.02 | ethanol (1), acetylacetone (1) | 1.00 | 1.00 to 1.00 | 1.00 | 1.00 | 1.00 |",
        # (18 / 20 + 16 / 20) / 2, and a rise of 5 and of 10 beside 20
        "| near | best | 0.04 | ethanol (2), acetylacetone (1) | 0.85 | 0.80 to 0.90 | 1.00 | 1.00 | 0.38 |",
        "| far | full | 0.01 | ethanol (1) | 1.00 | 1.00 to 1.00 | 1.00 | 1.00 |  |",
        "| far | best | 0.01 | ethanol (1) | 1.00 | 1.00 to 1.00 | 0.50 | 0.50 |  |"]


@pytest.mark.since("0.3.15")
@pytest.mark.parametrize("row", ["full", "best, keep 0.01", "MACE's --lora"])
def test_a_cell_runs_and_is_reported(benchmark, tmp_path, monkeypatch, row):
    gates, kinds, report = (benchmark(name) for name in ("gates", "kinds", "kinds_report"))
    monkeypatch.setattr(gates, "EPOCHS", 1)
    monkeypatch.setattr(kinds, "made_of", lambda elements: configurations(4, "CO2", seed=3))
    torch.save(tiny_mace(dtype=torch.float32), tmp_path / "foundation.model")
    folder = tmp_path / "rmd17" / "ethanol"
    folder.mkdir(parents=True)
    for seed, name in enumerate(("train", "test", "pretraining")):
        ase.io.write(folder / f"{name}.xyz", configurations(6, "CH3OH", seed=seed))
    args = argparse.Namespace(foundation=tmp_path / "foundation.model", pretraining=folder / "pretraining.xyz",
                              data=tmp_path)
    cell = {"kind": "far", "data": "ethanol", "row": row, "lr": 0.01, "clip": 10, "seed": 1}
    before = torch.get_default_dtype()
    try:
        found = kinds.run(cell, args)
    finally:
        torch.set_default_dtype(before)
    assert 0 < found["mae_f"] < 10 and found["moved"] > 0 and found["trained"] > 0
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(report, "DOCS", docs)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "kinds.json").write_text(json.dumps({row: found, "full": {**found, "row": "full"}}))
    report.write_report({"a": found})
    page = (docs / "results" / "kinds.md").read_text()
    assert f"| ethanol | {row} | 0.01 | 10 | {found['trained']:,} | 1 |" in page
    assert f"| far | {row} | 0.01 | ethanol (1) | 1.00 | 1.00 to 1.00 | 1.00 | 1.00 |  |" in page
    assert (docs / "figures" / "kinds.png").stat().st_size > 5000
