"""PeftConfig: the settings of a fine-tune, and the rules that every value must follow."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real

from mace_peft.errors import OPTIONS, PeftError, check_choice
from mace_peft.methods import GATES, METHODS, STARTS, Method

LONGEST_PATTERNS = 5000  # characters
LARGEST = sys.float_info.max
MOST_PATTERNS = 200
RANKS = (lambda rank: 1 <= rank <= 10**6), "a whole number of at least 1, up to a million"
# what a method lacks, on which the setting would act
ACTS_ON = {"targets": "adapters", "rank": "rank", "budget": "rank", "rank_pattern": "rank", "alpha": "low-rank updates",
           "start": "low-rank updates", "gate": "gates", "init_std": "gates"}


@dataclass(frozen=True)
class PeftConfig:
    """Settings of a fine-tune. Field names are the options of ``mace_run_train`` without ``--peft_``.

    method: a row of the table of methods: ``mmea`` (arXiv 2511.06696), ``elora`` (ICML 2025, openreview hcoxm3Vwgy),
        ``gates``, ``scales``, ``elora+scales``, ``small``, ``best``; or ``full``, all parameters without adapters. It
        says which of the settings below act, and what they are unless given; the others are None.
    rank: the width of a gate's hidden layer, or of the low-rank factors; or ``auto``: each module has its own, chosen
        from the training set (``choose_ranks``) within the budget.
    alpha: low-rank updates are scaled by alpha / rank; None means alpha = rank, as published.
    targets: where adapters go, and nothing else: a placement (``products``, ``linears``, ``published``, ``all``) or
        comma-separated glob patterns over the names of modules, or a list of them.
    start: the first factor of low-rank updates at the start: ``published``, N(0, 1); ``fan-in``, N(0, 1 / rows); or
        ``gradient``, along the first gradients of the training set, which a run finds, and ``start_along_gradients``.
    gate: ``bounded``: gains lie within fixed bounds, and an atom without neighbours keeps its energy; or ``exp``, as
        published: a gain is exp(g) (``mace_peft.methods.MMEA``).
    init_std: standard deviation of a gate's scalar shift at the start; 0 makes step 0 equal to the foundation.
    train_also: comma-separated glob patterns, or a list, over the names of base parameters that train along; with
        ``full``, of E0s alone.
    budget: what the adapters of rank ``auto`` may train, as a number of parameters or a share of the base's, such
        as ``5%``.
    rank_pattern: the ranks that were chosen, by module: ``{name: rank}``.

    Raises PeftError for a value outside these rules.
    """

    method: str
    rank: int | str | None = None
    alpha: float | None = None
    targets: str | Sequence[str] | None = None
    start: str | None = None
    gate: str | None = None
    init_std: float | None = None
    train_also: str | Sequence[str] | None = None
    budget: str | None = None
    rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] | None = None

    def __post_init__(self):
        if self.method == "auto":
            raise PeftError("<method> auto is for mace_run_train, which tries methods on its data: give one, such as "
                            "elora")
        check_choice("<method>", self.method, METHODS)
        for name in ("targets", "train_also"):
            self.settle(name, joined(getattr(self, name)))
        check_effect(vars(self))
        defaults = {"targets": self.row.targets, "rank": self.row.rank if self.has_rank else None}
        defaults |= {"start": self.row.start} if "start" in self.row.settings else {}
        defaults |= {"gate": GATES[0], "init_std": 0.0} if self.row.has_gates else {}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                self.settle(name, value)
        if self.targets is not None:
            check_patterns("<targets>", self.targets, "module", "such as 'interactions.*.linear', or a placement such "
                           "as published")
        if self.train_also is not None:
            check_patterns("<train_also>", self.train_also, "parameter", "such as 'readouts.*', or leave it out")
        if self.start is not None:
            check_choice("<start>", self.start, STARTS)
        if self.row.has_gates:
            check_choice("<gate>", self.gate, GATES)
            check_number("<init_std>", self.init_std, Real, lambda std: 0 <= std <= LARGEST, "a number from 0 up")
            self.settle("init_std", float(self.init_std))
        if self.has_rank:
            self.check_rank()

    def check_rank(self) -> None:
        automatic = self.rank == "auto"
        if automatic:
            self.settle("budget", check_budget(self.row.budget if self.budget is None else self.budget))
        else:
            check_number("<rank>", self.rank, Integral, RANKS[0], f"{RANKS[1]}, or auto")
            self.settle("rank", int(self.rank))
            for name in ("budget", "rank_pattern"):
                if getattr(self, name) is not None:
                    raise PeftError(f"<{name}> {getattr(self, name)!s:.200} has no effect on <rank> {self.rank}: "
                                    "leave it out, or use <rank> auto")
        if self.alpha is None and not automatic and "alpha" in self.row.settings:
            self.settle("alpha", self.rank)
        if self.alpha is not None:
            check_number("<alpha>", self.alpha, Real, lambda alpha: 0 < alpha <= LARGEST, "a number above 0")
            self.settle("alpha", float(self.alpha))
        if self.rank_pattern is not None:  # hashable, as all settings are
            self.settle("rank_pattern", check_ranks(self.rank_pattern))

    def settle(self, name: str, value: object) -> None:
        """Set a field, though the class is frozen, to a plain value: the settings go to JSON."""
        object.__setattr__(self, name, value)

    @property
    def row(self) -> Method:
        """The row of the method in the table."""
        return METHODS[self.method]

    @property
    def has_rank(self) -> bool:
        """Scales alone have none."""
        return "rank" in self.row.settings

    def to_dict(self) -> dict:
        """The settings as JSON-ready values; ``PeftConfig(**d)`` is the way back."""
        return {**asdict(self), "rank_pattern": None if self.rank_pattern is None else dict(self.rank_pattern)}

    def of_module(self, name: str) -> PeftConfig:
        """The settings with the rank that the module has."""
        rank = dict(self.rank_pattern or ()).get(name)
        return self if rank is None else replace(self, rank=rank, budget=None, rank_pattern=None)

    def options(self) -> str:
        """The settings as they are typed for ``mace_run_train``."""
        values = {OPTIONS[name]: value for name, value in asdict(self).items() if value is not None}
        return " ".join(f"{option}={value}" for option, value in values.items() if option.startswith("--"))


def check_effect(given: dict[str, object]) -> None:
    """Raise PeftError for a setting on which the method that is given with it does not act."""
    method = given["method"]
    for name, lacking in ACTS_ON.items():
        setting = "rank" if name in ("budget", "rank_pattern") else name
        if given.get(name) is not None and setting not in METHODS[method].settings:
            raise PeftError(f"<{name}> {given[name]!s:.200} has no effect on {method}, which has no {lacking}: leave "
                            "it out")


def check_number(setting: str, value: object, kind: type, allowed, rule: str) -> None:
    """Raise PeftError unless value is of the kind (bool is none) and allowed."""
    if isinstance(value, bool) or not isinstance(value, kind) or not allowed(value):
        shown = value if isinstance(value, Real) else repr(value)
        raise PeftError(f"{setting} {shown} is not allowed: use {rule}")


def check_patterns(setting: str, value: object, what: str, remedy: str) -> None:
    """Raise PeftError unless value is a list of patterns as an adapter directory takes it, printable and not long."""
    patterns = split_patterns(value) if isinstance(value, str) else None
    if patterns is None:
        wrong = "is no text"
    elif not patterns:
        wrong = f"names no {what}"
    elif not value.isprintable():
        wrong = "has signs that cannot be printed"
    elif len(value) > LONGEST_PATTERNS:
        wrong = f"has {len(value)} characters, of at most {LONGEST_PATTERNS}"
    elif len(patterns) > MOST_PATTERNS:
        wrong = f"has {len(patterns):,} patterns, of at most {MOST_PATTERNS}"
    else:
        return
    raise PeftError(f"{setting} {value!r:.200} {wrong}: use comma-separated glob patterns {remedy}")


def check_budget(budget: object) -> str:
    """The budget, if it is a share or a number of parameters. Raises PeftError if not."""
    text = str(budget)
    try:
        allowed = 0 < float(text[:-1]) <= 100 if text.endswith("%") else int(text) > 0
    except ValueError:
        allowed = False
    if not allowed:
        raise PeftError(f"<budget> {budget!s:.200} is not allowed: use a share of the base's parameters, such as 5%, "
                        "or a whole number of them")
    return text


def check_ranks(pattern: object) -> tuple[tuple[str, int], ...]:
    """Names of modules and their ranks, sorted. Raises PeftError for what is neither."""
    try:
        ranks = dict(pattern)
    except (TypeError, ValueError):
        ranks = {pattern: 0}
    for name, rank in ranks.items():
        if not isinstance(name, str):
            raise PeftError(f"rank_pattern {name!r:.200} is no table of ranks: use {{name of a module: rank}}")
        check_number(f"rank_pattern {name:.200}", rank, Integral, *RANKS)
    return tuple(sorted((name, int(rank)) for name, rank in ranks.items()))


def joined(patterns: object) -> object:
    """A list of patterns as one text; anything else as it is."""
    several = isinstance(patterns, (list, tuple)) and all(isinstance(pattern, str) for pattern in patterns)
    return ",".join(patterns) if several else patterns


def split_patterns(patterns: str | None) -> list[str]:
    """The glob patterns of a comma-separated list, each once."""
    return list(dict.fromkeys(pattern.strip() for pattern in (patterns or "").split(",") if pattern.strip()))
