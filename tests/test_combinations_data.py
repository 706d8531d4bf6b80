"""What a fine-tune reads and writes: with ``--peft``, data in every format that MACE reads train the same adapters, and
plots and logs are those of MACE.
"""

import json
import time

import ase.io
import pytest
import wandb
from ase.calculators.singlepoint import SinglePointCalculator
from combined import adapters, assert_same, differ, fine_tune, train_only, write_small
from mace import tools
from mace.cli import preprocess_data
from mace.tools.fairchem_dataset.lmdb_dataset_tools import LMDBDatabase
from matplotlib.axes import Axes
from runs import E0S, FEWER_ELEMENTS, MOLECULE, NAME, SEED, Run, process_state_restored
from tiny import configurations

pytestmark = pytest.mark.usefixtures("double_precision")

NUMBERS = "[1, 6, 8]"
PARTS = ("train", "valid", "test")


def prepare(folder, train, **options) -> None:
    """What ``mace_prepare_data`` does, in this process."""
    options |= {"train_file": train, "valid_file": folder / "valid.xyz", "h5_prefix": f"{folder}/", "num_process": 1,
                "E0s": E0S[MOLECULE], "atomic_numbers": NUMBERS, "r_max": 4.0, "shuffle": False}
    flags = [f"--{name}={value}" for name, value in options.items()]
    with process_state_restored():
        preprocess_data.run(tools.build_preprocess_arg_parser().parse_args(flags))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """xyz files, and beside them the same structures as HDF5 (with statistics) and LMDB, in the same order."""
    folder = write_small(tmp_path_factory.mktemp("inputs"))
    ase.io.write(folder / "test.xyz", configurations(4, MOLECULE, seed=2))  # of an odd number MACE drops some
    prepare(folder, folder / "test.xyz")  # the option for test sets fails in 0.3.13
    (folder / "train" / "train_0.h5").rename(folder / "test" / "Default_test.h5")
    prepare(folder, folder / "train.xyz")
    statistics = {"atomic_energies": E0S[MOLECULE], "atomic_numbers": NUMBERS, "avg_num_neighbors": 3.0, "mean": 0.0,
                  "std": 1.0}  # of which a fine-tune takes the first two; --compute_statistics fails in 0.3.13
    (folder / "statistics.json").write_text(json.dumps(statistics))
    for part in PARTS:
        lmdb = folder / f"{part}_lmdb"
        lmdb.mkdir()
        with LMDBDatabase(lmdb / "data.aselmdb") as database:
            for atoms in ase.io.read(folder / f"{part}.xyz", ":"):
                labels = {"energy": atoms.info.pop("REF_energy"), "forces": atoms.arrays.pop("REF_forces")}
                atoms.calc = SinglePointCalculator(atoms, **labels)  # all that 0.3.13 reads
                database.write(atoms)
    return folder


@pytest.fixture(scope="module")
def plain(inputs) -> Run:
    """The fine-tune on xyz files."""
    return fine_tune(inputs, "plain")


# --- data -------------------------------------------------------------------------------------------------------------

FORMATS = {
    "HDF5 files": {"train_file": "train/train_0.h5", "valid_file": "val/val_0.h5"},
    "HDF5 folders": {"train_file": "train", "valid_file": "val"},
    "LMDB files": {"train_file": "train_lmdb/data.aselmdb", "valid_file": "valid_lmdb/data.aselmdb"},
    "LMDB folders": {"train_file": "train_lmdb", "valid_file": "valid_lmdb"},
}


@pytest.mark.parametrize("files", FORMATS.values(), ids=FORMATS)
def test_every_format_trains_the_adapters_that_xyz_files_train(inputs, plain, tmp_path, files):
    options = {name: inputs / file for name, file in files.items()} | {"test_file": None, "atomic_numbers": NUMBERS}
    run, _ = train_only(inputs, tmp_path, **options)
    assert_same(adapters(run), plain.adapter_tensors())


def test_statistics_and_a_folder_of_test_sets(inputs, tmp_path):
    """As ``mace_prepare_data`` leaves them. In one batch, for MACE's own statistics use up an order of the batches."""
    xyz = fine_tune(inputs, tmp_path / "xyz", batch_size=8)
    run = fine_tune(inputs, tmp_path / "hdf5", batch_size=8, train_file=inputs / "train", valid_file=inputs / "val",
                    test_file=None, test_dir=inputs / "test", statistics_file=inputs / "statistics.json", E0s=None)
    assert_same(run.adapter_tensors(), xyz.adapter_tensors(), 1e-10)
    tables = [[line.split("|")[2:] for line in each.log.splitlines() if line.startswith("| ")][-3:] for each in
              (run, xyz)]
    assert tables[0] == tables[1]


def test_a_list_of_files_is_one_set(inputs, plain, tmp_path):
    structures = ase.io.read(inputs / "train.xyz", ":")
    ase.io.write(tmp_path / "first.xyz", structures[:3])
    ase.io.write(tmp_path / "second.xyz", structures[3:])
    head = {"train_file": [str(tmp_path / name) for name in ("first.xyz", "second.xyz")], "E0s": E0S[MOLECULE],
            "valid_file": [str(inputs / "valid.xyz")]}
    run, _ = train_only(inputs, tmp_path, heads={"Default": head}, train_file=None, valid_file=None, test_file=None)
    assert_same(adapters(run), plain.adapter_tensors())


def test_elements_that_the_data_lack_do_not_change_what_is_learnt(plain, tmp_path):
    """From the same start, which ``--seed`` alone does not give to models of other sizes."""
    inputs = write_small(tmp_path, FEWER_ELEMENTS)
    options = {"E0s": E0S[FEWER_ELEMENTS], "peft_adapter": plain.adapter()}
    narrowed, _ = train_only(inputs, "narrowed", **options)
    run, given = train_only(inputs, "whole", foundation_model_elements=True, **options)
    assert given["model"].atomic_numbers.tolist() == [1, 6, 8]
    assert_same(adapters(run), adapters(narrowed), 1e-10)
    assert differ(adapters(run), plain.adapter_tensors())


# --- plots and logs ---------------------------------------------------------------------------------------------------


def plots(run: Run) -> set[str]:
    return {path.name for path in run.folder.rglob("*.png")}


@pytest.mark.since("0.3.16")
def test_plots_are_those_of_mace_and_do_not_change_the_run(inputs, plain, tmp_path):
    """Also with matplotlib 3.11, which takes no tuple as the label of one line, as MACE has it."""
    draw = Axes.plot
    run = fine_tune(inputs, tmp_path / "peft", plot=True, plot_frequency=1)
    assert_same(run.adapter_tensors(), plain.adapter_tensors())
    assert plots(run) == {f"{NAME}_run-{SEED}_train_Default_stage_one.png"}
    assert "No figure" not in run.log and Axes.plot is draw


@pytest.mark.since("0.3.16")
@pytest.mark.parametrize("loss", ["universal", "virials"])
def test_plots_do_without_a_label_that_no_structure_has(inputs, tmp_path, loss):
    """Where MACE's fail, for it looks for errors of the stress with these losses."""
    run = fine_tune(inputs, tmp_path, plot=True, loss=loss)
    assert plots(run) == {f"{NAME}_run-{SEED}_train_Default_stage_one.png"} and "No figure" not in run.log


def test_plots_that_fail_do_not_change_the_run(inputs, plain, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ValueError("label must be scalar")

    monkeypatch.setattr(Axes, "plot", fail)
    run, _ = train_only(inputs, tmp_path, plot=True, plot_frequency=1)
    assert_same(adapters(run), plain.adapter_tensors())
    assert plots(run) == set()


@pytest.mark.since("0.3.15")
def test_weights_and_biases_offline(inputs, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = fine_tune(inputs, tmp_path, "--wandb", wandb_dir=tmp_path, wandb_project="adapters", wandb_name="run")
    wandb.finish()
    assert_same(run.adapter_tensors(), plain.adapter_tensors())
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # another process writes it, which may be late on a busy machine
    while not (b"valid_rmse_f" in log.read_bytes() and b"peft_rank" in log.read_bytes()):
        assert time.monotonic() < deadline, f"{log} says nothing of the run"
        time.sleep(0.1)
