"""What the accuracy benchmark runs: cells (one fine-tune each), and experiments (sets of cells)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from studies import CLIP

MOLECULES = ("ethanol", "malonaldehyde", "benzene", "aspirin")  # rMD17
DATA = (*MOLECULES, "acac")
PLACEMENTS = ("products", "linears", "published")
LADDER = (0.0002, 0.001, 0.005, 0.01, 0.02, 0.08, 0.3)  # learning rates
FIRST = (0.001, 0.005, 0.02)  # of them
SWEPT, FINAL = 60, 200  # epochs of the sweep, and of everything else

GATE = dict.fromkeys(("mmea", "gates"), {"peft_gate": "exp"})  # as published; gates.py has the other
# what each method adds to the command
METHODS: dict[str, dict] = {
    "foundation": {"lr": 0, "max_num_epochs": 1},  # nothing trains: the foundation with E0s of the new data
    "scratch": {"E0s": "average"},
    "full": {},
    "readouts": {"freeze": 6},
    "MACE LoRA": {"lora": "True", "lora_rank": 16},
    **{f"{method} {placement}": {"peft": method, "peft_targets": placement} | GATE.get(method, {})
       for placement in PLACEMENTS for method in ("elora", "mmea")},
    **{method: {"peft": method} | GATE.get(method, {}) for method in ("gates", "scales", "small", "best")},
    "mmea": {"peft": "mmea"},  # by its defaults: gates with bounds
}
# around scales and updates of few parameters, one change at a time
EVERYWHERE = {"peft": "elora+scales", "peft_targets": "all"}
CHOSEN = {"peft_rank": "auto", "peft_budget": "5%"}
LINEARS = "atomic_energies_fn,node_embedding.*,interactions.*.linear*,products.*.linear,readouts.*"
BESIDE = {"contractions": "products.*.symmetric_contractions", "elements": "interactions.*.skip_tp",
          "radial": "interactions.*.conv_tp_weights"}
SMALL: dict[str, dict] = {
    "scales but E0s": {"peft": "scales", "peft_targets": "node_embedding,interactions.*,products.*,readouts.*"},
    "scales": METHODS["scales"],
    "scales + readouts": {**METHODS["scales"], "peft_train_also": "readouts.*"},
    "scales + rank 1": {**EVERYWHERE, "peft_rank": 1},
    "scales + rank 2": {**EVERYWHERE, "peft_rank": 2},
    "scales + chosen ranks": {**EVERYWHERE, **CHOSEN},
    "scales + chosen ranks + readouts": {**EVERYWHERE, **CHOSEN, "peft_train_also": "readouts.*"},
    "all + chosen ranks": {"peft": "elora", "peft_targets": "all", **CHOSEN},
    "scales linears + rank 4": {**EVERYWHERE, "peft_targets": "linears", "peft_rank": 4},
    **{f"scales linears and {more} + chosen ranks": {**EVERYWHERE, **CHOSEN, "peft_targets": f"{LINEARS},{modules}"}
       for more, modules in BESIDE.items()},
    "linears + chosen ranks": {"peft": "elora", "peft_targets": "linears", **CHOSEN},
    "small": METHODS["small"],  # scales linears + chosen ranks
    "small of 2%": {**METHODS["small"], "peft_budget": "2%"},
}
COMPARED = tuple(METHODS)
TRAINED = COMPARED[1:]
ABLATED = tuple(f"mmea products, {kind}" for kind in ("static", "shared", "scalars"))  # see train.py
MESSAGES: dict[str, dict] = {
    "gates": METHODS["gates"],  # gates of messages see the atom that receives
    "gates, senders": METHODS["gates"],  # see train.py
    "gates but messages": {
        "peft": "gates", "peft_gate": "exp",
        "peft_targets": "node_embedding.*,interactions.*.linear*,interactions.*.skip_tp,products.*.linear,readouts.*"},
}
# with a rate that falls from epoch to epoch, in the place of one that falls where the validation error stays
FALLING = {"scheduler": "ExponentialLR", "lr_scheduler_gamma": 0.985, "clip_grad": CLIP}
FELL: dict[str, dict] = {"full, lr falls": {**FALLING, "swa_lr": 0.000125},
                         "best, lr falls": {**METHODS["best"], **FALLING, "swa_lr": 0.0005}}
METHODS.update({name: METHODS["mmea products"] for name in ABLATED} | SMALL | MESSAGES | FELL)
# with gradients that are clipped as MACE does by default
CLIPPED = {"full": (0.0025, 0.005, 0.01), "best": (0.01, 0.02)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of mace_run_train: the published protocol (arXiv 2511.06696), but for epochs, learning rate and E0s."""

    data: str
    method: str
    lr: float
    epochs: int = FINAL
    train: int = 50  # configurations
    rank: int = 16
    E0s: str = "estimated"
    seed: int = 1
    budget: str | None = None  # of --peft_rank auto
    clip: int = 100

    @property
    def key(self) -> str:
        method = self.method.replace(", ", "-").replace(" ", "_")
        return (f"{self.data}-{method}-lr{self.lr:g}-epochs{self.epochs}-train{self.train}-rank{self.rank}-"
                f"{self.E0s}-seed{self.seed}{'' if self.budget is None else f'-budget{self.budget}'}"
                f"{'' if self.clip == 100 else f'-clip{self.clip}'}")

    @property
    def folder(self) -> str:
        """Of its data, below the folder that recipes/data.py writes."""
        return self.data if self.data == "acac" else f"rmd17/{self.data}"

    @property
    def tests(self) -> tuple[str, ...]:
        """The files that it is tested on: a sweep sees the validation set alone."""
        if self.epochs == SWEPT:
            return ()
        return ("test_300K", "test_600K") if self.data == "acac" else ("test",)

    @property
    def ablation(self) -> str | None:
        return None if self.method in FELL else self.method.partition(", ")[2] or None

    @property
    def model(self) -> str:
        return "run.model" if self.method == "foundation" else "run_stagetwo.model"

    def options(self) -> dict:
        """Options of mace_run_train; True stands for a flag."""
        method = METHODS[self.method]
        stage_two = {} if self.method == "foundation" else {
            "swa": True, "start_swa": 4 * self.epochs // 5, "swa_lr": self.lr / 5,
            "swa_energy_weight": 1000, "swa_forces_weight": 100}
        interval = max(1, self.epochs // FINAL)  # no more validations, and decays of lr, than in a run of that length
        return {
            "name": "run", "seed": self.seed, "E0s": self.E0s, "loss": "weighted", "energy_weight": 1,
            "forces_weight": 1000, "lr": self.lr, "batch_size": 5, "valid_batch_size": 50,
            "max_num_epochs": self.epochs, "eval_interval": interval, "lr_factor": 0.8,
            "scheduler_patience": 5 * interval, "ema": True, "ema_decay": 0.995,
            "clip_grad": self.clip, "weight_decay": 1e-8, "amsgrad": True, "default_dtype": "float64",
            "error_table": "TotalMAE", "plot": "False", "restart_latest": True, **stage_two, **method,
            **self.rank_options(method)}

    def rank_options(self, method: dict) -> dict:
        if method.get("peft") in (None, "scales", "small", "best") or "peft_rank" in method:
            return {}
        return {"peft_rank": self.rank} if self.budget is None else {"peft_rank": "auto", "peft_budget": self.budget}


def sweep(results: dict[str, dict], _) -> Iterator[Cell]:
    """Learning rates for each method on ethanol: three, and then until both neighbours of the best have been tried."""
    for method in TRAINED:
        cells = {lr: Cell("ethanol", method, lr, epochs=SWEPT) for lr in LADDER}
        tried = [lr for lr in LADDER if lr in FIRST or cells[lr].key in results]
        if all(cells[lr].key in results for lr in tried):
            place = LADDER.index(min(tried, key=lambda lr: validation_error(results[cells[lr].key])))
            tried += [LADDER[i] for i in (place - 1, place + 1) if 0 <= i < len(LADDER) and LADDER[i] not in tried]
        yield from (cells[lr] for lr in tried)


def validation_error(result: dict) -> float:
    """Lowest force MAE (eV/A) on the validation set."""
    return min(result["curve"]["mae_f"])


def learning_rates(results: dict[str, dict]) -> dict[str, float]:
    """The best of the sweep, for each method whose sweep is complete; an ablation has that of its method."""
    cells = list(sweep(results, {}))
    best = {"foundation": 0.0}
    for method in TRAINED:
        swept = [cell for cell in cells if cell.method == method]
        if all(cell.key in results for cell in swept):
            best[method] = min(swept, key=lambda cell: validation_error(results[cell.key])).lr
    return best | {name: best["mmea products"] for name in ABLATED if "mmea products" in best}


def small(results: dict[str, dict], _) -> Iterator[Cell]:
    """What scales everywhere gain from a little more: on the validation set, as in the sweep."""
    for method, lr in itertools.product(SMALL, LADDER[2:5]):
        yield Cell("ethanol", method, lr, epochs=SWEPT)


def messages(results: dict[str, dict], _) -> Iterator[Cell]:
    """Gates of messages, driven by either atom, or none: on the validation set, as in the sweep."""
    for method, lr in itertools.product(MESSAGES, FIRST):
        yield Cell("ethanol", method, lr, epochs=SWEPT)


def chosen_ranks(results: dict[str, dict], rates: dict[str, float]) -> Iterator[Cell]:
    """ELoRA of one rank everywhere, and with ranks that are chosen for as many parameters."""
    method = "elora published"
    for seed, data, rank in itertools.product((1, 2, 3), ("ethanol", "acac"), (4, 8, 16, 32)):
        if method in rates:
            fixed = Cell(data, method, rates[method], rank=rank, seed=seed)
            yield fixed
            if fixed.key in results:
                yield dataclasses.replace(fixed, rank=16, budget=str(results[fixed.key]["parameters"]))


def clipped(results: dict[str, dict], _) -> Iterator[Cell]:
    """With gradients clipped at 10: on the validation set, as in the sweep."""
    for method, rates in CLIPPED.items():
        yield from (Cell("ethanol", method, lr, epochs=SWEPT, clip=CLIP) for lr in rates)


def falling(results: dict[str, dict], _) -> Iterator[Cell]:
    """Both schedules of the rate, in the length of the main experiment."""
    for method, lr in (("full", 0.005), ("full, lr falls", 0.0025), ("full, lr falls", 0.005),
                       ("best", 0.02), ("best", 0.01), ("best, lr falls", 0.02)):
        yield Cell("ethanol", method, lr)


def sizes(_, rates: dict[str, float]) -> Iterator[Cell]:
    """From fewer configurations and from more, in as many steps as the others."""
    methods = ("foundation", "full", "elora products", "mmea products")
    for train, method in itertools.product((10, 25, 50, 100, 200), methods):
        if method in rates:
            yield Cell("acac", method, rates[method], epochs=FINAL * 50 // train, train=train)


def grid(**axes) -> Callable[[dict, dict], Iterator[Cell]]:
    """Cells for every combination of the values, at the method's learning rate; none for a method without one."""
    def cells(_, rates: dict[str, float]) -> Iterator[Cell]:
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            if chosen["method"] in rates:
                yield Cell(**chosen, lr=rates[chosen["method"]])
    return cells


EXPERIMENTS: dict[str, Callable[[dict, dict], Iterator[Cell]]] = {
    "sweep": sweep,
    "foundation": grid(data=DATA, method=("foundation",)),
    "main": grid(seed=(1, 2, 3), data=DATA, method=TRAINED),
    "sizes": sizes,
    "ranks": grid(rank=(1, 2, 4, 8, 16, 32, 64), data=("ethanol",), method=("elora products", "mmea products")),
    "ablations": grid(data=("ethanol",), method=("mmea products", *ABLATED)),
    "small": small,
    "messages": messages,
    "chosen": chosen_ranks,
    "clipping": clipped,
    "falling": falling,
    "E0s": grid(E0s=("average", "estimated"), data=("ethanol",), method=("full", "elora published", "mmea published")),
}
