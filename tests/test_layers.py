"""Imports go downwards only, and what is below MACE imports without it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mace_peft

PACKAGE = Path(mace_peft.__file__).parent
# from the ground up; what shares a line imports nothing of that line
LAYERS = [
    ("errors", "e3nn", "elements", "patching", "quiet", "restore", "startup"),
    ("files", "methods", "structures"),
    ("config", "labels"),
    ("blocks",),
    ("backbones",),
    ("model",),
    ("adapter", "fast"),
    ("inspect",),
    ("train",),
    ("deploy", "sevennet"),
    ("cli", "run_train"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# the start-up hook hands over to the plugin once the training command is there: it is below all, and starts that
HANDS_OVER = {("startup", "train")}


def module_name(path: Path) -> str:
    return ".".join(("mace_peft", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """Modules of the package that the module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import, which hides where it goes"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {module for module in found if module in MODULES and module not in ("mace_peft", name)}


def part_of(module: str) -> str:
    """The folder, or the file beside the folders, that has the module."""
    return module.split(".")[1]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "mace_peft"])
def test_imports_go_downwards(name):
    for imported in imports_of(name):
        here, there = part_of(name), part_of(imported)
        if here != there and (here, there) not in HANDS_OVER:
            assert LEVEL[there] < LEVEL[here], f"{name} imports {imported}, which lies above it"


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({name: imports_of(name) for name in MODULES}).prepare()


def test_e3nn_is_imported_in_one_place():
    def packages(path):
        for node in ast.walk(ast.parse(path.read_text())):
            names = node.names if isinstance(node, ast.Import) else []
            yield from [alias.name for alias in names]
            yield getattr(node, "module", None) or ""

    assert [name for name, path in MODULES.items()
            if any(package.split(".")[0] == "e3nn" for package in packages(path))] == ["mace_peft.e3nn"]


def test_the_core_imports_without_mace():
    core = [name for name in MODULES if part_of(f"{name}.") in ("methods", "config", "backbones", "model", "adapter")
            and name.rpartition(".")[2] not in ("mace", "foundation", "batches", "sevennet")]
    core += ["mace_peft.blocks.e3nn", "mace_peft.inspect.spectra"]
    code = f"import sys; sys.path[:] = {sys.path!r}; sys.modules['mace'] = None; import {', '.join(core)}"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def test_files_are_short():
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 250}
    assert not long


def test_every_folder_is_in_the_map():
    contributing = PACKAGE.parent / "CONTRIBUTING.md"
    if contributing.exists():
        text = contributing.read_text()
        assert not [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
                    and f"`mace_peft/{path.name}/`" not in text]
