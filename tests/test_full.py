"""``--peft full`` is MACE's own fine-tuning, but for what ``--peft`` puts right."""

import re

import pytest
import torch
from runs import Run, around_training, fork, relabel, train_here, write_inputs
from tiny import configurations, predict

from mace_peft import PeftConfig, calculator, disable_adapter, load_adapter, merge, set_strength, trainable_parameters
from mace_peft.inspect.info import info

pytestmark = pytest.mark.usefixtures("uncompiled")
EPOCHS = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return relabel(write_inputs(tmp_path_factory.mktemp("full")))


def weights_after(folder, name, *flags, **options) -> tuple[dict, dict]:
    """All parameters of the model after the epochs of a run, and the settings of each parameter's optimizer group."""
    found = {}

    def note(train, **arguments):
        progress = train(**arguments)
        names = {parameter: key for key, parameter in arguments["model"].named_parameters()}
        found["weights"] = {key: parameter.detach().clone() for parameter, key in names.items()}
        found["groups"] = {names[parameter]: (group["name"], group["lr"], group["weight_decay"])
                           for group in arguments["optimizer"].param_groups for parameter in group["params"]}
        return progress

    with around_training(note):  # MACE by itself trains with the foundation's E0s, whatever is asked for
        train_here(folder, *flags, work_dir=folder / name, max_num_epochs=EPOCHS, E0s="foundation", **options)
    return found["weights"], found["groups"]


@pytest.mark.parametrize("options", [{}, {"lr": 0.002, "weight_decay": 0.1, "loss": "universal"}],
                         ids=["defaults", "others"])
@pytest.mark.parametrize("fast", [False, True], ids=["MACE's arithmetic", "fast"])
def test_its_steps_are_those_of_mace_without_peft(inputs, fast, options):
    expected, groups_of_mace = weights_after(inputs, f"mace{len(options)}{fast}", **options)
    found, groups = weights_after(inputs, f"full{len(options)}{fast}", peft="full", peft_fast=fast, **options)
    assert groups == {name: group for name, group in groups_of_mace.items() if expected[name].numel()}
    assert found.keys() == expected.keys()
    before = torch.load(inputs / "foundation.model", weights_only=False)
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= 1e-10 * weight.norm(), name
        assert name not in groups or not torch.equal(weight, before.get_parameter(name)), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with both stages and a moving average, whose E0s are fitted and train along."""
    folder = relabel(write_inputs(tmp_path_factory.mktemp("finished")))
    options = {"start_swa": 2, "max_num_epochs": 3, "E0s": "average", "lr": None, "peft": "full"}
    return fork(folder, "--swa", "--ema", **options)


def test_a_run_says_what_trains_and_at_which_rate(finished):
    assert finished.returncode == 0, finished.stderr
    assert "Learning rate 0.005, which was best for full fine-tuning in sweeps" in finished.log
    size = sum(p.numel() for p in torch.load(finished.folder / "foundation.model", weights_only=False).parameters())
    trained, base = re.search(r"Trainable: ([\d,]+) parameters, 99.9 % of the base's ([\d,]+)", finished.log).groups()
    assert int(trained.replace(",", "")) == size + 3  # E0s; the base has what MACE makes of the radial basis, too
    assert int(base.replace(",", "")) == size + 4


@pytest.mark.parametrize("stage_two", [False, True])
def test_its_directory_and_the_foundation_are_the_trained_model(finished, stage_two):
    structures = configurations(2, seed=7)
    expected = predict(finished.model(stage_two), structures)
    foundation = torch.load(finished.folder / "foundation.model", weights_only=False)
    before = predict(foundation, structures)
    model = load_adapter(foundation, finished.adapter(stage_two))
    assert model.peft_config == PeftConfig("full", train_also="atomic_energies_fn.atomic_energies")
    torch.testing.assert_close(predict(model, structures), expected, rtol=1e-10, atol=1e-10)
    assert set(finished.adapter_tensors(stage_two)) == set(trainable_parameters(model))
    with disable_adapter(model):
        torch.testing.assert_close(predict(model, structures)[1], before[1], rtol=1e-10, atol=1e-10)
    half = predict(set_strength(model, 0.5), structures)[1]
    assert all((half - end[1]).norm() > 1e-4 * half.norm() for end in (before, expected))
    torch.testing.assert_close(predict(merge(set_strength(model, 1)), structures), expected, rtol=1e-10, atol=1e-10)


def test_other_tools_read_its_directory(finished):
    said = info(str(finished.adapter()))
    assert re.search(r"^method +full$", said, re.M)
    assert re.search(r"^trains along +every parameter, atomic_energies_fn.atomic_energies$", said, re.M)
    assert re.search(r"^parameters +[\d,]+ \(float64\), 99.9 % of the base's [\d,]+$", said, re.M)
    card = (finished.adapter() / "README.md").read_text()
    assert "# A fine-tuned MACE model: full fine-tuning of `foundation.model`" in card
    atoms = configurations(1, seed=7)[0]
    atoms.calc = calculator(str(finished.folder / "foundation.model"), finished.adapter())
    assert atoms.get_potential_energy() == pytest.approx(predict(finished.model(), [atoms])[0].item(), abs=1e-10)


def test_a_run_goes_on_from_its_directory_and_from_its_checkpoint(finished, tmp_path):
    options = {"start_swa": 2, "E0s": "average", "lr": None, "peft": "full"}
    run = fork(finished.folder, "--swa", "--ema", "--restart_latest", max_num_epochs=4, **options)
    assert run.returncode == 0, run.stderr
    assert "to go on with epoch 3" in run.log
    train_here(finished.folder, work_dir=tmp_path, peft_adapter=finished.adapter(), E0s="average")
    assert "0 of their tensors are new" in Run(tmp_path).log


def test_a_restart_ends_as_the_run_that_was_not_cut_off(inputs, tmp_path):
    train_here(inputs, work_dir=tmp_path / "whole", max_num_epochs=3, peft="full")
    for epochs in (1, 3):
        train_here(inputs, "--restart_latest", work_dir=tmp_path / "parts", max_num_epochs=epochs, peft="full")
    whole, parts = (Run(tmp_path / name).restart()["resume"]["weights"] for name in ("whole", "parts"))
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name
