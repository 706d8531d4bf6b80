"""Whatever the ``--peft*`` options say, ``mace_run_train`` gets to its training or stops with one line and exit code 2.

In two depths: what the plugin does before MACE's own ``run``, in hundreds of cases, and the whole command with
``--dry_run``. Each case has options on the command line, some twice, and in a YAML file, and a few options of MACE.
"""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import shutil
import types
import unittest.mock
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mace.cli import run_train
from runs import arguments, default_foundation, process_state_restored, write_inputs
from tiny import tiny_mace

from mace_peft import PeftConfig, eject, inject, save_adapter
from mace_peft.backbones.foundation import load_foundation
from mace_peft.methods import METHODS
from mace_peft.model.adapted import is_adapted
from mace_peft.train import plugin, start
from mace_peft.train.options import OF_TRAINING, OPTIONS

cases = settings(deadline=None, derandomize=True, database=None)

PATHS = ["mmea_adapter", "elora_adapter", "other_adapter", "damaged_adapter", "empty", "nowhere", "train.xyz", "."]
PATTERNS = ["products", "linears", "published", "all", "products.*", "products.0", "products.*.linear", "readouts.*",
            "*", "interactions.*.linear_up", "*.conv_tp_weights.layer[01]", "*skip_tp*", "products.0, products.1",
            "products.[!0].linear", "node_embedding"]
NUMBERS = {"peft_rank": lambda text: text if text == "auto" else int(text), "peft_alpha": float,
           "peft_init_std": float}
SENSIBLE = {
    "peft": [*METHODS, "auto"],
    "peft_rank": ["1", "2", "4", "auto"],
    "peft_budget": ["5%", "100%", "300"],
    "peft_alpha": ["1", "0.5", "1e-3"],
    "peft_targets": PATTERNS,
    "peft_start": ["published", "fan-in", "gradient"],
    "peft_gate": ["exp", "bounded"],
    "peft_init_std": ["0", "0.01"],
    "peft_train_also": ["readouts.*", "*", "node_embedding.*, products.*.weight", ""],
    "peft_adapter": PATHS[:3],
    "peft_keep": ["auto", "train.xyz"],
    "peft_keep_weight": ["1", "0.5", "1e3"],
    "peft_fast": ["True", "False"],
}
ODD = [
    "", " ", "0", "-1", "-0", "+2", "16 ", "1_6", "2.0", "2.5", "3.", "1e3", "1e400", "1e308", "1e-400", "nan", "-inf",
    "9" * 40, "9" * 400, "9" * 5000, "\u0661", "\uff12", "0x10", "two",  # numbers
    ",", "products,linears", "Products", " products", "products,", "[", "products.[", "products.[]", "products.[z-a]",
    "(?P<", "readouts.7.*", "*.adapter.*", "products/0", "*" * 99, "products.?,products.0", "products.0\n",  # patterns
    "mmea,elora", "MMEA", "lora", "exp ", "--peft", "-h", "a\nb", "\r", "\x1b[31m", "\u2028", "\udcff", "{0}", "%s",
    "a" * 300, "../" * 2000, "None", "False", "[]", *PATTERNS, *PATHS,
]
ANY_TEXT = st.sampled_from(ODD) | st.text(st.characters(exclude_characters="\0"), max_size=9) | (
    st.floats() | st.integers()).map(str)
OF_YAML = st.none() | st.booleans() | st.integers(-1, 4) | st.floats() | st.dates() | st.just("\0") | (
    st.lists(st.sampled_from(PATTERNS), max_size=2) | st.dictionaries(st.just("rank"), st.integers()))
OF_MACE = st.sampled_from([{}, {}, {"foundation_model": "adapted.model"}, {"foundation_model_elements": True},
                           {"default_dtype": "float32"}, {"E0s": "foundation"}, {"foundation_head": "Default"}])


def pairs(more, **sizes):
    """Some options with a value each, one of eight from those others."""

    def pair(name):
        value = st.integers(0, 7).flatmap(lambda number: st.sampled_from(SENSIBLE[name]) if number else more)
        return st.tuples(st.just(name), value)

    return st.lists(st.sampled_from(list(OPTIONS)).flatmap(pair), **sizes)


# the default rank is more than the foundation can use
EACH_METHOD = [[("peft_rank", "2")] * (row.rank is not None) + [("peft", method)] for method, row in METHODS.items()]
START = st.sampled_from([*EACH_METHOD, []])
COMMAND_LINE = st.tuples(START, pairs(ANY_TEXT, max_size=3)).map(lambda lists: sum(lists, []))
IN_FILE = st.just({}) | pairs(ANY_TEXT | OF_YAML, max_size=2).map(dict)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder: data, a foundation, an adapted one, and what ``--peft_adapter`` may name."""
    folder = write_inputs(tmp_path_factory.mktemp("fuzz"))
    (folder / "empty").mkdir()
    for method, foundation in {"mmea": default_foundation, "elora": default_foundation,
                               "other": functools.partial(tiny_mace, seed=1)}.items():
        model = inject(foundation().double(), PeftConfig("mmea" if method == "other" else method, rank=2,
                                                          targets="products"))
        save_adapter(model, folder / f"{method}_adapter")
        if method == "mmea":
            torch.save(model, folder / "adapted.model")
        eject(model)
    shutil.copytree(folder / "mmea_adapter", folder / "damaged_adapter")
    (folder / "damaged_adapter/adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@functools.cache
def parser() -> argparse.ArgumentParser:
    plugin.install(run_train)
    return run_train.tools.build_default_arg_parser()


def read(run, command_line: list, in_file: dict, of_mace: dict):
    """Parse the command and run it; returns the arguments, None if it stopped, and what the run gave.

    It stops with one line, and writes nothing but its log.
    """
    Path("peft.yaml").write_text(yaml.safe_dump(in_file), encoding="utf-8")
    argv = arguments(Path(), "--dry_run", "--config=peft.yaml", **of_mace)
    argv += [f"--{name}={value}" for name, value in command_line]
    before = written()
    errors = io.StringIO()
    args = result = None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), process_state_restored():
        try:
            args = parser().parse_args([str(argument) for argument in argv])
            result = run(args)
        except SystemExit as stopped:
            assert stopped.code == 2
            check_message(errors.getvalue(), parsed=args is not None)
            args = None
    assert written() == before
    return args, result


def written() -> dict[Path, int]:
    """The files in the current folder, but for logs, with the time at which they were written."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file() and path.parts[0] != "logs"}


def check_message(text: str, parsed: bool) -> None:
    if parsed:
        assert text.startswith("mace_run_train: error: ") and text[:-1].isprintable() and text[-1] == "\n"
    else:  # argparse's own, which starts with how the command is used
        assert text.startswith("usage: ") and ": error: " in text


def check_settings(config: PeftConfig, args) -> None:
    """The settings are those that were given, as the type that the option has; of auto, those of a method it tries."""
    others = ("peft_adapter", "peft_fast", *OF_TRAINING, *["peft"] * (getattr(args, "peft", None) == "auto"))
    for name in OPTIONS:
        if name not in others and hasattr(args, name):
            held = getattr(config, "method" if name == "peft" else name.removeprefix("peft_"))
            assert held == NUMBERS.get(name, str)(getattr(args, name))


# --- before MACE's own run --------------------------------------------------------------------------------------------


loaded = functools.cache(load_foundation)


def loaded_again(name: str, dtype: str) -> torch.nn.Module:
    """The foundation as it is in its file, loaded once."""
    model = loaded(name, dtype)
    return eject(model) if is_adapted(model) and name == "foundation.model" else model


@pytest.fixture(scope="module")
def front(folder):
    """The command that, in the place of training, gives what it would start from (None without ``--peft``)."""
    module = types.ModuleType("run_train")
    vars(module).update(vars(run_train), tools=types.SimpleNamespace(**vars(run_train.tools)))
    module.run = lambda args: getattr(module.configure_model, "__self__", None)
    plugin.install(module)
    with unittest.mock.patch.object(start, "load_foundation", loaded_again):
        yield module.run


@pytest.mark.parametrize("name", OPTIONS)
def test_any_value_of_an_option_gives_a_start_or_one_line(front, name):
    seen = collections.Counter()
    odd = zip(itertools.cycle(EACH_METHOD), ODD)  # noqa: B905  each value once, and each method often
    for method, value in [*odd, *itertools.product(EACH_METHOD, SENSIBLE[name])]:
        needed = {"peft_budget": [("peft_rank", "auto")], "peft_keep_weight": [("peft_keep", "auto")]}.get(name, [])
        args, fine_tune = read(front, [*method, *needed, (name, value)], {}, {})
        if args is not None:
            for config in fine_tune.start.tried or [fine_tune.start.config]:
                check_settings(config, args)
        seen[args is not None] += 1
    assert seen[True] > 1 and seen[False] > 1, seen


def test_any_settings_give_a_start_or_one_line(front):
    seen = collections.Counter()

    @settings(cases, max_examples=200)
    @given(COMMAND_LINE, IN_FILE, OF_MACE)
    def check(command_line, in_file, of_mace):
        args, fine_tune = read(front, command_line, in_file, of_mace)
        if fine_tune is not None:
            for config in fine_tune.start.tried or [fine_tune.start.config]:
                check_settings(config, args)
        seen[args is not None, fine_tune is not None] += 1

    check()
    assert min(seen[True, True], seen[False, False]) > 30, seen


# --- the whole command ------------------------------------------------------------------------------------------------


def test_any_settings_give_a_dry_run_or_one_line(folder):
    seen = collections.Counter()

    def run(args):
        """The model that the dry run would train."""
        models = []

        def get_params_options(args, model):
            models.append(model)
            return original(args, model)

        original = run_train.get_params_options
        with unittest.mock.patch.object(run_train, "get_params_options", get_params_options):
            run_train.run(args)
        assert Path("logs/run_run-1.log").read_text().endswith("DRY RUN mode enabled. Stopping now.\n")
        return models.pop()

    @settings(cases, max_examples=16)
    @given(COMMAND_LINE, IN_FILE, OF_MACE)
    def check(command_line, in_file, of_mace):
        args, model = read(run, command_line, in_file, of_mace)
        seen[args is not None, model is not None] += 1
        if hasattr(args, "peft"):
            assert is_adapted(model)
            check_settings(model.peft_config, args)
            assert all(torch.isfinite(parameter).all() for parameter in model.parameters())

    check()
    assert min(seen[True, True], seen[False, False]) > 3, seen
