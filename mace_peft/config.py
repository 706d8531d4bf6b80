"""PeftConfig: what to adapt, how, and the rules that every value must follow."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real

METHODS = ("mmea", "elora")
PLACEMENTS = ("products", "linears", "published", "all")
GATES = ("exp", "residual", "static")
DEFAULT_BUDGET = "5%"
LARGEST = sys.float_info.max


class PeftError(ValueError):
    """A setting, model or file that cannot be used: its message names the value, the cause and the remedy."""


@dataclass(frozen=True)
class PeftConfig:
    """Settings of a fine-tune. Field names are the options of ``mace_run_train`` without ``--peft_``.

    method: ``mmea`` (arXiv 2511.06696) or ``elora`` (ICML 2025, openreview hcoxm3Vwgy).
    rank: r, the width of the gate's hidden layer (MMEA) or of the low-rank factors (ELoRA); or ``auto``: each module
        has its own, chosen from the training set (``mace_peft.ranks``) within the budget.
    alpha: updates of weights are scaled by alpha / rank; None means alpha = rank, as published.
    targets: a placement (``products``, ``linears``, ``published``, ``all``) or comma-separated glob patterns over the
        names of modules.
    gate: MMEA's gain is ``exp``: exp(g), or ``residual``: 1 + g, of each atom's scalars; or ``static``: exp(g) of a
        learnt g for each output channel of each weighted operation, which merges into the weights, and has no rank.
        With ELoRA, ``static`` adds these gains to its updates.
    init_std: standard deviation of MMEA's scalar shift at the start; 0 makes step 0 equal to the foundation.
    train_also: comma-separated glob patterns over the names of base parameters that train along.
    budget: what the adapters of rank ``auto`` may train, as a number of parameters or a share of the base's: ``5%``.
    rank_pattern: the ranks that were chosen, by module: ``{name: rank}``.

    Raises PeftError for a value outside these rules.
    """

    method: str
    rank: int | str = 16
    alpha: float | None = None
    targets: str = "products"
    gate: str = "exp"
    init_std: float = 0.0
    train_also: str | None = None
    budget: str | None = None
    rank_pattern: tuple[tuple[str, int], ...] | None = None

    def __post_init__(self):
        check_choice("--peft", self.method, METHODS)
        check_choice("--peft_gate", self.gate, GATES)
        changed = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}
        if self.alpha == self.rank:  # as by default
            changed.pop("alpha", None)
        check_effect(changed)
        automatic = self.rank == "auto"
        if automatic:
            object.__setattr__(self, "budget", check_budget(DEFAULT_BUDGET if self.budget is None else self.budget))
        elif self.rank_pattern is not None:
            raise PeftError(f"rank {self.rank} has no rank_pattern, which auto has: leave it out")
        elif self.budget is not None:
            raise PeftError(f"--peft_budget {self.budget} has no effect on --peft_rank {self.rank}: leave it out, or "
                            "use --peft_rank auto")
        else:
            check_number("--peft_rank", self.rank, Integral, lambda rank: 1 <= rank <= 10**6,
                         "a whole number of at least 1, up to a million, or auto")
        alpha = self.rank if self.alpha is None and not automatic else self.alpha
        if alpha is not None:
            check_number("--peft_alpha", alpha, Real, lambda alpha: 0 < alpha <= LARGEST, "a number above 0")
        check_number("--peft_init_std", self.init_std, Real, lambda std: 0 <= std <= LARGEST, "a number from 0 up")
        if not isinstance(self.train_also, (str, type(None))):
            raise PeftError(f"--peft_train_also {self.train_also!r} is no text: use comma-separated glob patterns "
                            "such as 'readouts.*'")
        if self.train_also is not None and not split_patterns(self.train_also):
            raise PeftError(f"--peft_train_also {self.train_also!r} names no parameter: use comma-separated glob "
                            "patterns such as 'readouts.*', or leave it out")
        if not isinstance(self.targets, str) or not split_patterns(self.targets):
            raise PeftError(f"--peft_targets {self.targets!r} names no module: {describe_targets()}")
        # plain numbers, whatever number types came in: they go to JSON
        for name, value in {"rank": "auto" if automatic else int(self.rank), "init_std": float(self.init_std),
                            "alpha": None if alpha is None else float(alpha)}.items():
            object.__setattr__(self, name, value)
        if self.rank_pattern is not None:  # hashable, as all settings are
            object.__setattr__(self, "rank_pattern", check_ranks(self.rank_pattern))

    @property
    def has_rank(self) -> bool:
        """Static gains alone have none."""
        return self.method == "elora" or self.gate != "static"

    def to_dict(self) -> dict:
        """The settings as JSON-ready values; ``PeftConfig(**d)`` is the way back."""
        return {**asdict(self), "rank_pattern": None if self.rank_pattern is None else dict(self.rank_pattern)}

    def of_module(self, name: str) -> PeftConfig:
        """The settings with the rank that the module has."""
        rank = dict(self.rank_pattern or ()).get(name)
        return self if rank is None else replace(self, rank=rank, budget=None, rank_pattern=None)

    def options(self) -> str:
        """The settings as they are typed for ``mace_run_train``."""
        names = {"method": "--peft"}
        without = {"rank_pattern"}
        if not self.has_rank:
            without |= {"rank", "alpha"}
        if self.method == "elora" or not self.has_rank:
            without.add("init_std")
        if self.method == "elora" and self.gate != "static":
            without.add("gate")
        values = {k: v for k, v in asdict(self).items() if v is not None and k not in without}
        return " ".join(f"{names.get(key, '--peft_' + key)}={value}" for key, value in values.items())


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise PeftError unless value is one of the choices, naming the closest one."""
    if value not in choices:
        raise PeftError(f"{option} {value!r} is unknown{did_you_mean(str(value), choices)}: use {' or '.join(choices)}")


def check_effect(given: dict[str, object]) -> None:
    """Raise PeftError for a setting on which the method and gate that are given with it do not act."""
    static = given.get("gate") == "static"
    useless = {}
    if given["method"] == "elora":
        why = "elora, which has no gates that atoms drive: leave it out"
        useless = {"init_std": why} | ({} if static else {"gate": f"{why}, or use --peft_gate static"})
    elif static:
        useless = dict.fromkeys(("rank", "budget", "alpha", "init_std"),
                                "static gains, which have no rank and no shifts: leave it out")
    for name, why in useless.items():
        if name in given:
            raise PeftError(f"--peft_{name} {given[name]} has no effect on {why}")


def check_number(option: str, value: object, kind: type, allowed, rule: str) -> None:
    """Raise PeftError unless value is of the kind (bool is none) and allowed."""
    if isinstance(value, bool) or not isinstance(value, kind) or not allowed(value):
        shown = value if isinstance(value, Real) else repr(value)
        raise PeftError(f"{option} {shown} is not allowed: use {rule}")


def check_budget(budget: object) -> str:
    """The budget, if it is a share or a number of parameters. Raises PeftError if not."""
    text = str(budget)
    number = text.removesuffix("%")
    try:
        allowed = 0 < float(number) <= 100 if text.endswith("%") else int(number) > 0
    except ValueError:
        allowed = False
    if not allowed:
        raise PeftError(f"--peft_budget {budget} is not allowed: use a share of the base's parameters, such as 5%, or "
                        "a whole number of them")
    return text


def check_ranks(pattern: object) -> tuple[tuple[str, int], ...]:
    """Names of modules and their ranks, sorted. Raises PeftError for what is neither."""
    try:
        ranks = dict(pattern)
    except (TypeError, ValueError):
        raise PeftError(f"rank_pattern {pattern!r} is no table of ranks: use {{name of a module: rank}}") from None
    for name, rank in ranks.items():
        if not isinstance(name, str):
            raise PeftError(f"rank_pattern {name!r} is no name of a module: use {{name of a module: rank}}")
        check_number(f"rank_pattern {name}", rank, Integral, lambda rank: 1 <= rank <= 10**6,
                     "a whole number of at least 1, up to a million")
    return tuple(sorted((name, int(rank)) for name, rank in ranks.items()))


def split_patterns(patterns: str | None) -> list[str]:
    """The glob patterns of a comma-separated list."""
    return [pattern.strip() for pattern in (patterns or "").split(",") if pattern.strip()]


def describe_targets() -> str:
    return f"use {', '.join(PLACEMENTS)}, or glob patterns over module names such as 'interactions.*.linear'"


def one_line(error: Exception) -> str:
    """What another package's error says, short and without line breaks, to go into a PeftError."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def did_you_mean(value: str, names: Iterable[str]) -> str:
    """', did you mean ...?' for the names close to value, or nothing."""
    close = difflib.get_close_matches(value, list(names), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""
