"""What needs a GPU to be shown, in one command of at most eight minutes, without network.

    python benchmarks/gpu.py                                  all parts, in this order: right, fast, command
    python benchmarks/gpu.py --part right                     one of them
    python benchmarks/gpu.py --wheels FOLDER                  installs first what gpu_wheels.sh has collected there
    python benchmarks/gpu.py --device cpu --tiny --results rehearsal.json     the whole as a rehearsal, in two minutes
    python benchmarks/gpu.py --report                         writes the table of docs/performance.md again

right: numbers on the card are those on the CPU. fast: times and memory of steps and predictions. command: runs of
``mace_run_train``. Each part is a process of its own, and has its entry in the file of results (``gpu_part.py``). The
last lines say what is wrong, and the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import os
import signal
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from gpu_part import read, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT = HERE / "results" / "gpu.json"
SECONDS = {"right": 140, "fast": 170, "command": 145}  # that a part may take: with the installation, eight minutes
REHEARSAL = 1200  # for each part, on however slow a machine
UNBEGUN = 0.8  # of its time, after which a part begins nothing new


def install(wheels: Path, folder: Path) -> Path:
    """A virtual environment in the folder, which sees the packages of this Python, with mace-peft and what else is in
    the wheels and needed; returns its Python. No index is asked.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                              capture_output=True, text=True).stdout.strip()
    seen = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    # a virtual environment's own option would show those of the Python that this one is made from
    (Path(packages) / "seen.pth").write_text("".join(f"import site; site.addsitedir({place!r})\n" for place in seen))
    accelerators = [name for name in ("cuequivariance_torch", "cuequivariance_ops_torch_cu12",
                                      "cuequivariance_ops_torch_cu13") if [*wheels.glob(f"{name}-*.whl")]]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index",
                    "--find-links", wheels.resolve(), ROOT, *accelerators],
                   env=plain | {"PIP_CONFIG_FILE": os.devnull}, check=True)
    return python


def run_part(name: str, python: Path, device: str, tiny: bool, results: Path) -> dict:
    """Run a part in a process group of its own; returns its entry, in which it stands if the part has been ended."""
    seconds, entry = REHEARSAL if tiny else SECONDS[name], read(results).get(name)
    command = [python, HERE / f"gpu_{name}.py", *(["--tiny"] if tiny else []), "--device", device,
               "--results", results, "--seconds", UNBEGUN * seconds]
    process = subprocess.Popen([*map(str, command)], start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        process.wait(seconds)
        how = f"ended with the exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        how = f"was stopped after {seconds} seconds"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # there is none left, as it should be
        process.wait()
    found = read(results).get(name)
    if found is None or found == entry:
        found = {"ended": False, "wrong": [], "left out": [], "cases": {}}
    if not found["ended"]:
        found["wrong"].append({"case": "the part", "what": f"it {how} before its end", "traceback": ""})
        write(results, name, found)
    return found


def tell(entries: dict[str, dict]) -> int:
    """Print what was left out and what is wrong; returns the exit code."""
    for name, entry in entries.items():
        if entry["left out"]:
            print(f"left out, for the time was over: {name}: {'; '.join(entry['left out'])}")
    for name, entry in entries.items():
        for wrong in entry["wrong"]:
            print(f"wrong: {name}: {wrong['case']}: {wrong['what'].splitlines()[0]}")
    count = sum(len(entry["wrong"]) for entry in entries.values())
    print(f"{sum(len(entry['cases']) for entry in entries.values())} cases, {count} wrong")
    return 1 if count else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=SECONDS, help="this one alone")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few repeats: a rehearsal")
    parser.add_argument("--results", type=Path, default=RESULT, metavar="FOLDER|FILE",
                        help="default: benchmarks/results/gpu.json")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these first, into an environment that "
                        "is removed afterwards")
    parser.add_argument("--report", action="store_true", help="only write the table of docs/performance.md")
    args = parser.parse_args()
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels} is no folder: collect one by benchmarks/gpu_wheels.sh")
    if not args.report and args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error(f"--device cuda needs a GPU, and torch {torch.__version__} finds none: for a rehearsal, give "
                         "--device cpu --tiny --results FILE")
    if args.report:
        import gpu_report

        gpu_report.write_report()
        return 0
    if args.tiny and args.results == RESULT:
        parser.error(f"--tiny would put a rehearsal into {RESULT}: give --results")
    results = args.results.resolve()
    if results.suffix != ".json":
        results /= RESULT.name
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part ends with this process
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = Path(sys.executable) if args.wheels is None else install(args.wheels, Path(folder) / "env")
        except subprocess.CalledProcessError:  # which has said why
            parser.error(f"--wheels {args.wheels} lacks what is said above: collect it by benchmarks/gpu_wheels.sh")
        return tell({name: run_part(name, python, args.device, args.tiny, results)
                     for name in ([args.part] if args.part else SECONDS)})


if __name__ == "__main__":
    sys.exit(main())
