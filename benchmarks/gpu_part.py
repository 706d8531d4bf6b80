"""What the parts of gpu.py share: their arguments, and their entry in the file of results."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median


class Part:
    """A part's entry in the file. It is written after each case, so that a part that is cut off keeps what it has.

    found: what says where it ran. seconds: after so many no further case begins; those are listed as left out.
    """

    def __init__(self, name: str, path: Path, seconds: float, **found):
        self.name, self.path, self.began, self.seconds = name, path, time.monotonic(), seconds
        self.entry = {**found, "ended": False, "seconds": 0.0, "cases": {}, "wrong": [], "left out": []}
        self.save()

    def run(self, cases: dict[str, Callable[[], dict]]) -> dict:
        """Call each case, and keep what it finds or how it fails; returns the entry.

        A case may give ``errors`` beside a ``bound``: those above it are wrong. A bound of None allows all.
        """
        for name, case in cases.items():
            if time.monotonic() - self.began > self.seconds:
                self.entry["left out"].append(name)
                continue
            began = time.monotonic()
            try:
                found = self.entry["cases"][name] = case()
            except Exception as error:  # any, for the next case to be tried
                self.wrong(name, f"{type(error).__name__}: {error}", traceback.format_exc())
                found = "failed"
            else:
                for what, value in found.get("errors", {}).items():
                    if found["bound"] is not None and not value <= found["bound"]:  # nor NaN
                        self.wrong(name, f"{what} is off by {value:.1e}, of at most {found['bound']:.0e}")
            print(f"{self.name}: {name}: {short(found)} ({time.monotonic() - began:.1f} s)", flush=True)
            self.save()
        self.entry["ended"] = True
        self.save()
        return self.entry

    def wrong(self, case: str, what: str, trace: str = "") -> None:
        self.entry["wrong"].append({"case": case, "what": what, "traceback": trace})

    def save(self) -> None:
        self.entry["seconds"] = round(time.monotonic() - self.began, 1)
        write(self.path, self.name, self.entry)


def short(found: object) -> str:
    """What a case has found, in a few words for who looks on."""
    if not isinstance(found, dict):
        return str(found)
    if "errors" in found:
        return ", ".join(f"{what} {value:.1e}" for what, value in found["errors"].items())
    if "last lines" in found:
        return found["last lines"][-1] if found["last lines"] else ""
    times = {name: median(seconds) for name, seconds in found.get("step", found.get("predict", {})).items()}
    of = next(iter(times.values()), 0.0)
    return ", ".join([f"{1e3 * of:.0f} ms", *(f"{name} {seconds / of:.2f}" for name, seconds in times.items())])


def read(path: Path) -> dict[str, dict]:
    """The entries in the file, by part."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, name: str, entry: dict) -> None:
    """Put the entry in the place of that of the same part; the file is there whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(read(path) | {name: entry}, indent=1) + "\n")
    os.replace(beside, path)


def arguments(description: str) -> argparse.Namespace:
    """Of a part that gpu.py starts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    return parser.parse_args()
