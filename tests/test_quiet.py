"""Warnings that nobody can act on are not shown while a run with ``--peft`` lasts; all others are."""

import re
import warnings

import pytest

from mace_peft.quiet import HARMLESS, without_harmless_warnings


@pytest.mark.parametrize("text, shown", [*((f"{text}, and so on", False) for text in HARMLESS),
                                         *((f"Now: {text}", True) for text in HARMLESS), ("another", True)])
def test_harmless_warnings_alone_are_left_out(text, shown):
    for inside in (True, False):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if inside:
                with without_harmless_warnings():
                    warnings.warn(text, stacklevel=1)
            else:
                warnings.warn(text, stacklevel=1)
        assert bool(seen) == (shown or not inside)


def test_texts_are_patterns_of_themselves():
    assert all(re.match(text, text) for text in HARMLESS)
