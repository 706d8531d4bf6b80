"""Every command and every piece of Python in the documentation runs, in the order of the pages."""

import ast
import importlib
import re
import runpy
import shlex
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path

import ase.io
import pytest
import torch
from mace.cli import run_train
from releases import since
from runs import process_state_restored, write_inputs
from tiny import configurations, tiny_mace

from mace_peft.train import plugin

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECIPES = DOCS.parent / "recipes"
PAGES = ["fine-tune", "share", "deploy", "choose", "python", "from-lora"]  # the later use what the first leaves
TUTORIAL = "tutorial"  # in a folder of its own
# nothing in them to run; they have tests of their own
TABLES = {"compatibility", "gains", "performance", "results", "troubleshooting"}
ELSEWHERE = {"consumers", "sevennet"}  # need what consumers.py and sevennet.py, which run them, are for
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = {script.name: script.value for script in entry_points(group="console_scripts")
            if script.name.startswith("mace_")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("docs"), foundation=tiny_mace(channels=16))
    ase.io.write(folder / "train.xyz", configurations(24))
    return folder


def run_command(line, monkeypatch):
    """The console script in this process, with fewer epochs.

    Before mace-torch 0.3.15 with ``--E0s=average``, as the command says where it refuses ``estimated``.
    """
    line = line if since("0.3.15") else line.replace("--E0s=estimated", "--E0s=average")
    name, *arguments = shlex.split(re.sub(r"--max_num_epochs=\d+", "--max_num_epochs=1", line))
    if name == "python":
        monkeypatch.setattr(sys, "argv", [*arguments, "--steps=3"])
        runpy.run_path(arguments[0], run_name="__main__")
        return
    arguments += ["--max_num_epochs=1"] if "--config" in arguments else []
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module, function = COMMANDS[name].split(":")
    if module == run_train.__name__:
        plugin.install(run_train)
    getattr(importlib.import_module(module), function)()


def run_page(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    blocks = BLOCK.findall((DOCS / f"{page}.md").read_text())
    assert blocks
    for language, text in blocks:
        with process_state_restored():
            if language == "python":
                exec(text, names)
            else:
                for line in text.replace("\\\n", " ").splitlines():
                    run_command(line, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page, folder, monkeypatch):
    run_page(page, folder, monkeypatch)


@pytest.mark.since("0.3.15")  # as the quickstart's E0s
def test_the_tutorial_runs(tmp_path, monkeypatch):
    """With fewer structures, epochs and steps."""
    folder = Path(shutil.copytree(RECIPES / "quickstart", tmp_path / "quickstart"))
    shutil.copy(RECIPES / "tutorial.py", tmp_path)
    for part, count in (("train", 20), ("test", 3)):
        ase.io.write(folder / f"{part}.xyz", ase.io.read(folder / f"{part}.xyz", f":{count}"))
    run_page(TUTORIAL, folder, monkeypatch)
    files = {path.name for path in folder.iterdir()}
    assert {"tutorial.png", "dynamics.xyz", "glycine.pt"} <= files


def test_what_the_pages_promise_is_there(folder):
    files = {path.name for path in folder.iterdir()}
    assert {"mine_adapter", "further_adapter", "again_adapter", "mine_adapter_gains.png", "mine_lammps.pt",
            "evaluated.xyz", "mine.model-lammps.pt", "merged.model", "water_adapter"} <= files
    assert "look_adapter" not in files  # a dry run
    assert torch.load(folder / "merged.model", weights_only=False).r_max == 4.0


def test_every_page_is_run_and_every_link_leads_somewhere():
    assert {path.stem for path in DOCS.glob("*.md")} == {*PAGES, TUTORIAL, *TABLES, *ELSEWHERE}
    for path in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", *(DOCS.parent / "recipes").rglob("*.md")]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
            there = path.parent / target if target else path
            assert there.exists(), (path.name, target)
            assert not anchor or anchor in anchors(there), (path.name, target, anchor)


def anchors(page: Path) -> set[str]:
    """What links to its headings end in."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_begins_with_a_command():
    lines = (DOCS.parent / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert "```" in lines[:15]


# lines that are not ours: of argparse, Python and torch
OTHERS = {"unrecognized arguments: --peft", "No module named 'mace_peft'", "Weights only load failed"}


def test_each_line_that_the_page_explains_is_one_that_is_said():
    said = []  # values are "..."
    for path in (DOCS.parent / "mace_peft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(getattr(part, "value", "...") if isinstance(part, ast.Constant) else "..."
                                    for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    cells = re.findall(r"^\| (`.*?`) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    lines = {line for cell in cells for line in re.findall("`(.*?)`", cell)} - OTHERS
    assert len(lines) > 15
    assert [line for line in lines if not any(line in text for text in said)] == []
