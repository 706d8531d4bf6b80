"""First mistakes with MACE's own options: one line with the value, the cause and the remedy, and no training."""

import re

import ase.io
import h5py
import pytest
from ase import Atoms
from mace.cli import run_train
from releases import since
from runs import MOLECULE, train_here, write_inputs
from tiny import configurations

PEFT = {"peft": "elora", "peft_rank": 1}
NUMBERS = "[1, 6, 8]"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    structures = configurations(4, MOLECULE)
    (folder / "empty.xyz").write_text("")
    (folder / "text.xyz").write_text("these are no structures\n")
    (folder / "half.xyz").write_text((folder / "train.xyz").read_text()[:-200])
    (folder / "text.h5").write_text("this is no HDF5 file")
    h5py.File(folder / "empty.h5", "w").close()
    (folder / "nothing").mkdir()
    (folder / "lmdb").mkdir()
    (folder / "lmdb/data.aselmdb").write_text("")
    ase.io.write(folder / "alone.xyz", [Atoms("H", info={"config_type": "IsolatedAtom", "REF_energy": -0.5})])
    ase.io.write(folder / "one.xyz", structures[:1])
    ase.io.write(folder / "new_element.xyz", configurations(3, "NH3"))
    ase.io.write(folder / "alone_twice.xyz", structures + [
        Atoms("H", info={"config_type": "IsolatedAtom", "REF_energy": energy}) for energy in (-0.5, -0.9)])
    for name, change in SPOILT.items():
        spoilt = [atoms.copy() for atoms in structures]
        change(spoilt[-1])
        ase.io.write(folder / f"{name}.xyz", spoilt)
    for atoms in structures:
        atoms.info["DFT_energy"], atoms.arrays["DFT_forces"] = atoms.info.pop("REF_energy"), atoms.arrays.pop(
            "REF_forces")
    ase.io.write(folder / "other_keys.xyz", structures)
    (folder / "statistics.json").write_text('{"mean": 0.0}')
    return folder


SPOILT = {  # one structure of a file
    "charge": lambda atoms: atoms.info.update(total_charge="neutral"),
    "vector_weight": lambda atoms: atoms.info.update(config_forces_weight=[1.0, 2.0]),
    "no_cell": lambda atoms: atoms.set_pbc(True),
}


def head(**entries) -> str:
    return str({"mine": {"train_file": "train.xyz", "valid_file": "valid.xyz", "E0s": "foundation", **entries}})


OF_HEADS = {"train_file": None, "valid_file": None, "test_file": None, "E0s": None}
H5 = {"valid_file": "text.h5", "test_file": None}
MISTAKES = {
    "no GPU": ({"device": "cuda"}, "--device cuda is not there .* use --device cpu"),
    "no Apple GPU": ({"device": "mps"}, "--device mps is not there .* use --device cpu"),
    "no name": ({"name": ""}, "--name is empty: give one"),
    "no folder": ({"work_dir": ""}, "--work_dir is empty: give one, or leave it out"),
    "log level": ({"log_level": "info"}, "--log_level info is no level of logs: use DEBUG"),
    "no training file": ({"train_file": None}, "no --train_file for the head Default"),
    "missing training file": ({"train_file": "nowhere.xyz"}, "--train_file nowhere.xyz does not exist"),
    "missing validation file": ({"valid_file": "nowhere.xyz"}, "--valid_file nowhere.xyz does not exist"),
    "missing test file": ({"test_file": "nowhere.xyz"}, "--test_file nowhere.xyz does not exist"),
    "empty file": ({"train_file": "empty.xyz"}, "empty.xyz (has no structures|cannot be read)"),
    "text file": ({"train_file": "text.xyz"}, "text.xyz cannot be read"),
    "half a file": ({"train_file": "half.xyz"}, "half.xyz cannot be read"),
    "folder": ({"train_file": "nothing"}, "nothing is a folder without HDF5 or LMDB files"),
    "isolated atoms alone": ({"train_file": "alone.xyz"}, "alone.xyz has isolated atoms alone"),
    "nothing to validate with": ({"train_file": "one.xyz", "valid_file": None},
                                 "no structures to validate with"),
    "valid_fraction": ({"valid_file": None, "valid_fraction": 1.5}, "--valid_fraction 1.5 leaves nothing"),
    "keys": ({"train_file": "other_keys.xyz"}, "no structure of .* its keys are DFT_energy, DFT_forces"),
    "one key": ({"energy_key": "REF_enrgy"}, "--energy_key REF_enrgy: no structure .* REF_energy"),
    "key of the E0s": ({"energy_key": "REF_enrgy", "E0s": "average"},
                       "--E0s average .* the key REF_enrgy .*: its keys are REF_energy, REF_forces"),
    "key of the isolated atoms": ({"energy_key": "REF_enrgy", "E0s": None},
                                  "without --E0s, .* the key REF_enrgy .*: its keys are REF_energy, REF_forces"),
    "validation keys": ({"valid_file": "other_keys.xyz"}, "its keys are DFT_energy, DFT_forces"),
    "element of the validation set": ({"valid_file": "new_element.xyz"}, "the run has N, which the foundation does"),
    "element of the test set": ({"test_file": "new_element.xyz"}, "the test set of the head Default has N"),
    "no E0s": ({"E0s": None}, "no --E0s is given, and the isolated atoms .* have none"),
    "E0s": ({"E0s": "{1: -13}"}, "the --E0s of the head Default have H, and the data have C O as well"),
    "E0s of a foundation with another element": ({"E0s": "foundation", "train_file": "new_element.xyz"},
                                                 "the run has N, which the foundation does not know"),
    "average of HDF5": (H5 | {"train_file": "text.h5", "E0s": "average", "atomic_numbers": NUMBERS},
                        "--E0s average, and the training files .* are not XYZ"),
    "HDF5 without elements": (H5 | {"train_file": "text.h5"}, "text.h5 needs --atomic_numbers"),
    "HDF5 without validation": (H5 | {"train_file": "text.h5", "valid_file": None}, "text.h5 needs a --valid_file"),
    "HDF5 with XYZ": ({"train_file": "text.h5", "atomic_numbers": NUMBERS}, "--valid_file .* is of another kind"),
    "HDF5 as test": ({"test_file": "text.h5"}, "--test_file .* would not be read"),
    "no HDF5": (H5 | {"train_file": "text.h5", "atomic_numbers": NUMBERS}, "text.h5 cannot be read"),
    "empty HDF5": ({"train_file": "empty.h5", "valid_file": "empty.h5", "test_file": None, "atomic_numbers": NUMBERS},
                   "empty.h5 cannot be read"),
    "empty LMDB": ({"train_file": "lmdb", "valid_file": "lmdb", "test_file": None, "atomic_numbers": NUMBERS},
                   "cannot be read"),
    "elements": ({"atomic_numbers": "1, 6, 8 and so on"}, "--atomic_numbers .* is no list of atomic numbers"),
    "too few elements": ({"atomic_numbers": "[1, 6]", "E0s": "foundation"}, "set of the head Default has O"),
    "statistics": ({"statistics_file": "statistics.json"}, "--statistics_file .* cannot be used"),
    "no statistics": ({"statistics_file": "nowhere.json"}, "--statistics_file nowhere.json does not exist"),
    "test_dir": ({"test_file": None, "test_dir": "nowhere"}, "--test_dir nowhere is not a folder"),
    "test_dir without sets": ({"test_file": None, "test_dir": "nothing"}, "nothing has no file that ends on _test.h5"),
    "several processes for tests": ({"test_file": None, "test_dir": "nothing", "multi_processed_test": True},
                                    "--multi_processed_test True fails"),
    "weights of types": ({"config_type_weights": "surface=2"}, "--config_type_weights surface=2 is no dictionary"),
    "weights of types beside HDF5": (H5 | {"train_file": "text.h5", "atomic_numbers": NUMBERS,
                                           "config_type_weights": "{'Default': 2.0}"},
                                     "--config_type_weights .* does not act on text.h5"),
    "heads": ({"heads": "mine"}, "--heads mine is no dictionary of heads"),
    "entry of heads": (OF_HEADS | {"heads": head(trainfile="a.xyz")}, "'trainfile' .* did you mean train_file"),
    "weight of heads": (OF_HEADS | {"heads": head(weight=2.0)}, "'weight' for the head mine, which MACE does not read"),
    "test file beside heads": (OF_HEADS | {"heads": head(), "test_file": "test.xyz"}, "is not read with --heads"),
    "E0s of heads": (OF_HEADS | {"heads": head(E0s={1: -13.0})}, "the --E0s of the head mine have H, .* C O as well"),
    "head of the foundation": ({"foundation_head": "other"}, "--foundation_head other is not in the foundation model"),
    "batch size": ({"batch_size": 0}, "--batch_size 0 is not a number from 1 up"),
    "learning rate": ({"lr": -0.1}, "--lr -0.1 is not a number above 0"),
    "weight": ({"forces_weight": "nan"}, "--forces_weight nan is not a number from 0 up"),
    "weight of replay": ({"weight_pt_head": 0.5}, "--weight_pt_head 0.5 has no effect without --pt_train_file"),
    "no learning": ({"lr": 0}, "--lr 0.0 is not a number above 0"),
    "no gradient": ({"clip_grad": 0}, "--clip_grad 0.0 is not a number above 0"),
    "no epoch": ({"max_num_epochs": -3}, "--max_num_epochs -3 is not a number from 0 up"),
    "average of weights": ({"ema_decay": 1.5}, "--ema_decay 1.5 is not a number from 0 up to 1"),
    "rising rate": ({"lr_factor": 1.5}, "--lr_factor 1.5 is not a number above 0 to 1"),
    "no forces": ({"compute_forces": False}, "--compute_forces False leaves --loss weighted no forces"),
    "no weight": ({"energy_weight": 0, "forces_weight": 0}, "no label of a weight above 0 .* --energy_weight 0 and"),
    "no weight in stage two": ({"flags": ["--swa"], "swa_energy_weight": 0, "swa_forces_weight": 0},
                               "no label of a weight above 0 .* --swa_energy_weight 0 and --swa_forces_weight 0"),
    "no weight of a type": ({"config_type_weights": "{'Default': 0.0}"},
                            "no label of a weight above 0 .*--config_type_weights"),
    "weight of no type": ({"config_type_weights": "{'surface': 5.0}"},
                          "surface, a config_type that no structure .* has Default"),
    "two isolated atoms": ({"train_file": "alone_twice.xyz", "E0s": None}, "of H with the energies -0.5 and -0.9 eV"),
    "weight of forces": ({"test_file": "vector_weight.xyz"}, "the weight forces of structure 3 of .* give a number"),
    "cell": ({"train_file": "no_cell.xyz"}, "structure 3 of .*no_cell.xyz is periodic, and has no cell"),
    "one test set of two heads": (OF_HEADS | {"heads": str({name: {
        "train_file": "train.xyz", "valid_file": "valid.xyz", "test_file": "test.xyz", "E0s": "foundation"}
        for name in "ab"})}, "the test_file test.xyz for each head"),
    "key of one head": (OF_HEADS | {"heads": str({name: {
        "train_file": "train.xyz", "valid_file": "valid.xyz", "E0s": "foundation", "energy_key": key}
        for name, key in (("a", "REF_energy"), ("b", "REF_enrgy"))})},
        "--energy_key REF_enrgy: no structure of the training set of the head b"),
    "replay of another set": ({"pt_train_file": "train.xyz", "multiheads_finetuning": True,
                               "foundation_model": "small"}, "is not read with --foundation_model small"),
    "replay of HDF5": ({"pt_train_file": "text.h5", "multiheads_finetuning": True}, "text.h5 is not an XYZ file"),
    "replay": ({"pt_train_file": "train.xyz"}, "--pt_train_file .* has no effect without --multiheads_finetuning"),
    "average with replay": ({"pt_train_file": "train.xyz", "multiheads_finetuning": True, "E0s": "average"},
                            "--E0s average cannot go with --multiheads_finetuning"),
    "stage two of forces": ({"loss": "forces_only", "start_swa": 1}, "--loss forces_only has no stage two"),
    "learning rate of no part": ({"lr_params_factors": '{"readout_lr_factor": 0}'} if since("0.3.15") else {"lr": -1},
                                 "--(lr_params_factors has 'readout_lr_factor', .* did you mean readouts_lr|lr)"),
    "learning rates of parts": ({"lr_params_factors": "{products: 2}"} if since("0.3.15") else {"lr": -1},
                                "--(lr_params_factors .* is no dictionary|lr)"),
}
if since("0.3.14"):
    MISTAKES |= {
        "charge": ({"test_file": "charge.xyz"}, "total_charge of structure 3 of .*charge.xyz is 'neutral'"),
        "key of a charge": ({"total_charge_key": "charge"}, "--total_charge_key charge: no structure of .* has it"),
    }


@pytest.mark.parametrize("options, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(inputs, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(run_train.tools, "train", lambda **given: pytest.fail("it trains"))
    capsys.readouterr()
    given = {name: value for name, value in options.items() if name != "flags"}
    with pytest.raises(SystemExit) as stopped:
        train_here(inputs, *options.get("flags", []), **PEFT | {"work_dir": tmp_path} | given)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("mace_run_train: error: ") and said.count("\n") == 1
    assert re.search(words, said), said


def test_what_mace_fails_on_before_the_training_is_one_line(inputs, tmp_path, capsys, monkeypatch):
    """Its traceback goes to the debug log."""
    monkeypatch.setattr(run_train, "get_avg_num_neighbors", lambda *given: {}["no such neighbour"])
    with pytest.raises(SystemExit) as stopped:
        train_here(inputs, **PEFT | {"work_dir": tmp_path})
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "MACE failed before the training (KeyError: 'no such neighbour')" in said
    (log,) = (tmp_path / "logs").glob("*_debug.log")
    assert "Traceback" in log.read_text()
