"""Several heads, multihead fine-tuning and replay, with ``--peft``.

All heads share the adapters; heads, weights and pseudolabels do what an equivalent run without them does.
"""

import itertools
import unittest.mock

import ase.io
import pytest
import torch
from combined import PEFT, adapters, assert_same, differ, fine_tune, train_only
from mace.modules import ScaleShiftMACE
from releases import since
from runs import E0S, MOLECULE, reach_training, write_inputs
from safetensors.torch import load_file
from tiny import batch, configurations, predict, tiny_mace

pytestmark = pytest.mark.usefixtures("double_precision")

OTHER_E0S = "{1: -0.9, 6: -1.5, 8: -3.1}"
# everything in one batch; the moving average and the learning rate are those that MACE sets for replay otherwise
REPLAY = {"multiheads_finetuning": True, "force_mh_ft_lr": True, "lr": 0.01, "batch_size": 16, "clip_grad": "None"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Beside the inputs: structures for replay with labels (``pt.xyz``), and without."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    for part, seed in {"pt": 11, "pt_valid": 12}.items():
        structures = configurations(8 if part == "pt" else 3, MOLECULE, seed=seed)
        ase.io.write(folder / f"{part}.xyz", structures)
        ase.io.write(folder / f"{part}_unlabelled.xyz", strip(structures))
    return folder


@pytest.fixture(scope="module")
def start(inputs) -> dict:
    """The option of runs that start from the same adapter: ``--seed`` alone does not do that for other readouts."""
    return {"peft_adapter": fine_tune(inputs, "start").adapter()}


def strip(structures: list) -> list:
    stripped = [atoms.copy() for atoms in structures]
    for atoms in stripped:
        del atoms.info["REF_energy"], atoms.arrays["REF_forces"]
    return stripped


def label(folder, model, parts=("pt", "pt_valid")) -> None:
    """Write ``*_labelled.xyz`` with the model's own energies and forces."""
    for part in parts:
        structures = ase.io.read(folder / f"{part}_unlabelled.xyz", ":")
        for atoms in structures:
            energy, forces = predict(model, [atoms])
            atoms.info["REF_energy"], atoms.arrays["REF_forces"] = energy.item(), forces.numpy()
        ase.io.write(folder / f"{part}_labelled.xyz", structures)


def replay(folder, suffix: str = "") -> dict:
    """Options for replay of one of the sets of files above."""
    return REPLAY | {"pt_train_file": folder / f"pt{suffix}.xyz", "pt_valid_file": folder / f"pt_valid{suffix}.xyz"}


# --- heads ------------------------------------------------------------------------------------------------------------


def test_two_heads_of_the_same_data_are_one_head_of_twice_the_data(inputs, start, tmp_path):
    head = {"train_file": str(inputs / "train.xyz"), "valid_file": str(inputs / "valid.xyz"), "E0s": E0S[MOLECULE]}
    options = {"batch_size": 16, "test_file": None, **start}
    two, given = train_only(inputs, tmp_path / "two", heads={"a": head, "b": head}, E0s=None, **options)
    assert given["model"].heads == ["a", "b"]
    ase.io.write(inputs / "twice.xyz", 2 * ase.io.read(inputs / "train.xyz", ":"))
    one, _ = train_only(inputs, tmp_path / "one", train_file=inputs / "twice.xyz", **options)
    assert_same(adapters(two), adapters(one), 1e-10)
    assert differ(adapters(one), load_file(start["peft_adapter"] / "adapter_model.safetensors"))


# --- replay -----------------------------------------------------------------------------------------------------------


def test_both_heads_start_as_the_foundation(inputs):
    """``pt_head`` with its E0s, the other with those that are given."""
    model = reach_training(inputs, **PEFT, **replay(inputs))["model"]
    foundation = torch.load(inputs / "foundation.model", weights_only=False)
    assert model.heads == ["pt_head", "Default"]
    assert model.atomic_energies_fn.atomic_energies.tolist() == [[-1.0, -2.0, -3.0], [-0.7, -1.9, -2.6]]
    for head, shift in [("pt_head", 0), ("Default", 4 * 0.3 + 0.1 + 0.4)]:
        structures = configurations(2, MOLECULE, seed=7)
        expected = predict(foundation, structures)
        for atoms in structures:
            atoms.info["head"] = head
        energies, forces = predict(model, structures)
        torch.testing.assert_close(energies, expected[0] + shift, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(forces, expected[1], rtol=1e-12, atol=1e-12)


def test_replay_of_weight_0_is_the_fine_tune_without_replay(inputs, start, tmp_path):
    """Half of the structures weigh nothing: the other half has twice the weight, so that their gradients agree."""
    structures = ase.io.read(inputs / "pt.xyz", ":")
    for atoms in structures:
        atoms.info["config_energy_weight"] = atoms.info["config_forces_weight"] = 0.0
    ase.io.write(inputs / "pt_weightless.xyz", structures)
    options = replay(inputs) | start
    weightless = {"pt_train_file": inputs / "pt_weightless.xyz"}
    doubled = {"energy_weight": 2.0, "forces_weight": 20.0}
    run, _ = train_only(inputs, tmp_path / "weightless", **options | doubled | weightless)
    alone = {"multiheads_finetuning": False, "loss": "universal", "batch_size": 8, "pt_train_file": None,
             "pt_valid_file": None}
    without, _ = train_only(inputs, tmp_path / "without", **options | alone, energy_weight=1.0, forces_weight=10.0)
    assert_same(adapters(run), adapters(without), 1e-8)
    weighty, _ = train_only(inputs, tmp_path / "weighty", **options | doubled)
    assert differ(adapters(weighty), adapters(run))


def test_heads_may_have_keys_of_their_own(inputs, start, tmp_path):
    structures = ase.io.read(inputs / "pt.xyz", ":") + ase.io.read(inputs / "pt_valid.xyz", ":")
    for atoms in structures:
        atoms.info["PT_energy"], atoms.arrays["PT_forces"] = atoms.info["REF_energy"], atoms.arrays["REF_forces"]
    ase.io.write(inputs / "pt_keys.xyz", strip(structures[:8]))
    ase.io.write(inputs / "pt_valid_keys.xyz", strip(structures[8:]))
    heads = {"Default": {"train_file": str(inputs / "train.xyz"), "valid_file": str(inputs / "valid.xyz")},
             "pt_head": {"info_keys": {"energy": "PT_energy"}, "arrays_keys": {"forces": "PT_forces"}}}
    run, _ = train_only(inputs, tmp_path / "heads", heads=heads, test_file=None, **replay(inputs, "_keys"),
                        **start)
    expected, _ = train_only(inputs, tmp_path / "plain", **replay(inputs), **start)
    assert_same(adapters(run), adapters(expected), 1e-10)


def test_a_replay_run_leaves_both_heads(inputs, tmp_path):
    """With the options that go with it; the readouts train along and differ in the end."""
    ratio = {"real_pt_data_ratio_threshold": 2.0} if since("0.3.14") else {}
    options = replay(inputs) | ratio | {"batch_size": 4, "start_swa": 1, "peft_train_also": "readouts.*"}
    run = fine_tune(inputs, tmp_path, "--swa", **options, weight_pt_head=0.5, skip_evaluate_heads="Default",
                    peft="elora")
    assert "(losses of the head Default, by which MACE chooses)" in run.log
    assert ("increasing the number of configurations in the fine-tuning heads by 2" in run.log) == bool(ratio)
    assert "Skipping evaluation for heads: ['Default']" in run.log
    training = run.adapter_config(stage_two=True)["training"]
    assert training["errors"].keys() == {"train pt_head", "valid pt_head", "test Default"}
    assert training["heads"]["pt_head"]["train_file"] == ["pt.xyz"] and training["options"]["weight_pt_head"] == 0.5
    assert run.model().heads == ["pt_head", "Default"]
    pt, own = run.model(stage_two=True).readouts[0].linear.weight.view(-1, 2).T
    assert not torch.allclose(pt, own, rtol=1e-3)


# --- pseudolabels -----------------------------------------------------------------------------------------------------


def check_pseudolabels(folder, foundation, tmp_path, **options) -> str:
    """Replay with pseudolabels is replay with labels that the foundation gives. Returns the log."""
    label(folder, foundation)
    unlabelled = replay(folder) | {"pt_train_file": folder / "pt_unlabelled.xyz"}
    run, _ = train_only(folder, tmp_path / "run", **unlabelled, **options, pseudolabel_replay=True)
    labelled, _ = train_only(folder, tmp_path / "labelled", **replay(folder, "_labelled"), **options)
    assert_same(adapters(run), adapters(labelled), 1e-6)  # the file has 8 decimals
    return run.log


@pytest.mark.since("0.3.14")
def test_pseudolabels_come_from_the_foundation(inputs, start, tmp_path):
    """Also where the run starts from an adapter."""
    foundation = torch.load(inputs / "foundation.model", weights_only=False)
    log = check_pseudolabels(inputs, foundation, tmp_path, **start)
    assert "Replay: 8 structures without labels take their pseudolabels with weight 1" in log


@pytest.mark.since("0.3.14")
def test_pseudolabels_come_from_a_foundation_of_another_dtype(inputs, tmp_path):
    foundation = tiny_mace(dtype=torch.float32)
    folder = write_inputs(tmp_path, MOLECULE, foundation)
    for file in inputs.glob("pt*.xyz"):
        (folder / file.name).write_bytes(file.read_bytes())
    log = check_pseudolabels(folder, foundation.double(), tmp_path)
    assert "Error generating pseudolabels" not in log


@pytest.mark.since("0.3.14")
def test_structures_that_get_no_pseudolabels_stop_the_run(inputs, capsys):
    """MACE goes on where it cannot label a batch: as one without memory, here."""
    unlabelled = replay(inputs) | {"pt_train_file": inputs / "pt_unlabelled.xyz", "batch_size": 4}
    calls = itertools.count()

    def forward(self, *args, **kwargs):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *args, **kwargs)

    original = ScaleShiftMACE.forward
    with unittest.mock.patch.object(ScaleShiftMACE, "forward", forward), pytest.raises(SystemExit):
        reach_training(inputs, **PEFT, **unlabelled, pseudolabel_replay=True)
    message = capsys.readouterr().err
    assert "left 4 of 8 structures without labels" in message and "--batch_size" in message


@pytest.mark.since("0.3.14")
def test_pseudolabels_come_from_the_head_that_is_trained(inputs, tmp_path):
    foundation = tiny_mace(heads=("pt_head", "other"))
    with torch.no_grad():
        foundation.atomic_energies_fn.atomic_energies[1] += 0.5
    folder = write_inputs(tmp_path, MOLECULE, foundation)
    for file in inputs.glob("pt*.xyz"):
        (folder / file.name).write_bytes(file.read_bytes())
    check_pseudolabels(folder, foundation, tmp_path, foundation_head="other")


@pytest.mark.since("0.3.15")
def test_pseudolabels_weigh_1_where_the_file_has_no_label(inputs, tmp_path):
    """A weight that it gives to a label of its own stays; and stresses are labels if they are asked for."""
    structures = configurations(3, MOLECULE, seed=11, periodic=True)
    del structures[0].info["REF_energy"], structures[1].arrays["REF_forces"]
    structures[2].info["config_energy_weight"] = 0.0
    ase.io.write(tmp_path / "pt.xyz", structures)
    options = replay(inputs) | {"pt_train_file": tmp_path / "pt.xyz", "batch_size": 4, "pseudolabel_replay": True}
    given = reach_training(inputs, **PEFT, **options, pseudolabel_replay_compute_stress=True)
    held = [item for item in given["train_loader"].dataset if given["model"].heads[item.head] == "pt_head"]
    assert [item.energy_weight.item() for item in held] == [1, 1, 0]
    assert [item.forces_weight.item() for item in held] == [1, 1, 1]
    assert [item.stress_weight.item() for item in held] == [1, 1, 1]
    foundation = torch.load(inputs / "foundation.model", weights_only=False)
    output = foundation(batch(foundation, structures), compute_stress=True)
    for name in ("energy", "forces", "stress"):
        labels = torch.cat([torch.atleast_1d(getattr(item, name)) for item in held])
        torch.testing.assert_close(labels, output[name].detach(), rtol=1e-6, atol=1e-6)
