"""The start-up hook, on a stand-in for MACE and for the plugin."""

import shutil
import textwrap

import pytest
from scratch import REPOSITORY, Scratch

RUN_TRAIN = """
    import sys
    import time

    time.sleep(0.1)  # gives the other threads of a test the time to get in

    def main():
        print(__name__, "installed" in globals(), *sys.argv[1:])

    if __name__ == "__main__":
        main()
"""
PLUGIN = """
    def install(module):
        module.installed = getattr(module, "installed", 0) + 1
"""
LOAD_PLUGINS = """
    def load_plugins():
        pass
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.fixture
def scratch(tmp_path):
    """An environment with the hook and a plugin that counts its installations, but no MACE."""
    scratch = Scratch(tmp_path / "env")
    shutil.copy(REPOSITORY / "mace_peft.pth", scratch.site)
    for name in ("__init__.py", "startup.py", "run_train.py", "train/__init__.py"):
        target = scratch.site / "mace_peft" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "mace_peft" / name, target)
    write(scratch.site / "mace_peft/train/plugin.py", PLUGIN)
    return scratch


@pytest.fixture
def mace(scratch):
    """The same environment with a stand-in for MACE; the path is its ``mace/cli``."""
    cli = scratch.site / "mace/cli"
    write(cli.parent / "__init__.py", "")
    write(cli / "__init__.py", "")
    write(cli / "run_train.py", RUN_TRAIN)
    write(cli / "other.py", "print(__name__)")
    return cli


def run(scratch, code):
    return scratch.run("-c", textwrap.dedent(code)).stdout.split()


def test_a_start_imports_nothing_but_the_hook(scratch, tmp_path):
    plain = Scratch(tmp_path / "plain")
    (plain.site / "nothing.pth").write_text("import sys\n")
    loaded = "import sys; print(*sys.modules)"
    assert set(run(scratch, loaded)) - set(run(plain, loaded)) == {"mace_peft", "mace_peft.startup"}


def test_a_start_prints_nothing(scratch):
    done = scratch.run("-c", "pass")
    assert done.stdout + done.stderr == ""


def test_importing_run_train_installs_the_plugin_once(scratch, mace):
    code = """
        import sys
        import mace.cli.other
        print("mace_peft.train.plugin" in sys.modules)
        import mace.cli.run_train
        from mace.cli import run_train
        print(run_train.installed)
    """
    assert run(scratch, code) == ["mace.cli.other", "False", "1"]


def test_threads_see_the_installed_plugin(scratch, mace):
    code = """
        import importlib
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            modules = pool.map(importlib.import_module, ["mace.cli.run_train"] * 8)
            print(*[module.installed for module in modules])
    """
    assert run(scratch, code) == ["1"] * 8


def test_a_reload_installs_the_plugin_again(scratch, mace):
    code = """
        import importlib
        import mace.cli.run_train as run_train
        print(importlib.reload(run_train).installed)
    """
    assert run(scratch, code) == ["2"]


def test_the_module_looks_as_it_would_without_the_hook(scratch, mace):
    code = """
        import importlib.resources, importlib.util, inspect, pkgutil, sys
        spec = importlib.util.find_spec("mace.cli.run_train")
        print("mace.cli.run_train" in sys.modules, spec.origin)
        import mace.cli.run_train as run_train
        import mace.cli.other
        print(run_train.__file__, run_train.__loader__.get_filename("mace.cli.run_train"))
        print(inspect.getsource(run_train.main) in run_train.__loader__.get_source("mace.cli.run_train"))
        print(importlib.resources.files("mace.cli").joinpath("run_train.py").is_file())
        print("main" in run_train.__loader__.get_code("mace.cli.run_train").co_names)
        print(type(mace.cli.other.__loader__).__name__)
    """
    path = str(mace / "run_train.py")
    expected = ["False", path, "mace.cli.other", path, path, "True", "True", "True", "SourceFileLoader"]
    assert run(scratch, code) == expected


def test_run_as_a_module(scratch, mace):
    done = scratch.run("-m", "mace.cli.run_train", "--name", "x")
    assert done.stdout == "mace.cli.run_train True --name x\n"
    assert done.stderr == ""


def test_another_module_runs_as_ever(scratch, mace):
    assert scratch.run("-m", "mace.cli.other").stdout == "__main__\n"


def test_without_the_hook_there_is_a_module_to_run(scratch, mace):
    (scratch.site / "mace_peft.pth").unlink()
    assert scratch.run("-m", "mace.cli.run_train").stdout == "__main__ False\n"
    assert scratch.run("-m", "mace_peft.run_train", "--seed=1").stdout == "mace.cli.run_train True --seed=1\n"


def test_the_hook_steps_aside_for_a_mace_that_loads_plugins(scratch, mace):
    write(mace / "run_train.py", LOAD_PLUGINS + RUN_TRAIN)
    assert scratch.run("-m", "mace.cli.run_train").stdout == "__main__ False\n"
    assert run(scratch, "from mace.cli import run_train; run_train.main()") == ["mace.cli.run_train", "False"]


def test_a_failing_import_keeps_its_error(scratch, mace):
    write(mace / "run_train.py", "import missing_module")
    done = scratch.run("-c", "import mace.cli.run_train", check=False)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'missing_module'"


@pytest.mark.parametrize("arguments", [("-c", "import mace.cli.run_train"), ("-m", "mace.cli.run_train")])
def test_a_missing_mace_is_reported_as_without_the_hook(scratch, arguments):
    hooked = scratch.run(*arguments, check=False)
    (scratch.site / "mace_peft.pth").unlink()
    plain = scratch.run(*arguments, check=False)
    assert "ModuleNotFoundError: No module named 'mace'" in hooked.stderr
    assert (hooked.returncode, hooked.stderr) == (plain.returncode, plain.stderr)
