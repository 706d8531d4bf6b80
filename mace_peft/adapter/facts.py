"""What an adapter says of itself, as texts: for ``mace_peft info``, the card of its directory and the log of a run."""

from prettytable import PrettyTable

from mace_peft.elements import symbol, symbols
from mace_peft.errors import printable
from mace_peft.methods import METHODS

# errors by MACE's names without mae_ and rmse_, and what a thousandth of their unit is called
UNITS = {"e": "E, meV", "e_per_atom": "E, meV/atom", "f": "F, meV/A", "stress": "stress, meV/A^3",
         "virials": "virials, meV", "mu_per_atom": "dipole, mDebye/atom"}


def facts(description: dict, sizes: dict[str, int]) -> dict[str, str]:
    """What the description (``describe``) says, in texts by short names.

    sizes: how many numbers each tensor of the adapter has.
    """
    config, foundation = description["peft"], description["foundation"]
    row = METHODS[config["method"]]
    shown = {"rank": config["rank"], "alpha": "as the rank" if config["alpha"] is None else f"{config['alpha']:g}",
             "start": config["start"], "gate": config["gate"]}
    settings = [f"{name} {value}" for name, value in shown.items() if name in row.settings]
    along = "every parameter" if row.trains_base else None, config["train_also"]
    trained, base = sum(sizes.values()), description["base_parameters"]
    elements, E0s = description["elements"], description["E0s"]
    share = f", {100 * trained / base:.1f} % of the base's {base:,}" if base else ""
    return {
        "method": ", ".join([config["method"], *settings]),
        **({"strength": f"{description['strength']:g}"} if "strength" in description else {}),
        "placement": config["targets"] or "none",
        "trains along": ", ".join(filter(None, along)) or "nothing",
        "parameters": f"{trained:,} ({description['dtype']}){share}",
        "class": description["model_class"],
        "elements": symbols(elements or ()) or "any",
        "heads": ", ".join(description["heads"] or ["none"]),
        "E0s in eV": E0s_of_heads(elements, description["heads"], E0s) if elements and E0s else "none",
        "foundation": foundation["name"] or "not named",
        "fingerprint": foundation["fingerprint"],
        **(facts_of_training(description["training"]) if "training" in description else {}),
        "versions": ", ".join(f"{package} {version}" for package, version in description["versions"].items()),
    }


def E0s_of_heads(elements: list[int], heads: list[str] | None, E0s: list[list[float]]) -> str:
    texts = [", ".join(f"{symbol(element)} {energy:.8g}" for element, energy in zip(elements, energies, strict=False))
             for energies in E0s]
    named = zip(heads or (), texts, strict=False)
    return texts[0] if len(texts) == 1 else "; ".join(f"{head}: {text}" for head, text in named)


def facts_of_training(training: dict) -> dict[str, str]:
    """What ``TRAINING`` holds beside errors."""
    best, heads = training["best_epoch"], training["heads"]
    data = {name: f"train {listed(head['train_file'])} ({head['train']}), valid "
                  f"{listed(head['valid_file']) or 'a part of these'} ({head['valid']}), test "
                  f"{listed(head['test_file']) or 'none'}" for name, head in heads.items()}
    return {
        "date": training["date"],
        "data": "; ".join(data.values() if len(data) == 1 else (f"{name}: {text}" for name, text in data.items())),
        "E0s from": ", ".join(dict.fromkeys(head["E0s"] for head in heads.values())),
        "epochs": f"{training['epochs']}; the result is "
                  + ("the start" if best is None else f"epoch {best} of stage {training['stage']}"),
        "loss": training["loss"],
        "options": " ".join(f"--{name}={value}" for name, value in training["options"].items()),
    }


def listed(files: list[str]) -> str:
    return " ".join(files)


def header(training: dict) -> list[str]:
    """The first line of the table of ``error_rows``."""
    return ["set", "structures", measure(training).upper(), training["start"], "fine-tuned", "times lower"]


def error_rows(training: dict) -> list[list[str]]:
    """Errors of the start and of the result on each set, as ``--error_table`` says, and their ratio."""
    option = str(training["options"].get("error_table"))
    energy = "e" if option.startswith("Total") else "e_per_atom"
    rows = []
    for name, held in training["errors"].items():
        for error in (energy, "f", "stress" if "rmse_stress" in held["result"] else "virials", "mu_per_atom"):
            before, after = (held[of].get(f"{measure(training)}_{error}") for of in ("start", "result"))
            if before is None or after is None:
                continue
            ratio = short(before / after) if after else "-"
            rows.append([name, f"{held['structures']:,}", UNITS[error], short(1000 * before),
                         short(1000 * after), ratio])
    return rows


def measure(training: dict) -> str:
    return "mae" if "MAE" in str(training["options"].get("error_table")) else "rmse"


def short(number: float) -> str:
    return f"{number:,.1f}" if 10 <= number < 1e7 else f"{number:.3g}"


def error_table(training: dict) -> str:
    """The table of ``error_rows``."""
    table = PrettyTable(header(training), align="r")
    table.align["set"] = table.align[header(training)[2]] = "l"
    table.add_rows([list(map(printable, row)) for row in error_rows(training)])
    return table.get_string()
