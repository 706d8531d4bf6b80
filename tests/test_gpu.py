"""gpu.py, without a GPU: its parts on a stand-in for one or on a CPU, and what becomes of parts that fail."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from forks import PLAIN
from second_device import second_device

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("gpu", "gpu_part", "gpu_checks", "gpu_right", "gpu_fast", "gpu_command", "gpu_report", "speed", "variants",
           "speed_report", "models", "pages", "environment")
NO_THREADS = ("made there", "moved", "loaded", "ten steps")
pytestmark = pytest.mark.since("0.3.15")  # MACE's own --lora


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the folder for a test."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def part_of(benchmark, tmp_path, seconds=1000.0):
    return benchmark("gpu_part").Part("right", tmp_path / "gpu.json", seconds, device="cpu")


# TorchScript and other threads know nothing of the stand-in.
def test_numbers_on_a_second_device_are_those_on_the_cpu(benchmark, tmp_path):
    cases = benchmark("gpu_right").cases("cuda", tiny=True)
    cases = {f"float64, mmea published, {what}": cases[f"float64, mmea published, {what}"] for what in NO_THREADS}
    with second_device():
        entry = part_of(benchmark, tmp_path).run(cases)
    assert not entry["wrong"] and entry["cases"].keys() == cases.keys()
    assert all(case["errors"] for case in entry["cases"].values())


def test_a_number_that_is_off_is_wrong(benchmark, tmp_path, monkeypatch):
    right = benchmark("gpu_right")
    case = "float64, mmea published, made there"
    call = right.cases("cpu", tiny=True)[case]
    call()
    subject = right.subject("tiny", "float64", "cpu", "mmea", "published")
    monkeypatch.setitem(subject.expected, "forces", subject.expected["forces"] + 1e-6)
    entry = part_of(benchmark, tmp_path).run({case: call})
    assert [wrong["case"] for wrong in entry["wrong"]] == [case] and entry["wrong"][0]["what"].startswith("forces")


def test_what_is_fast_is_measured_and_reported(benchmark, tmp_path, monkeypatch):
    fast, speed, report = map(benchmark, ("gpu_fast", "speed", "gpu_report"))
    monkeypatch.setattr(speed, "peak_memory", lambda call, device: 1)
    monkeypatch.setattr(fast, "WARM", 0)
    cases = {name: case for name, case in fast.cases("cpu", tiny=True).items() if "cuEquivariance" not in name}
    entry = part_of(benchmark, tmp_path).run(cases)
    steps, predictions = entry["cases"].values()
    assert {"full", "MACE LoRA", "mmea published", "floor published"} < steps["step"].keys()
    assert predictions["predict"].keys() == {"base", "mmea published", "small linears"}
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "performance.md", docs)
    monkeypatch.setattr(report, "DOCS", docs)
    monkeypatch.setattr(report, "RESULT", tmp_path / "gpu.json")
    found = entry | {"commit": "c" * 40, "machine": "a card", "versions": {"torch": "2"}}
    (tmp_path / "gpu.json").write_text(json.dumps({"fast": found}))
    report.write_report()
    page = (docs / "performance.md").read_text()
    assert page.count("| tiny, 5 x 21 atoms, float32 |") == 3 and "cccccccccc; a card" in page
    assert "No GPU has been measured" not in page


def test_the_page_says_what_was_measured(benchmark):
    report = benchmark("gpu_report")
    said = report.section(benchmark("gpu_part").read(report.RESULT))
    assert f"<!-- gpu -->\n{said}\n<!-- end of gpu -->" in (ROOT / "docs" / "performance.md").read_text()


def test_a_case_that_fails_stops_no_other(benchmark, tmp_path, capsys):
    def fails():
        raise RuntimeError("on another device")

    cases = {"first": lambda: {"errors": {"energy": float("nan")}, "bound": 1.0}, "second": fails,
             "third": lambda: {"errors": {"energy": 2.0}, "bound": None}}
    entry = part_of(benchmark, tmp_path).run(cases)
    kept = json.loads((tmp_path / "gpu.json").read_text())["right"]
    assert repr(kept) == repr(entry) and entry["ended"]  # NaN is not equal to itself
    assert [wrong["case"] for wrong in entry["wrong"]] == ["first", "second"]
    assert "in fails" in entry["wrong"][1]["traceback"]
    late = part_of(benchmark, tmp_path, seconds=-1.0).run(cases)
    assert late["left out"] == list(cases) and not late["wrong"]
    gpu = benchmark("gpu")
    assert (gpu.tell({"right": entry}), gpu.tell({"right": late})) == (1, 0)
    assert "wrong: right: second: RuntimeError: on another device" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "time.sleep(60)", "raise ImportError"])
def test_a_part_that_is_cut_off_keeps_what_it_has(benchmark, tmp_path, monkeypatch, end):
    gpu, part = benchmark("gpu"), benchmark("gpu_part")
    results = tmp_path / "gpu.json"
    part.write(results, "right", earlier := {"cases": {}, "wrong": [], "left out": [], "ended": True})
    part.write(results, "fast", {"cases": {"of another run": {}}, "wrong": [], "left out": [], "ended": True})
    (tmp_path / "gpu_fast.py").write_text(
        f"import os, sys, time\nsys.path.append({str(ROOT / 'benchmarks')!r})\nfrom gpu_part import *\n"
        + ("" if "Import" in end else "part = Part('fast', arguments('').results, 100.0)\n"
           f"part.run({{'one': lambda: {{'errors': {{}}, 'bound': 1}}, 'two': lambda: {end}}})\n") + f"{end}\n")
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setitem(gpu.SECONDS, "fast", 3)
    entry = gpu.run_part("fast", Path(sys.executable), "cpu", False, results)
    assert part.read(results) == {"right": earlier, "fast": entry}
    assert list(entry["cases"]) == ([] if "Import" in end else ["one"]) and not entry["ended"]
    assert "before its end" in entry["wrong"][0]["what"]


def test_of_the_command(benchmark, tmp_path, monkeypatch):
    """The runs' arguments and what is read of them; the runs themselves are in the rehearsal."""
    command, started = benchmark("gpu_command"), []

    def run(arguments, cwd, **options):
        started.append(arguments[2:] if arguments[1] == "-m" else arguments[1:])
        name = next(word.split("=")[1] for word in arguments if word.startswith("--name="))
        folder = cwd / name / "results"
        folder.mkdir(parents=True, exist_ok=True)
        epochs = int(next(word.split("=")[1] for word in arguments if word.startswith("--max_num_epochs=")))
        lines = [{"mode": "eval", "epoch": epoch, "loss": 1.0} for epoch in [None, *range(epochs)]]
        (folder / f"{name}_train.txt").write_text("\n".join(map(json.dumps, lines)))
        return types.SimpleNamespace(returncode=int(name == "elora_there"), stdout="first\nlast\n")

    monkeypatch.setattr(command.subprocess, "run", run)
    cases = command.cases(command.Runs(tmp_path, True, 1e9), "cuda")
    entry = part_of(benchmark, tmp_path).run(cases)
    assert len(started) == len(cases) == 6 and ["--distributed" in words for words in started].count(True) == 1
    assert [wrong["case"] for wrong in entry["wrong"]] == ["elora on the device"]
    assert entry["cases"]["NCCL"]["errors"] == {"validation losses": 0.0}
    assert entry["cases"]["mmea on the device"]["last lines"] == ["first", "last"]


@pytest.mark.skipif(PLAIN not in os.environ, reason="takes more than a minute: nox -s plain")
def test_the_rehearsal_ends_green(tmp_path):
    results = tmp_path / "rehearsal.json"
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py", "--device=cpu", "--tiny", "--results",
                           results], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(entry["ended"] and entry["cases"] for entry in json.loads(results.read_text()).values())


@pytest.mark.parametrize("arguments, words", [
    ([], "give a folder"), (["wheels", "--cuequivariance", "cu10"], "use cu12, cu13 or cpu"),
    (["wheels", "--platform", "win32"], "manylinux_2_28_x86_64"), (["wheels", "--has", "nothing"], "no torch")])
def test_wheels_are_not_collected_for_what_is_not_known(arguments, words, tmp_path):
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu_wheels.sh", *arguments], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and not list(tmp_path.iterdir())
