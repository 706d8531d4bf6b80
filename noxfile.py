"""``nox``: the tests with every supported release of mace-torch, each in an environment of its own.

``nox -s "tests(0.3.13)" -- tests/test_train.py`` runs one file with one release. ``.ci/run`` tests the newest.
``nox -s newest_torch oldest_torch plain``: the newest torch as the index gives it, on Linux a CUDA build; the oldest
that setup.cfg allows; and the tests without what they remember to save time.
"""

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
