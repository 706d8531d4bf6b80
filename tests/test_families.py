"""Every family of MACE models, and every option that shapes one: adapters work on it, or are refused by name."""

import copy

import mace  # noqa: F401  before e3nn
import numpy as np
import pytest
import torch
from e3nn import o3
from mace import modules
from releases import since
from tiny import assert_close, assert_equal, batch, configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, eject, inject, load_adapter, save_adapter, trainable_parameters
from mace_peft.backbones.foundation import rebuild
from mace_peft.fast.arithmetic import arithmetic_of_mace, fast_arithmetic
from mace_peft.fast.messages import FastProduct, fast_messages

# every kind of adapter on every kind of module
ADAPTERS = [PeftConfig("mmea", rank=2, targets="published"), PeftConfig("gates", rank=2, targets="all"),
            PeftConfig("elora+scales", rank=2, targets="all")]
EACH_ADAPTER = pytest.mark.parametrize("config", ADAPTERS, ids=["mmea-published", "gates-all", "elora-scales-all"])
DENSITY, NON_LINEAR = "RealAgnosticDensityResidualInteractionBlock", "RealAgnosticResidualNonLinearInteractionBlock"
ATTENTION = "RealAgnosticAttResidualInteractionBlock"
STATE = {"total_charge": {"type": "continuous", "in_dim": 1, "emb_dim": 4, "per": "graph"},
         "total_spin": {"type": "categorical", "num_classes": 4, "emb_dim": 4, "per": "graph"}}
EDGES = {"first": NON_LINEAR, "later": NON_LINEAR, "edge_irreps": o3.Irreps("2x0e+2x1o")}

# the options of each family, by the release of mace-torch that brought it
FAMILIES = {
    "0.3.13": {
        "MACE": {"model_class": modules.MACE},
        "scalars only": {"max_L": 0},
        "max_L 2": {"max_L": 2},
        "max_L 3": {"max_L": 3, "max_ell": 3, "correlation": 2},
        "attention": {"later": ATTENTION},
        "attention first": {"first": ATTENTION, "later": ATTENTION},
        "density": {"first": "RealAgnosticDensityInteractionBlock", "later": DENSITY},
        "density residual first": {"first": DENSITY, "later": DENSITY},
        "repulsion": {"pair_repulsion": True},
        "Agnesi": {"distance_transform": "Agnesi"},
        "Soft": {"distance_transform": "Soft"},
        "correlation 1": {"correlation": 1},
        "correlations 1 and 3": {"correlation": [1, 3]},
        "one interaction": {"interactions": 1},
        "three interactions": {"interactions": 3},
    },
    "0.3.14": {
        "non-linear": {"first": NON_LINEAR, "later": NON_LINEAR},
        "agnostic product": {"use_agnostic_product": True},
        "last readout only": {"use_last_readout_only": True},
        "joint embedding": {"embedding_specs": STATE},
        "embedding readout": {"embedding_specs": STATE, "use_embedding_readout": True},
        "no cutoff": {"apply_cutoff": False},
        "reduced paths": {"use_reduced_cg": True},
        "all paths": {"use_reduced_cg": False},
        "SO(3)": {"use_so3": True, "max_L": 0},
        "edge irreps": EDGES,
        # of the shape of MACE-OMOL
        "OMOL": EDGES | {"use_agnostic_product": True, "use_last_readout_only": True, "apply_cutoff": False,
                         "embedding_specs": STATE, "use_embedding_readout": True, "distance_transform": "Agnesi",
                         "readout_cls": getattr(modules, "NonLinearBiasReadoutBlock", None)},
    },
    "0.3.15": {
        "edge irreps first": EDGES | {"use_edge_irreps_first": True},
    },
    "0.3.16": {
        "PolarMACE": {"model_class": getattr(modules, "PolarMACE", None), "add_local_electron_energy": True},
        "PolarMACE, multipoles": {"model_class": getattr(modules, "PolarMACE", None), "atomic_multipoles_max_l": 1,
                                  "field_feature_max_l": 1, "num_recursion_steps": 2, "use_agnostic_product": True},
    },
}
OPTIONS = {name: options for families in FAMILIES.values() for name, options in families.items()}


def families(*names: str) -> list:
    """Values for ``parametrize``: those families, or all, each with the release that it needs."""
    return [pytest.param(name, marks=pytest.mark.since(first)) for first, families in FAMILIES.items()
            for name in families if name in (names or OPTIONS)]


# MACE cannot take these over into a model of fewer elements: it gives each up with this word, or silently
NOT_TAKEN_OVER = {"MACE": "error", "attention": "skip_tp", "attention first": "skip_tp",
                  "three interactions": "shape",
                  "correlations 1 and 3": "products.1.symmetric_contractions|out of range",
                  "PolarMACE": "shape", "PolarMACE, multipoles": "shape"}
NOT_BEFORE_0_3_15 = {
    "max_L 3": "out of range", "correlation 1": "out of range", "one interaction": "out of range|no attribute 'count'",
    "non-linear": "layer0", "edge irreps": "layer0", "OMOL": "layer0", "agnostic product": "out of bounds",
    "last readout only": "linear", "joint embedding": "joint_embedding", "embedding readout": "joint_embedding",
    "no cutoff": "apply_cutoff"}
if not since("0.3.15"):
    NOT_TAKEN_OVER |= NOT_BEFORE_0_3_15
# multipoles on a grid turn with the molecule only roughly, in plain MACE too
ROUGH = {"PolarMACE, multipoles"}
# what an adapter of these cannot change: a charge model that does not enter the energy
UNUSED = {"PolarMACE, multipoles": "local_electron_energy."}


def structures():
    return configurations(1, "CH3OH") + configurations(1, "H2O", seed=1)


def settled(model):
    """Energies and forces once e3nn's compiled code has warmed up: the first call may differ in the last bit."""
    predict(model, structures())
    return predict(model, structures())


@pytest.fixture(scope="module", params=families())
def family(request):
    """Its name, one plain model that tests adapt and leave as it was, and what that predicts."""
    model = tiny_mace(**OPTIONS[request.param])
    return request.param, model, settled(model)


def test_every_interaction_of_mace_is_among_the_families():
    tried = {options.get(which) for options in OPTIONS.values() for which in ("first", "later")}
    tried |= {"RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock"}  # of tiny_mace
    assert set(modules.interaction_classes) <= tried


@EACH_ADAPTER
def test_adapters_work_on_the_family(family, config, tmp_path):
    """They start at the base, move it, turn with the molecule, train, and come back from a copy and a directory."""
    name, model, expected = family
    inject(model, config)
    try:
        assert_equal(settled(model), expected)
        energies, forces = trained = predict(randomise(model, scale=0.3), structures())
        for a, b in zip(trained, expected, strict=True):
            assert (a - b).norm() > 1e-4 * b.norm()

        rotation = o3.rand_matrix(dtype=torch.float64)
        turned = structures()
        for atoms in turned:
            atoms.positions = atoms.positions @ rotation.numpy().T
        if name not in ROUGH:
            assert_close(predict(model, turned), (energies, forces @ rotation.T), 1e-9)

        output = model(batch(model, structures()), training=True, compute_force=True)
        (output["energy"].sum() + output["forces"].pow(2).sum()).backward()
        missed = [key for key, parameter in trainable_parameters(model).items() if parameter.grad is None]
        assert all(key.startswith(UNUSED.get(name, "nothing")) for key in missed)

        assert_close(predict(copy.deepcopy(model), structures()), trained, 1e-12)
        save_adapter(model, tmp_path / "adapter")
        eject(model)
        assert load_adapter(model, tmp_path / "adapter") is model
        assert_close(predict(model, structures()), trained, 1e-12)
    finally:
        eject(model)
    assert_close(predict(model, structures()), expected, 1e-12)


def test_the_family_keeps_its_weights_with_fewer_elements_or_says_that_it_cannot(family):
    """What ``mace_run_train`` and ``load_adapter`` do to a foundation."""
    name, model, _ = family
    water = configurations(1, "H2O", seed=1)
    E0s = [model.atomic_energies_fn.atomic_energies.flatten()[index].item() for index in (0, 2)]
    if name in NOT_TAKEN_OVER:
        with pytest.raises(Exception, match=NOT_TAKEN_OVER[name]):
            rebuild(model, [1, 8], ["Default"], [E0s])
    else:
        assert_close(predict(rebuild(model, [1, 8], ["Default"], [E0s]), water), predict(model, water))


# --- cheaper steps (test_fast.py) ------------------------------------------------------------------------------------


def second_order(model) -> list[torch.Tensor]:
    """Energies, forces, and what a loss of the forces gives every parameter."""
    model.zero_grad()
    output = model(batch(model, configurations(3)), training=True, compute_force=True)
    output["forces"].pow(2).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [output["energy"].detach(), output["forces"].detach(), *gradients]


def test_contractions_by_element_are_the_same(family):
    model = copy.deepcopy(family[1])
    expected = second_order(model)
    with fast_arithmetic():
        found = second_order(model)
        with arithmetic_of_mace():
            assert_equal(second_order(model), expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_equal(second_order(model), expected)


def test_messages_that_copy_less_are_the_same(family):
    model = copy.deepcopy(family[1]).float().double()  # whose constants are rounded
    expected = second_order(model)
    assert len(expected) > 10
    fast_messages(model)
    assert any(isinstance(module, FastProduct) for module in model.modules())
    with fast_arithmetic():
        torch.testing.assert_close(second_order(model), expected, rtol=1e-10, atol=1e-12)
    assert_equal(second_order(model), expected)


# --- models of dipoles ------------------------------------------------------------------------------------------------

READOUTS = {"AtomicDipolesMACE": ("8x1o", 1), "EnergyDipolesMACE": ("8x0e+8x1o", 1),
            "AtomicDielectricMACE": ("8x0e+8x1o+8x2e", 2)}
DIPOLES = ["AtomicDipolesMACE", "EnergyDipolesMACE",
           pytest.param("AtomicDielectricMACE", marks=pytest.mark.since("0.3.14"))]


def dipole_model(name: str) -> torch.nn.Module:
    readout, max_L = READOUTS[name]
    torch.manual_seed(0)
    model = getattr(modules, name)(
        r_max=4.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=2, num_interactions=2, num_elements=3, correlation=2,
        interaction_cls=modules.RealAgnosticResidualInteractionBlock,
        interaction_cls_first=modules.RealAgnosticInteractionBlock,
        hidden_irreps=(4 * o3.Irreps.spherical_harmonics(max_L)).sort().irreps.simplify(),
        MLP_irreps=o3.Irreps(readout), gate=torch.nn.functional.silu, avg_num_neighbors=3.0, atomic_numbers=[1, 6, 8],
        radial_MLP=[8, 8, 8], atomic_energies=-np.arange(1.0, 4.0) if name == "EnergyDipolesMACE" else None)
    return model.double()


def outputs(model) -> list[torch.Tensor]:
    """Dipoles, and energies and forces or polarizabilities where the model has them."""
    model.heads = ["Default"]
    labelled = batch(model, structures())
    del model.heads
    for _ in range(2):
        output = model(labelled, compute_force=type(model).__name__ == "EnergyDipolesMACE")
    names = ("dipole", "energy", "forces", "polarizability")
    return [output[name].detach() for name in names if output.get(name) is not None]


@EACH_ADAPTER
@pytest.mark.parametrize("name", DIPOLES)
def test_models_of_dipoles_can_be_adapted_in_python(name, config, tmp_path):
    model = dipole_model(name)
    expected = outputs(model)
    inject(model, config)
    assert_equal(outputs(model), expected)
    trained = outputs(randomise(model, scale=0.3))
    for a, b in zip(trained, expected, strict=True):
        assert (a - b).norm() > 1e-4 * b.norm()
    save_adapter(model, tmp_path / "adapter")
    assert_close(outputs(load_adapter(eject(model), tmp_path / "adapter")), trained, 1e-12)
