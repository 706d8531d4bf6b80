"""The ``mace_peft`` command says what an adapter is, and stops with one line and exit code 2 at what it cannot do."""

import io
import os
import shutil
import subprocess
import sys

import ase.io
import pytest
import torch
from runs import environment
from tiny import configurations, randomise, tiny_mace

import mace_peft
from mace_peft import PeftConfig, cli, inject, merge, save_adapter, trainable_parameters
from mace_peft.adapter.directory import contents, read_adapter
from mace_peft.model.adapted import fingerprint

FOUNDATION = "foundation.model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    foundation = tiny_mace()
    torch.save(foundation, folder / FOUNDATION)
    origin = {"name": FOUNDATION, "head": None, "fingerprint": fingerprint(foundation)}
    for method, config in {"mmea": PeftConfig("mmea", rank=2, targets="products", train_also="readouts.0.*"),
                           "scales": PeftConfig("scales"),
                           "elora": PeftConfig("elora", rank=3, alpha=1.5)}.items():
        model = randomise(inject(tiny_mace(), config, origin))
        save_adapter(model, folder / method)
        torch.save(model, folder / f"{method}.model")
    torch.save(merge(model), folder / "merged.model")
    save_adapter(inject(tiny_mace(max_L=0), PeftConfig("mmea", rank=2, targets="products")), folder / "scalars")
    torch.save(tiny_mace(max_L=0), folder / "scalars.model")
    ase.io.write(folder / "water.xyz", configurations(2, "H2O"))
    (folder / "text.xyz").write_text("no structures\n")
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Runs the command in this process and in the folder; returns what it prints."""
    monkeypatch.chdir(folder)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["mace_peft", *arguments])
        cli.main()
        return capsys.readouterr().out

    return command


@pytest.fixture
def refusal(command, capsys):
    def refusal(*arguments):
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
        assert stopped.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = [line for line in output.err.splitlines() if line.startswith("mace_peft")]
        return line

    return refusal


def rows(text):
    """``{name: value}`` of the lines above the table, and ``{module: parameters}`` of the table."""
    above, _, table = text.partition("+")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {line[:13].strip(): line[13:] for line in above.splitlines()}, dict(cells[1:])


def share_of(trained):
    number, base = (sum(p.numel() for p in tensors) for tensors in (trained.values(), tiny_mace().parameters()))
    return f"{number:,} (float64), {100 * number / base:.1f} % of the base's {base:,}"


@pytest.mark.parametrize("path", ["mmea", "mmea.model"])
def test_info_of_an_mmea_adapter(command, folder, path):
    said, modules = rows(command("info", path, "--trust"))
    assert said["method"] == "mmea, rank 2, alpha 2, start published, gate bounded"
    assert said["placement"] == "products" and said["trains along"] == "readouts.0.*"
    assert said["elements"] == "H C O" and said["heads"] == "Default" and said["class"] == "ScaleShiftMACE"
    assert said["foundation"] == FOUNDATION and said["fingerprint"] == fingerprint(tiny_mace())
    trained = trainable_parameters(torch.load(folder / "mmea.model", weights_only=False))
    assert said["parameters"] == share_of(trained)
    assert said["E0s in eV"] == "H -1, C -2, O -3" and "date" not in said  # of no run
    assert list(modules) == ["products.0", "products.1", "readouts.0.linear.weight"]
    for module, number in modules.items():
        parts = [p.numel() for name, p in trained.items() if name == module or name.startswith(f"{module}.adapter.")]
        assert number == f"{sum(parts):,}"


def test_info_of_an_elora_adapter(command, folder):
    said, modules = rows(command("info", "elora"))
    assert said["method"] == "elora, rank 3, alpha 1.5, start published" and said["placement"] == "linears"
    assert "interactions.0.linear_up" in modules
    size = sum(path.stat().st_size for path in (folder / "elora").glob("adapter_*"))
    assert f"({size:,} bytes)" in said["what"]


def test_info_shows_the_ranks_that_were_chosen(command, tmp_path):
    ranks = {"products.0.linear": 3, "products.1.linear": 2}
    save_adapter(inject(tiny_mace(), PeftConfig("small", targets="products.*.linear", rank_pattern=ranks)), tmp_path)
    said = command("info", str(tmp_path))
    assert "\nmethod       small, rank auto, alpha as the rank, start published\n" in said
    cells = [line.split() for line in said.splitlines() if line.startswith("| products")]
    assert {module: int(rank) for _, module, _, _, _, rank, _ in cells} == ranks


def test_info_of_scales(command):
    said, modules = rows(command("info", "scales"))
    assert said["method"] == "scales" and said["placement"] == "all" and said["trains along"] == "nothing"
    assert modules["atomic_energies_fn"] == "3"


@pytest.mark.parametrize("path", [FOUNDATION, "merged.model"])
def test_info_of_a_plain_model(command, folder, path):
    said, modules = rows(command("info", path, "--trust"))
    assert said["adapters"].startswith("none") and said["elements"] == "H C O" and modules == {}
    assert said["fingerprint"] == fingerprint(torch.load(folder / path, weights_only=False))


def test_plot_writes_a_figure_of_each_kind(command, folder):
    assert command("plot", "mmea", "--foundation", FOUNDATION, "--structures", "water.xyz").endswith("mmea_gains.png\n")
    assert command("plot", "elora", "--foundation", FOUNDATION).endswith("elora_updates.png\n")
    assert command("plot", "scales", "--foundation", FOUNDATION).endswith("scales_gains.png\n")
    for name in ("mmea_gains.png", "elora_updates.png", "scales_gains.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_evaluate_prints_a_table_and_draws(command, folder):
    said = command("evaluate", FOUNDATION, "elora", "mmea", "--structures", "water.xyz", "--energy_key", "REF_energy",
                   "--batch_size", "1", "--default_dtype", "float32", "--plot", "parity.png")
    assert said.startswith("Errors on water.xyz (2 energies, 6 forces on atoms)\n")
    assert said.endswith("\nWrote parity.png\n") and "| mmea " in said and f"| {FOUNDATION}, E0s of elora " in said
    assert (folder / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_a_strength_is_exported_and_evaluated(command, folder):
    command("export", FOUNDATION, "mmea", "half.model", "--strength", "0.5")
    assert torch.load(folder / "half.model", weights_only=False).peft_strength == 0.5
    for name in ("--strengths", "--strengths=water.xyz"):
        said = command("evaluate", FOUNDATION, "mmea", "--structures", "water.xyz", name)
        assert said.count("| 0.25 ") == 1 + ("=" in name)


def test_the_version(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("--version")
    assert stopped.value.code == 0 and capsys.readouterr().out == f"mace-peft {mace_peft.__version__}\n"


def test_names_of_files_are_printable(command, folder):
    shutil.copytree(folder / "elora", folder / "mine\x1b[31m\n")
    said = command("export", FOUNDATION, "elora", "out\x1b[31m\n.model") \
        + command("plot", "mine\x1b[31m\n", "--foundation", FOUNDATION)
    assert said.count("\n") == 2 and r"out\x1b[31m\n.model" in said and r"mine\x1b[31m\n_updates.png" in said


def test_a_name_that_the_terminal_cannot_show_is_spelled_out(command, folder, monkeypatch):
    _, description, tensors = read_adapter(folder / "elora")
    description["foundation"]["name"] = "模型é"
    (folder / "foreign").mkdir()
    for name, content in contents(description, tensors).items():
        (folder / "foreign" / name).write_bytes(content)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    command("info", "foreign")
    assert rb"\u6a21\u578b\xe9" in sys.stdout.buffer.getvalue()


def test_who_reads_may_stop_before_the_end(command, monkeypatch):
    """As ``head`` does."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped:
            command("info", "elora")
    assert stopped.value.code == 1


@pytest.mark.parametrize("arguments, words", [
    (["info", "nowhere"], ["nowhere is no adapter directory, for it does not exist: check the path"]),
    (["info", "nowhere", "--trust"], ["nowhere", "neither a file nor a name"]),
    (["info", "mmea.model"], ["mmea.model is no adapter directory", "can run any code", "add --trust"]),
    (["info", "."], [". is no adapter directory", "adapter_model.safetensors is missing"]),
    (["info", "text.xyz", "--trust"], ["text.xyz cannot be loaded"]),
    (["export", "nowhere.model", "mmea", "out.model"], ["nowhere.model"]),
    (["export", FOUNDATION, "nowhere", "out.model"], ["nowhere is no adapter directory"]),
    (["export", FOUNDATION, "mmea", "mmea"], ["mmea cannot be written"]),
    (["export", FOUNDATION, "mmea", "nowhere/out"], ["nowhere/out cannot be written, for nowhere does not exist"]),
    (["export", FOUNDATION, "mmea", "water.xyz/out"], ["water.xyz/out cannot be written, for water.xyz is no dir"]),
    (["export", "mmea", FOUNDATION, "out.model"],
     [f"mmea is a directory and {FOUNDATION} a file: give the foundation model first, and then the adapter directory"]),
    (["export", FOUNDATION, FOUNDATION, "out.model"], [f"{FOUNDATION} is no adapter directory, for it is a file"]),
    (["plot", "elora", "--foundation", "elora"], ["elora cannot be loaded (it is a directory, as adapters are"]),
    (["export", "scalars.model", "mmea", "out.model"], ["weights differ"]),
    (["plot", "mmea", "--foundation", FOUNDATION], ["add --structures"]),
    (["plot", "mmea", "--foundation", FOUNDATION, "--structures", "text.xyz"], ["text.xyz cannot be read"]),
    (["plot", "mmea", "--foundation", FOUNDATION, "--structures", "none.xyz"], ["none.xyz does not exist"]),
    (["plot", "mmea", "--foundation", FOUNDATION, "--structures", "text.xyz@0"], ["text.xyz@0 does not exist"]),
    (["plot", "elora", "--foundation", FOUNDATION, "--structures", "water.xyz"], ["water.xyz has no effect"]),
    (["plot", "scalars", "--foundation", "scalars.model"],
     ["--peft mmea at products has no low-rank update to draw"]),
    (["plot", "scales", "--foundation", FOUNDATION, "--structures", "water.xyz"], ["no effect on scales"]),
    (["evaluate", "mmea", FOUNDATION, "--structures", "water.xyz"], ["mmea is a directory", "comes first"]),
    (["evaluate", FOUNDATION, "mmea", "--structures", "water.xyz", "--plot", "no/a.png"], ["no is no directory"]),
    (["export", FOUNDATION, "mmea", "out.model", "--strength", "2"], ["--strength 2.0 is not allowed: use a number"]),
], ids=" ".join)
def test_what_cannot_be_done_is_one_line(refusal, folder, arguments, words):
    before = {path.name for path in folder.iterdir()}
    line = refusal(*arguments)
    assert line.startswith("mace_peft: error: ") and all(word in line for word in words), line
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize("arguments, name", [(["export", FOUNDATION, "elora", "out.model"], "out.model"),
                                             (["plot", "elora", "--foundation", FOUNDATION], "elora_updates.png"),
                                             (["evaluate", FOUNDATION, "--structures", "water.xyz", "--plot", "a.png"],
                                              "a.png")])
def test_what_the_disk_does_not_take_is_one_line(refusal, folder, small_files, arguments, name):
    before = {path: path.stat().st_size for path in folder.iterdir()}
    line = refusal(*arguments)
    assert line.endswith(f"{name} cannot be written (File too large): make room or give it another place")
    assert {path: path.stat().st_size for path in folder.iterdir()} == before


@pytest.mark.parametrize("arguments", [[], ["export"], ["plot", "mmea"], ["evaluate", FOUNDATION],
                                       ["export", *"abc", "--format", "lamps"]], ids=" ".join)
def test_wrong_usage_has_exit_code_2(command, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert stopped.value.code == 2 and "usage: mace_peft" in capsys.readouterr().err


def test_the_console_script_is_installed(folder):
    """Its help comes without torch."""
    program = "import sys; sys.argv[1:] = ['--help']\nfrom mace_peft.cli import main\ntry: main()\n" \
              "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "export" in done.stdout
