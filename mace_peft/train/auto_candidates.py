"""What ``--peft auto`` tries: a short table of methods, each at its own learning rate, and at half and twice that."""

from collections.abc import Callable
from typing import NamedTuple

from mace_peft.config import PeftConfig
from mace_peft.errors import PeftError

AUTO = "auto"
METHODS_TRIED = ("best", "mmea", "small", "full")
FACTORS = (1.0, 0.5, 2.0)  # of the rate of the method; in a short run the first ones are tried


class Candidate(NamedTuple):
    """The settings of a fine-tune, and its learning rate."""

    config: PeftConfig
    lr: float

    def options(self) -> str:
        """The method and the rate as they are typed for ``mace_run_train``."""
        return f"--peft {self.config.method} --lr {self.lr!r}"


def methods_that_take(settings: dict, check: Callable[[PeftConfig], object]) -> tuple[list[PeftConfig], dict[str, str]]:
    """The settings with each method that takes them, and why others do not, by method.

    settings: those that are given, but for the method. check: raises PeftError for what the model does not take. Raises
    PeftError if no method takes them.
    """
    found, refused = [], {}
    for method in METHODS_TRIED:
        try:
            config = PeftConfig(method, **settings)
            check(config)
            found.append(config)
        except PeftError as error:
            refused[method] = error.args[0]
    if not found:
        raise PeftError(f"<method> {AUTO} tries {', '.join(METHODS_TRIED)}, and none of them takes this: "
                        + "; ".join(f"{method}: {reason}" for method, reason in refused.items()))
    return found, refused


def candidates(configs: list[PeftConfig], lr: float | None) -> list[Candidate]:
    """The table, in the order in which it is tried. lr: the rate that is given; None: those of the methods."""
    if lr is not None:
        return [Candidate(config, lr) for config in configs]
    return [Candidate(config, factor * config.row.lr) for factor in FACTORS for config in configs]
