"""On cuEquivariance's layers adapters do and learn what they do on MACE's own."""

import copy
import functools

import pytest
import torch
from mace import modules
from mace.calculators import MACECalculator
from mace.cli import convert_cueq_e3nn, convert_e3nn_cueq
from runs import train_here, write_inputs
from tiny import batch, configurations, predict, randomise, tiny_mace

from mace_peft import (
    PeftConfig,
    PeftError,
    eject,
    inject,
    load_adapter,
    save_adapter,
    set_strength,
    trainable_parameters,
)
from mace_peft.train.cuequivariance import accelerate, copy_trained

pytestmark = pytest.mark.usefixtures("double_precision", "uncompiled")


@functools.cache
def foundation(polar=False, **options):
    """MACE converts larger ones in ten seconds."""
    if polar:
        options["model_class"] = modules.PolarMACE
    return tiny_mace(max_ell=1, **options)


converted = functools.cache(lambda **options: convert_e3nn_cueq.run(foundation(**options)))
METHODS = ("mmea", "elora", "scales")
EVERY = [(method, targets) for method in METHODS for targets in ("products", "published")]
EVERY += [("elora+scales", "all"), ("gates", "all")]
PARTS = [(method, "interactions.*.skip_tp") for method in (*METHODS, "gates")]
PARTS += [(method, "products.0.symmetric_contractions.contractions.1") for method in ("elora", "scales")]


def new(method, targets, train_also=None, **options):
    """A model with random adapters."""
    config = PeftConfig(method, rank=None if method == "scales" else 2, targets=targets, train_also=train_also)
    return randomise(inject(copy.deepcopy(foundation(**options)), config))


def on_cueq(model, **options):
    return accelerate(model, eject(copy.deepcopy(model)), lambda base: copy.deepcopy(converted(**options)))


def learn(model):
    """Energies, forces, and the gradient of a loss of both with respect to everything that trains."""
    trained = trainable_parameters(model)
    model.zero_grad()
    output = model(batch(model, configurations(2)), training=True, compute_force=True)
    (output["energy"].pow(2).sum() + output["forces"].pow(2).sum()).backward()
    return output["energy"], output["forces"], {name: parameter.grad.flatten() for name, parameter in trained.items()}


@pytest.mark.parametrize("method, targets", [*EVERY, *PARTS])
def test_energies_forces_and_gradients_are_those_of_the_plain_model(method, targets):
    model = new(method, targets, train_also="readouts.*")
    plain, accelerated = learn(model), learn(on_cueq(model))
    torch.testing.assert_close(accelerated, plain, rtol=1e-10, atol=1e-12)
    assert plain[1].norm() > 1e-3


NON_LINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
OTHERS = {
    "max_L 0": ("0.3.13", {"max_L": 0}),
    "agnostic product": ("0.3.14", {"use_agnostic_product": True}),
    "all paths": ("0.3.14", {"use_reduced_cg": False}),
    "non-linear": ("0.3.14", {"first": NON_LINEAR, "later": NON_LINEAR}),
    # keeps some of e3nn's linear layers, in e3nn's layout
    "PolarMACE": ("0.3.16", {"polar": True, "add_local_electron_energy": True, "atomic_multipoles_max_l": 1,
                             "field_feature_max_l": 1}),
}


@pytest.mark.parametrize("method, targets", [("gates", "all"), ("elora+scales", "all")])
@pytest.mark.parametrize("options", [pytest.param(options, marks=pytest.mark.since(since), id=name)
                                     for name, (since, options) in OTHERS.items()])
def test_other_bases_too(options, method, targets):
    model = randomise(new(method, targets, **options), scale=0.1)
    torch.testing.assert_close(learn(on_cueq(model, **options)), learn(model), rtol=1e-9, atol=1e-12)


def test_what_it_learns_goes_back():
    model, other = new("elora", "published", train_also="readouts.*"), new("elora", "published", "readouts.*")
    randomise(other, seed=1)
    assert copy_trained(on_cueq(other), model) is model
    torch.testing.assert_close(predict(model, configurations(2)), predict(other, configurations(2)), rtol=0, atol=0)


def test_a_contraction_that_trains_along_is_refused():
    with pytest.raises(PeftError, match="weights_max trains along.*leave it out of train_also"):
        on_cueq(new("mmea", "products", train_also="products.0.symmetric_contractions.*"))


def test_a_base_that_mace_cannot_convert_is_refused():
    model = inject(tiny_mace(max_ell=1, correlation=1), PeftConfig("mmea", rank=2, targets="products"))
    with pytest.raises(PeftError, match="MACE cannot convert this model to cuEquivariance .*: leave out --enable_cueq"):
        accelerate(model, eject(copy.deepcopy(model)), convert_e3nn_cueq.run)


# --- models that have been trained ------------------------------------------------------------------------------------


def test_gates_go_to_cuequivariance_with_the_model_and_back(tmp_path):
    model = set_strength(new("gates", "all"), 0.5)
    torch.save(model, tmp_path / "adapted.model")
    structures = configurations(2)
    for structure in structures:
        structure.calc = MACECalculator(model_paths=[tmp_path / "adapted.model"], enable_cueq=True, device="cpu",
                                        default_dtype="float64")
    energies, forces = predict(model, structures)
    assert [atoms.get_potential_energy() for atoms in structures] == pytest.approx(energies.tolist(), abs=1e-10)
    got = torch.cat([torch.as_tensor(atoms.get_forces()) for atoms in structures])
    torch.testing.assert_close(got, forces, rtol=0, atol=1e-10)

    back = convert_cueq_e3nn.run(structures[0].calc.models[0])
    torch.testing.assert_close(predict(back, structures), (energies, forces), rtol=0, atol=1e-10)
    save_adapter(back, tmp_path / "adapter")


@pytest.mark.parametrize("method, targets", [("elora", "products"), ("mmea", "published")])
def test_updates_do_not_go_to_cuequivariance_unmerged(method, targets):
    with pytest.raises(PeftError, match="merge them into its weights"):
        convert_e3nn_cueq.run(new(method, targets))


# --- mace_run_train ---------------------------------------------------------------------------------------------------

CASES = {
    "enable_cueq": {"peft": "mmea", "peft_rank": 2, "peft_targets": "products", "peft_train_also": "readouts.*",
                    "peft_keep": "auto", "peft_keep_weight": 100},
    "only_cueq": {"peft": "elora", "peft_rank": 2, "peft_targets": "published"},
}
FLAGS, OPTIONS = ("--ema", "--swa"), {"start_swa": 1, "max_num_epochs": 2}


@pytest.fixture(scope="module", params=[
    "enable_cueq", pytest.param("only_cueq", marks=pytest.mark.since("0.3.14"))])
def runs(request, tmp_path_factory):
    """An option, and the same fine-tune on MACE's layers and on cuEquivariance's by that option."""
    folders = [write_inputs(tmp_path_factory.mktemp(name), foundation=foundation()) for name in ("plain", "cueq")]
    options = CASES[request.param] | OPTIONS
    return (request.param, train_here(folders[0], *FLAGS, **options),
            train_here(folders[1], *FLAGS, **options, **{request.param: True}))


@pytest.mark.parametrize("stage_two", [False, True], ids=["stage_one", "stage_two"])
def test_a_run_on_cuequivariance_gives_the_plain_model(runs, stage_two):
    _, plain, cueq = runs
    assert "products.0.symmetric_contractions.weight" in cueq.checkpoint(stage_two)["base"]
    torch.testing.assert_close(cueq.adapter_tensors(stage_two), plain.adapter_tensors(stage_two), rtol=1e-9, atol=1e-11)
    model = cueq.model(stage_two)
    assert type(model).__bases__ == type(plain.model(stage_two)).__bases__
    torch.testing.assert_close(model.state_dict(), plain.model(stage_two).state_dict(), rtol=1e-9, atol=1e-11)
    loaded = load_adapter(copy.deepcopy(foundation()), cueq.adapter(stage_two))
    both = [predict(model, configurations(2)) for model in (loaded, model)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-10)


def test_a_restart_goes_on_with_the_same_backend_only(runs, capsys):
    option, _, cueq = runs
    options = {**CASES[option], **OPTIONS, "max_num_epochs": 3}
    with pytest.raises(SystemExit):
        train_here(cueq.folder, *FLAGS, "--restart_latest", **options)
    assert "was made with --enable_cueq True: restart with the options" in capsys.readouterr().err
    train_here(cueq.folder, *FLAGS, "--restart_latest", **options, **{option: True})
    assert 2 in cueq.checkpoints(stage_two=True)
