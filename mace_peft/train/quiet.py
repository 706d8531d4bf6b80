"""Warnings of torch that a run with ``--peft`` does not show: of what MACE and e3nn do, and no user can change."""

import contextlib
import warnings
from collections.abc import Iterator

HARMLESS = (
    "The TorchScript type system doesn't support instance-level annotations",
    "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected",  # which MACE sets
    "You are using `torch.load` with `weights_only=False`",  # torch 2.4 and 2.5
    "'pin_memory' argument is set as true but no accelerator is found",  # MACE's default
)


@contextlib.contextmanager
def without_harmless_warnings() -> Iterator[None]:
    """Meanwhile these are not shown, and all others are."""
    with warnings.catch_warnings():
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message)  # a regular expression that the text begins with
        yield
