"""Warnings that our commands do not show: of what MACE and e3nn do, and no user can change."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

HARMLESS = (
    "The TorchScript type system doesn't support instance-level annotations",
    "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected",  # which MACE sets
    "You are using `torch.load` with `weights_only=False`",  # torch 2.4 and 2.5
    "'pin_memory' argument is set as true but no accelerator is found",  # MACE's default
)
# lines of the log: of replay that nobody has asked for, before mace-torch 0.3.15
UNASKED = "Using multiheads finetuning with a foundation model that is not a Materials Project model"


@contextlib.contextmanager
def without_harmless_warnings() -> Iterator[None]:
    """Meanwhile these are not shown, and all others are."""
    with warnings.catch_warnings():
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message)  # a regular expression that the text begins with
        logging.getLogger().addFilter(is_asked_for)
        try:
            yield
        finally:
            logging.getLogger().removeFilter(is_asked_for)


def is_asked_for(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(UNASKED)
