"""The benchmarks run, on a small model: nothing about speed is asserted here."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import assert_close, configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, inject
from mace_peft.model.adapted import base_of

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.since("0.3.15"), pytest.mark.usefixtures("double_precision")]  # MACE's own --lora


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of the folder, on a small model for its four elements."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    speed, variants, report = [importlib.import_module(name) for name in ("speed", "variants", "speed_report")]
    monkeypatch.setattr(speed, "make_model", lambda shape, dtype, device: tiny_mace(
        elements=(1, 6, 7, 8), dtype=dtype))
    monkeypatch.setattr(variants, "RANK", 2)
    yield speed, variants, report
    for name in ("speed", "variants", "speed_report", "models", "pages", "environment"):
        sys.modules.pop(name, None)


def test_what_is_measured_and_reported(benchmarks, tmp_path, monkeypatch):
    speed, variants, report = benchmarks
    monkeypatch.setattr(speed, "peak_memory", lambda call, device: 1)
    monkeypatch.setattr(speed, "SCRIPTED", ["base", "base again", "mmea published, saved"])
    batch = next(iter(speed.BATCHES))
    cell = speed.measure("medium", batch, "float64", "cpu", 1, True, lambda: None)
    assert cell["step"].keys() == cell["peak"].keys() == variants.TRAINED.keys()
    assert all(len(times) == 1 and min(times) > 0 for times in cell["step"].values())
    assert cell["predict"].keys() == variants.PREDICTS.keys()
    assert cell["parameters"]["mmea products"] < cell["parameters"]["full"]
    result = {"cells": [cell], "profile": speed.profile(cell)}
    docs = tmp_path / "docs"
    (docs / "figures").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "performance.md", docs)
    monkeypatch.setattr(report, "DOCS", docs)
    report.write_report(json.loads(json.dumps(result)))
    page = (docs / "performance.md").read_text()
    assert page.count("| medium, 5 x 21 atoms, float64 |") >= 3 and cell["commit"][:10] in page
    assert (docs / "figures" / "speed.png").exists()


def test_the_peak_is_what_is_held_at_once(benchmarks):
    speed, _, _ = benchmarks

    def call():
        for _ in range(3):
            first = torch.zeros(100_000, dtype=torch.float64)
            first + 1  # two of 800,000 bytes at a time

    assert speed.peak_memory(call, "cpu") == pytest.approx(1_600_000, rel=0.01)


@pytest.mark.parametrize("placement", ["products", "linears", "published"])
def test_every_variant_trains_what_it_says(benchmarks, placement):
    """The model of MACE's own LoRA and that of full fine-tuning hold everything in optimizer and EMA."""
    _, variants, _ = benchmarks
    base = tiny_mace()
    trained = {name: variants.TRAINED[name](base) for name in ("full", "MACE LoRA", f"mmea {placement}",
                                                               f"floor {placement}")}
    assert len(trained["full"].ema.shadow_params) == len(list(base.parameters()))
    assert len(trained["MACE LoRA"].ema.shadow_params) > len(trained["MACE LoRA"].trained)
    adapters = trained[f"mmea {placement}"]
    assert len(adapters.ema.shadow_params) == len(adapters.trained)
    assert all(parameter.shape == torch.Size([]) for parameter in trained[f"floor {placement}"].trained)


def test_intruders_are_the_directions_that_the_foundation_lacks(monkeypatch):
    """A direction of the update that is orthogonal to all others is one; scaled to nothing, it is gone."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    intruders = importlib.import_module("intruders")
    axes = torch.eye(6)
    before = 3 * torch.outer(axes[0], axes[0]) + 2 * torch.outer(axes[1], axes[1])
    after = before + 2.5 * torch.outer(axes[4], axes[3])
    assert intruders.intruders(before, after, 3, 0.5) == [1]  # the second largest
    torch.testing.assert_close(intruders.softened(after, [1], 0.0), before, rtol=0, atol=1e-12)
    assert intruders.intruders(before, before, 2, 0.5) == []

    adapted = randomise(inject(tiny_mace(), PeftConfig("elora+scales", rank=2)))
    expected = predict(adapted, configurations(1))
    model, counts = intruders.soften(adapted, 0.9, 1.0)
    assert sum(counts.values()) > 0
    assert_close(predict(model, configurations(1)), expected)
    model, _ = intruders.soften(adapted, 0.9, 0.5)
    assert (predict(model, configurations(1))[1] - expected[1]).norm() > 1e-3 * expected[1].norm()

    errors = {"home": {"mae_f": 0.0231}, "away": {"mae_f": 0.0987}, "intruders": {"a": 2, "b": 1}}
    lines = intruders.report({"near_acac: strength 1": errors, "near_acac: threshold 0.5, factor 0.5": errors,
                              "near_acac: threshold 0.5, factor 0": errors}).splitlines()[2:]
    assert lines == ["| near acac | as trained | 3 | 23.1 | 98.7 |",
                     "| near acac | intruders below a cosine of 0.5 halved | 3 | 23.1 | 98.7 |"]
    for name in ("intruders", "errors", "environment", "pages", "studies"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("form", ["energies", "updates"])
def test_an_adapter_acts_within_its_range_alone(form, monkeypatch):
    """Far away the base is left, and in between forces are still derivatives."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("within_range")
    adapted, training = randomise(inject(tiny_mace(), PeftConfig("elora", rank=2))), configurations(8)
    base, atoms = base_of(adapted), configurations(1, seed=1)[0]
    everywhere, nowhere, between = (study.Ranged(adapted, base, study.Range(base, training, training, reach), form)
                                    for reach in (1e4, 1e-4, 3))
    assert_close(predict(everywhere, [atoms]), predict(adapted, [atoms]))
    assert_close(predict(nowhere, [atoms]), predict(base, [atoms]))
    energies = []
    for step in (1e-4, -1e-4):
        moved = atoms.copy()
        moved.positions[1, 2] += step
        energies.append(predict(between, [moved])[0].item())
    force = predict(between, [atoms])[1][1, 2].item()
    assert (energies[1] - energies[0]) / 2e-4 == pytest.approx(force, rel=1e-5)
    for other in (adapted, base):
        assert force != pytest.approx(predict(other, [atoms])[1][1, 2].item(), rel=1e-3)
    for name in ("within_range", "kinds", "kinds_report", "gates", "gates_report", "away", "errors", "environment",
                 "pages", "studies"):
        sys.modules.pop(name, None)
