"""Throw-away environments for the tests that start interpreters or install the package."""

import os
import shutil
import site
import subprocess
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


class Scratch:
    """An empty virtual environment.

    With ``see_packages`` it sees what is installed in the current environment, which costs no download and no copy. The
    ``.pth`` files over there have no effect here, so neither has a start-up hook or an editable install.
    """

    def __init__(self, root: Path, see_packages: bool = False):
        venv.create(root, symlinks=os.name != "nt")
        self.root = root
        self.python = root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        if see_packages:
            # Sorts after every other .pth file, so that what is installed here comes first.
            (self.site / "~outer.pth").write_text("\n".join(site.getsitepackages()))

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs this environment's Python; stderr is in the error where it fails."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.python, *arguments], cwd=self.root, env=environment, capture_output=True, text=True, timeout=600
        )
        if check and done.returncode:
            raise RuntimeError(f"{arguments} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def pip(self, *arguments: str) -> None:
        """Runs pip on this environment, without the network."""
        self.run("-m", "pip", "--no-input", "--disable-pip-version-check", *arguments)

    def install(self, source: Path, *options: str) -> None:
        """Installs a source tree; ``--ignore-installed`` because the package may be in the outer environment too."""
        offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
        self.pip("install", *offline, *options, str(source))

    def files(self) -> set[Path]:
        """Every file of the environment."""
        return {path.relative_to(self.root) for path in self.root.rglob("*") if not path.is_dir()}


def copy_sources(target: Path) -> Path:
    """Copies what a build reads, so that a build leaves nothing in the repository."""
    target.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md", "mace_peft.pth"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, target)
    shutil.copytree(REPOSITORY / "mace_peft", target / "mace_peft", ignore=shutil.ignore_patterns("__pycache__"))
    return target
