"""PeftError, the one error that users see, and what its texts are made of."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

# settings, and the options of mace_run_train and mace_peft that they are
OPTIONS = {"method": "--peft", "rank_pattern": "rank_pattern"} | {
    name: f"--{name}" for name in ("strength", "head", "device")} | {
    name: f"--peft_{name}" for name in "rank alpha targets start gate init_std train_also budget adapter fast".split()}
MARKED = re.compile(f"<({'|'.join(OPTIONS)})>")


class PeftError(ValueError):
    """A setting, model or file that cannot be used: one printable line with the value, the cause and the remedy.

    ``<rank>`` in the text that it is made from is a setting: ``rank`` in Python, ``--peft_rank`` on the command line.
    """

    def __str__(self) -> str:
        return printable(MARKED.sub(r"\1", self.args[0]))

    def on_command_line(self) -> str:
        """The text with the settings as options of ``mace_run_train``."""
        return printable(MARKED.sub(lambda match: OPTIONS[match[1]], self.args[0]))


def printable(text: str) -> str:
    """The text in one line, in which signs that a terminal would obey are spelled out, such as \\n."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def one_line(error: Exception) -> str:
    """What another package's error says, short and without line breaks, to go into a PeftError."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def did_you_mean(value: str, names: Iterable[str]) -> str:
    """', did you mean ...?' for the names close to value, or nothing."""
    close = difflib.get_close_matches(value, list(names), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""


def check_choice(setting: str, value: object, choices: Iterable[str]) -> None:
    """Raise PeftError unless value is one of the choices, naming the closest one."""
    choices = tuple(choices)
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise PeftError(f"{setting} {value!r} is unknown{hint}: use {' or '.join(choices)}")


@contextlib.contextmanager
def needs_mace(what: str) -> Iterator[None]:
    """Raise PeftError if the block imports mace-torch where it is not installed, as beside SevenNet."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "mace":
            raise
        raise PeftError(f"{what} is for MACE models and needs mace-torch, which is not installed: use an environment "
                        "that has it, and for a SevenNet load_adapter and SevenNetCalculator") from None
