"""Where a benchmark ran: commit, machine, versions of packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mace-peft", "mace-torch", "e3nn", "torch", "cuequivariance-torch")


def environment(*more: str) -> dict:
    """more: packages beside the usual ones."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"commit": commit_here(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}",
            "versions": {package: package_version(package) for package in (*PACKAGES, *more)}}


def commit_here() -> str:
    """Of the clone; where it has travelled without its history, that in the variable COMMIT."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return "unknown"
    commit = git("rev-parse", "HEAD")
    if git("diff", "HEAD", "--stat", "--", "mace_peft", "benchmarks", ":!benchmarks/results"):  # which a run changes
        commit += "-dirty"
    return commit


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
