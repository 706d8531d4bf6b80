"""The tables and figures of docs/results.md and docs/results/, from what accuracy.py measured.

Energies in meV, forces in meV/A.
"""

from __future__ import annotations

from collections import Counter
from statistics import mean

from accuracy_figures import draw_curves, draw_forgetting, draw_sizes, plt
from accuracy_results import Results
from accuracy_summary import at, draw_summary, summary, which, why
from cells import ABLATED, COMPARED, LADDER, METHODS, MOLECULES, TRAINED, Cell, sweep
from cells import validation_error as validation
from kinds_report import PAGES as KINDS_PAGES
from pages import DOCS, fill, table, versions

# what was to be reached with few parameters: at most so many times the force error of the other
AIMS = [("scales", "MACE LoRA", 1.05), ("small", "mmea published", 1.03), ("gates", "mmea published", 1.0)]


def molecules(found: Results) -> str:
    measured = [name for name in found.data() if name in MOLECULES]
    header = ["trained", *(f"{name} {error}" for name in measured for error in ("E", "F"))]
    return table(["rMD17, MAE", *header], [
        [method, found.share(method), *(found.shown(found.main(method, data=name), "test", error)
                                        for name in measured for error in ("mae_e", "mae_f"))]
        for method in COMPARED if found.main(method)])


def aims(found: Results) -> str:
    """What was to be reached, and the ratio for each data set, in bold where it was missed."""
    rows = []
    for method, other, aim in AIMS:
        ratios = [found.ratio(method, other, name) for name in found.data()]
        measured = [ratio for ratio in ratios if ratio is not None]
        ratios.append(mean(measured) if measured else None)
        rows.append([f"{method} / {other}", f"{aim:g}", *("" if ratio is None else f"{ratio:.3f}" if ratio <= aim
                                                         else f"**{ratio:.3f}**" for ratio in ratios)])
    return table(["force MAE", "at most", *map(at, found.data()), "mean"], rows)


def acac(found: Results) -> str:
    tests = ("test_300K", "test_600K")
    return table(["AcAc, RMSE", *(f"{test[5:-1]} K {error}" for test in tests for error in ("E", "F")),
                  "600 K / 300 K, F"], [
        [method, *(found.shown(cells, test, error) for test in tests for error in ("rmse_e", "rmse_f")),
         f"{mean(found.values(cells, tests[1], 'rmse_f')) / mean(found.values(cells, tests[0], 'rmse_f')):.2f}"]
        for method in COMPARED for cells in [found.main(method, data="acac")] if cells])


def forgetting(found: Results) -> str:
    return table(["pretraining data, MAE F", *found.data()], [
        [method, *(found.shown(found.forgetting(method, name), "pretraining", "mae_f") for name in found.data())]
        for method in COMPARED if method != "scratch" and found.main(method)])


def rates(found: Results) -> str:
    """Force MAE on ethanol's validation set for each learning rate, the best in bold."""
    swept = {(cell.method, cell.lr): 1e3 * validation(found.results[cell.key]) for cell in sweep(found.results, {})
             if cell.key in found.results}
    rows = []
    for method in TRAINED:
        values = [swept.get((method, lr)) for lr in LADDER]
        if not any(values):
            continue
        rows.append([method, *("" if value is None else f"**{value:.1f}**" if found.rates.get(method) == lr
                               else f"{value:.1f}" for lr, value in zip(LADDER, values, strict=True))])
    return table(["lr", *(f"{lr:g}" for lr in LADDER)], rows)


def by(found: Results, experiment: str, setting: str, test: str, *header: str) -> str:
    """Energy and force MAE of each method of the experiment, and for each a row for each value of a setting."""
    cells = sorted(found.cells(experiment), key=lambda cell: list(METHODS).index(cell.method))
    return table([*header, "trained", "E", "F"], [
        [cell.method, str(getattr(cell, setting)), f"{found.results[cell.key]['parameters']:,}",
         *(found.shown([cell], test, error) for error in ("mae_e", "mae_f"))] for cell in cells])


def ablated(found: Results) -> str:
    rows = [[method, f"{found.results[cells[0].key]['parameters']:,}",
             *(found.shown(cells, "test", error) for error in ("mae_e", "mae_f"))]
            for method in ("mmea products", *ABLATED) for cells in [found.cells("ablations", method=method)] if cells]
    return table(["ethanol, MAE", "trained", "E", "F"], rows)


def small_budget(found: Results) -> str:
    """Each with the best of its learning rates, and how many of them were tried."""
    best: dict[str, Cell] = {}
    tried = Counter(cell.method for cell in found.cells("small"))
    for cell in found.cells("small"):
        if cell.method not in best or validation(found.results[cell.key]) < validation(
                found.results[best[cell.method].key]):
            best[cell.method] = cell
    rows = []
    for cell in best.values():
        result = found.results[cell.key]
        rows.append([cell.method, f"{result['parameters']:,}", f"{cell.lr:g}", str(tried[cell.method]),
                     *(f"{1e3 * min(result['curve'][error]):.1f}" for error in ("mae_e", "mae_f"))])
    return table(["ethanol, validation, MAE", "trained", "lr", "of", "E", "F"], rows)


def messages(found: Results) -> str:
    """Force MAE on ethanol's validation set for each learning rate."""
    cells = found.cells("messages")
    rates = list(dict.fromkeys(cell.lr for cell in cells))
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        mine = [found.results[cell.key] for cell in cells if cell.method == method]
        rows.append([method, f"{mine[0]['parameters']:,}", *(f"{1e3 * validation(result):.1f}" for result in mine)])
    return table(["ethanol, validation, MAE F", "trained", *(f"lr {rate:g}" for rate in rates)], rows)


def clipping(found: Results) -> str:
    """Force MAE on ethanol's validation set where gradients are clipped at 10, for each learning rate."""
    cells = found.cells("clipping")
    rates = sorted({cell.lr for cell in cells})
    swept = {(cell.method, cell.lr): f"{1e3 * validation(found.results[cell.key]):.1f}" for cell in cells}
    return table(["lr", *(f"{lr:g}" for lr in rates)], [
        [method, *(swept.get((method, lr), "") for lr in rates)] for method in dict.fromkeys(c.method for c in cells)])


def falling(found: Results) -> str:
    """Energy and force MAE on ethanol's test set with both schedules of the rate."""
    return table(["ethanol, MAE", "lr", "E", "F"], [
        [cell.method, f"{cell.lr:g}", *(found.shown([cell], "test", error) for error in ("mae_e", "mae_f"))]
        for cell in found.cells("falling")])


def chosen(found: Results) -> str:
    """ELoRA with one rank everywhere, and with chosen ranks for as many parameters, over the seeds that both have."""
    rows, ratios = [], {}
    for data, rank in dict.fromkeys((cell.data, cell.rank) for cell in found.cells("chosen", budget=None)):
        fixed = found.cells("chosen", data=data, rank=rank, budget=None)
        count, test = found.results[fixed[0].key]["parameters"], fixed[0].tests[-1]
        fixed, free = found.common(fixed, found.cells("chosen", data=data, budget=str(count)))
        errors = [(test, "mae_e"), (test, "mae_f"), ("pretraining", "mae_f")]
        shown = [found.shown(cells, *error) for cells in (fixed, free) for error in errors]
        one, other = (found.values(cells, test, "mae_f") for cells in (fixed, free))
        if one:
            ratios.setdefault((rank, count), []).append(mean(other) / mean(one))
        rows.append([at(data), str(rank), f"{count:,}", *shown, f"{ratios[rank, count][-1]:.3f}" if one else ""])
    rows += [["mean", str(rank), f"{count:,}", *[""] * 6, f"{mean(several):.3f}"]
             for (rank, count), several in ratios.items()]
    return table(["MAE", "rank", "parameters", "E", "F", "pretraining data, F", "chosen ranks: E", "F",
                  "pretraining data, F", "F, chosen / one rank"], rows)


def comparison(found: Results, better: str, worse: str, error: str, data=MOLECULES, test: str = "test") -> list[float]:
    """By how much the first is below the second: percent, averaged over the data sets that have both; empty if none."""
    gains = []
    for name in data:
        first, second = (found.values(cells, test, error) for cells in found.paired(better, worse, name))
        if first:
            gains.append(100 * (1 - mean(first) / mean(second)))
    return [mean(gains)] if gains else []


def claims(found: Results) -> str:
    """Beside each published figure, in percent, ours and how much more it is (in points)."""
    pairs = [("MMEA below ELoRA", "mmea published", "elora published", 6.6, 8.7),
             ("ELoRA below full fine-tuning", "elora published", "full", 25.5, 23.7)]
    rows = [(f"{what}, rMD17, {name}", said, comparison(found, better, worse, error))
            for what, better, worse, *both in pairs
            for name, error, said in zip(("energy", "force"), ("mae_e", "mae_f"), both, strict=True)]
    rows += [(f"{method}: trained, of all parameters", said, found.percent(method)) for method, said in (
        ("mmea published", 20.1), ("elora published", 23.4))]
    rows += [(f"{name} below {other}, AcAc at 600 K, force RMSE", None,
              comparison(found, better, worse, "rmse_f", ("acac",), "test_600K"))
             for name, other, better, worse in (("MMEA", "ELoRA", "mmea published", "elora published"),
                                                ("ELoRA", "full fine-tuning", "elora published", "full"))]
    return table(["claim", "published", "here", "difference"], [
        [what, f"{said:g} %" if said else "better", *(f"{value:.1f} %" for value in values),
         *(f"{value - said:+.1f}" if said else "" for value in values)] for what, said, values in rows if values])


def write_report(results: dict[str, dict]) -> None:
    """Put the tables between their marks in README.md, docs/results.md and docs/results/, and draw their figures."""
    found = Results(results)
    fill(DOCS.parent / "README.md", {"which": which(found), "why": why(found)})
    parts = {
        "summary": summary(found), "aims": aims(found),
        "versions": versions([result["environment"] for result in results.values()]),
        "molecules": molecules(found), "acac": acac(found),
        "claims": claims(found), "forgetting": forgetting(found), "rates": rates(found), "ablations": ablated(found),
        "ranks": by(found, "ranks", "rank", "test", "ethanol, MAE", "rank"),
        "small": small_budget(found), "chosen": chosen(found),
        "messages": messages(found), "clipping": clipping(found), "falling": falling(found),
        "sizes": by(found, "sizes", "train", "test_600K", "AcAc at 600 K, MAE", "configurations"),
        "E0s": by(found, "E0s", "E0s", "test", "ethanol, MAE", "E0s")}
    pages = [DOCS / "results.md", *(page for page in sorted((DOCS / "results").glob("*.md"))
                                    if page.name not in KINDS_PAGES.values())]
    texts = {page: page.read_text() for page in pages}
    for page, text in texts.items():
        fill(page, {name: part for name, part in parts.items() if f"<!-- {name} -->" in text})
    drawn = {"summary": draw_summary, "curves": draw_curves, "forgetting": draw_forgetting, "sizes": draw_sizes}
    for name, draw in drawn.items():
        if found.data() and any(f"accuracy_{name}.png" in text for text in texts.values()):
            draw(found).savefig(DOCS / "figures" / f"accuracy_{name}.png", dpi=110)
    plt.close("all")
