"""What accuracy.py measured, by the settings that a table or a figure asks for."""

from __future__ import annotations

from statistics import mean

from cells import DATA, EXPERIMENTS, Cell, learning_rates


class Results:
    """Errors and numbers of parameters by cells; energies in meV, forces in meV/A."""

    def __init__(self, results: dict[str, dict]):
        self.results = results
        self.rates = learning_rates(results)

    def cells(self, experiment: str, **chosen) -> list[Cell]:
        """Measured cells of an experiment with these settings."""
        cells = EXPERIMENTS[experiment](self.results, self.rates)
        return [cell for cell in cells if cell.key in self.results
                and all(getattr(cell, name) == value for name, value in chosen.items())]

    def values(self, cells: list[Cell], test: str, error: str) -> list[float]:
        return [1e3 * self.results[cell.key]["errors"][test][error] for cell in cells]

    def shown(self, cells: list[Cell], test: str, error: str) -> str:
        """Mean over the seeds, and half of what lies between the lowest and the highest."""
        values = self.values(cells, test, error)
        if not values:
            return ""
        digits = 1 if mean(values) >= 10 else 2
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    def percent(self, method: str) -> list[float]:
        """Parameters that the method trains, of those of the model, by the molecules' models; empty if not measured."""
        counts = [self.results[cell.key]["parameters"] for name in (method, "full")
                  for cell in self.main(name, data="ethanol", seed=1)]
        return [100 * counts[0] / counts[1]] if len(counts) == 2 else []

    def share(self, method: str) -> str:
        cells = self.main(method, data="ethanol", seed=1)
        return "".join(f"{self.results[cell.key]['parameters']:,} ({percent:.1f} %)"
                       for cell, percent in zip(cells, self.percent(method), strict=False))

    def data(self) -> list[str]:
        """The data sets that have more than the foundation."""
        return [name for name in DATA if self.main("full", data=name)]

    def ratio(self, method: str, other: str, data: str, error: str = "mae_f") -> float | None:
        """Of their errors on the test set, the hottest of several."""
        cells, others = self.paired(method, other, data)
        if not cells:
            return None
        test = cells[0].tests[-1]
        return mean(self.values(cells, test, error)) / mean(self.values(others, test, error))

    def paired(self, method: str, other: str, data: str) -> tuple[list[Cell], list[Cell]]:
        return self.common(self.main(method, data=data), self.main(other, data=data))

    @staticmethod
    def common(*sets: list[Cell]) -> tuple[list[Cell], ...]:
        """The cells of the seeds that all sets have: another seed of one alone would change what is compared."""
        seeds = set.intersection(*({cell.seed for cell in cells} for cells in sets))
        return tuple([cell for cell in cells if cell.seed in seeds] for cells in sets)

    def main(self, method: str, **chosen) -> list[Cell]:
        return self.cells("foundation" if method == "foundation" else "main", method=method, **chosen)

    def forgetting(self, method: str, data: str) -> list[Cell]:
        """The cells that were tested on the foundation's own data as well."""
        return [cell for cell in self.main(method, data=data) if "pretraining" in self.results[cell.key]["errors"]]
