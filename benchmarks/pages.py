"""Tables, and pages of docs/ whose parts between ``<!-- name -->`` and ``<!-- end of name -->`` a program writes."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fill(page: Path, parts: dict[str, str]) -> None:
    """Replace each part of the page. Raises ValueError for a part that it has no marks for."""
    text = page.read_text()
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + "(.*?\n)?" + re.escape(end.lstrip()), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no marks {begin.strip()} and {end.strip()}: put them where the part belongs")
        text = pattern.sub(lambda _, content=begin + content + end: content, text)
    page.write_text(text)


def versions(environments: list[dict]) -> str:
    """Where it was measured, a line for each machine and set of packages, with the commits, shortened."""
    commits: dict[str, dict[str, None]] = {}
    for found in environments:
        packages = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
        commits.setdefault(f"{found['machine']}; {packages}.", {})[found["commit"][:10]] = None
    return "\n".join(f"Commit {', '.join(names)}; {where}" for where, names in commits.items())
