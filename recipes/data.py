"""Fetch the data sets of the recipes, check them, and write their splits.

    python recipes/data.py                         rMD17 (10 molecules), AcAc and 3BPA from GitHub, into data/
    python recipes/data.py acac --from FOLDER      from a local copy: FOLDER/acac/train_300K.xyz, and so on

A repository is fetched at one commit, so git has checked every byte of it. A local copy is checked against
SHA256SUMS; for files that are not listed there, a line says that they were not checked.

data/<set>/ gets train.xyz, valid.xyz and the test files, with REF_energy (eV) and REF_forces (eV/A).
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import ase.io

HERE = Path(__file__).resolve().parent
MOLECULES = ("aspirin", "azobenzene", "benzene", "ethanol", "malonaldehyde", "naphthalene", "paracetamol", "salicylic",
             "toluene", "uracil")
# where each set is published: repository, commit, and its folder there
SOURCES = {
    **{f"rmd17/{name}": ("https://github.com/CLaSLoVe/MMEA", "21e18bd38dcbe477f24399f84bdec7c4c41820b9",
                         f"repro_data/dataset/dataset_rmd17/revised_{name}") for name in MOLECULES},
    "acac": ("https://github.com/davkovacs/BOTNet-datasets", "4a5ea06c3f514f24164428823ba1f5e2d2233b58",
             "dataset_acac"),
    "3bpa": ("https://github.com/davkovacs/BOTNet-datasets", "4a5ea06c3f514f24164428823ba1f5e2d2233b58",
             "dataset_3BPA"),
}
# published file with the training and validation configurations, how many of them train, and the test files
SPLITS = {
    "rmd17": ("train.xyz", 50, {"test": "test.xyz"}),
    "acac": ("train_300K.xyz", 450, {"test_300K": "test_MD_300K.xyz", "test_600K": "test_MD_600K.xyz"}),
    "3bpa": ("train_300K.xyz", 450, {f"test_{T}": f"test_{T}.xyz" for T in ("300K", "600K", "1200K")}),
}


def download(repository: str, commit: str, folder: str, to: Path) -> Path:
    """The folder of the repository at this commit; git makes sure that it is what the commit says."""
    if not (to / ".git").exists():
        git(to.parent, "init", "-q", to)
        git(to, "remote", "add", "origin", repository)
        git(to, "fetch", "-q", "--depth=1", "--filter=blob:none", "origin", commit)
    git(to, "checkout", "-q", commit, "--", folder)
    return to / folder


def git(folder: Path, *arguments) -> None:
    subprocess.run(["git", "-C", folder, *arguments], check=True)


def checksums() -> dict[str, str]:
    lines = (HERE / "SHA256SUMS").read_text().splitlines()
    return {name: value for value, name in (line.split(maxsplit=1) for line in lines)}


def check(path: Path, name: str) -> None:
    """Stop if the file is not the published one."""
    expected = checksums().get(name)
    if expected is None:
        print(f"{name}: no checksum is known, not checked")
    elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        sys.exit(f"{path} is not the published {name}: its SHA-256 differs from that in {HERE / 'SHA256SUMS'}; "
                 "fetch it again")


def read(folder: Path, name: str, file: str) -> list[ase.Atoms]:
    """The structures with MACE's default keys: ASE takes ``energy`` and ``forces`` for a calculator's results."""
    path = folder / file
    if not path.exists():
        sys.exit(f"{path} is missing: it is a part of {name}")
    check(path, f"{name}/{file}")
    structures = ase.io.read(path, ":")
    for atoms in structures:
        if atoms.calc is not None:
            atoms.info["REF_energy"] = atoms.get_potential_energy()
            atoms.arrays["REF_forces"] = atoms.get_forces()
            atoms.calc = None
    return structures


def write_splits(name: str, source: Path, to: Path) -> None:
    """rMD17: the first half trains, the second validates, as published. Others: in one random order for everybody."""
    kind = name.split("/")[0]
    trained, count, tests = SPLITS[kind]
    structures = read(source, name, trained)
    if kind != "rmd17":
        random.Random(0).shuffle(structures)
    files = {"train": structures[:count], "valid": structures[count:],
             **{key: read(source, name, file) for key, file in tests.items()}}
    to.mkdir(parents=True, exist_ok=True)
    for key, part in files.items():
        ase.io.write(to / f"{key}.xyz", part)
    print(f"{to}: " + ", ".join(f"{key} {len(part)}" for key, part in files.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", default=list(SOURCES), help=", ".join(SOURCES))
    parser.add_argument("--from", dest="source", type=Path, help="folder with a local copy")
    parser.add_argument("--to", type=Path, default=Path("data"))
    args = parser.parse_args()
    unknown = [name for name in args.sets if name not in SOURCES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such set; there are {', '.join(SOURCES)}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.sets:
            repository, commit, folder = SOURCES[name]
            if args.source:
                source = args.source / name
            else:
                try:
                    source = download(repository, commit, folder, Path(scratch) / Path(repository).name)
                except subprocess.CalledProcessError:
                    sys.exit(f"{repository} cannot be fetched at {commit}: where there is no network, copy {folder} of "
                             f"it to FOLDER/{name}, and give --from FOLDER")
            write_splits(name, source, args.to / name)


if __name__ == "__main__":
    main()
