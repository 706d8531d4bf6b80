"""Scales and the blocks that take them: every output channel is that of the plain block, scaled."""

import copy
from argparse import Namespace

import blocks
import mace  # noqa: F401  before e3nn
import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from mace.modules.symmetric_contraction import SymmetricContraction
from releases import since
from tiny import assert_close, batch, configurations, irreps_lists, predict, randomise, tiny_mace

from mace_peft import PeftConfig, PeftError, inject, merge, trainable_parameters
from mace_peft.blocks.adapted import Updated, take_out
from mace_peft.methods import ScaledLowRank, Scales
from mace_peft.model.adapted import is_adapted
from mace_peft.train.options import read_settings

pytestmark = pytest.mark.usefixtures("double_precision")
SCALES = PeftConfig("scales")
SEEDS = st.integers(0, 2**31)
cases = settings(deadline=None, max_examples=25, derandomize=True)


def adapt(block, seed=1):
    """A copy of the block as ``inject`` adapts one, with random gains."""
    block = blocks.adapt(copy.deepcopy(block), "scales")
    assert isinstance(block, Updated) and isinstance(block.adapter, Scales)
    randomise(block.adapter, seed=seed)
    return block


def features(irreps, rows=4, seed=0):
    return torch.randn(rows, o3.Irreps(irreps).dim, generator=torch.Generator().manual_seed(seed))


def scaled_channels(irreps, values, gains):
    """values (rows, irreps.dim), with the components of channel c times gains[..., c], one by one."""
    result, column, channel = values.clone(), 0, 0
    for mul, ir in o3.Irreps(irreps):
        for _ in range(mul):
            for _ in range(ir.dim):
                result[:, column] = gains[..., channel] * values[:, column]
                column += 1
            channel += 1
    return result


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def assert_scales_and_folds(adapted, call, expected):
    same(call(adapted), expected)
    for block in [block for block in adapted.modules() if isinstance(block, Updated)]:
        block.fold()
        take_out(block)
    same(call(adapted), expected)


LINEARS = [
    ("4x0e+3x1o", "4x0e+3x1o", {}),
    ("2x0e+3x0e+2x1o+1x1o", "4x0e+2x1o", {}),
    ("4x0e+2x1o", "2x0e+1x1o+3x0e+2x1o", {}),
    ("3x0e+2x1o", "2x1o+2x2e", {}),
    ("2x0e+3x0e", "2x0e+1x0e", {"instructions": [(1, 1), (0, 0), (1, 0)], "path_normalization": "element"}),
    ("3x0e+2x1o", "2x0e+2x1o+1x0e", {"biases": True}),
]


@pytest.mark.parametrize("irreps_in, irreps_out, options", LINEARS)
def test_a_channel_of_a_linear_layer_is_scaled(irreps_in, irreps_out, options):
    block = randomise(o3.Linear(irreps_in, irreps_out, **options))
    adapted, x = adapt(block), features(irreps_in)
    assert adapted.adapter.g.shape == (1, block.irreps_out.num_irreps)
    expected = scaled_channels(irreps_out, block(x), adapted.adapter.g[0].exp())
    assert_scales_and_folds(adapted, lambda block: block(x), expected)


@cases
@given(irreps_lists(), irreps_lists(), SEEDS)
def test_a_channel_of_any_linear_layer_is_scaled(irreps_in, irreps_out, seed):
    irreps_in, irreps_out = f"2x1o+{irreps_in}", f"{irreps_out}+3x1o"
    block = randomise(o3.Linear(irreps_in, irreps_out), seed)
    adapted, x = adapt(block, seed), features(irreps_in, seed=seed)
    expected = scaled_channels(irreps_out, block(x), adapted.adapter.g[0].exp())
    assert_scales_and_folds(adapted, lambda block: block(x), expected)


@cases
@given(irreps_lists(), irreps_lists(), st.integers(1, 4), SEEDS)
def test_a_channel_of_a_tensor_product_is_scaled_by_element(irreps_in, irreps_out, elements, seed):
    irreps_in, irreps_out = f"2x1o+{irreps_in}", f"{irreps_out}+3x1o"
    block = randomise(o3.FullyConnectedTensorProduct(irreps_in, f"{elements}x0e", irreps_out), seed)
    adapted, x = adapt(block, seed), features(irreps_in, seed=seed)
    which = torch.arange(len(x)) % elements
    one_hot = torch.eye(elements)[which]
    assert adapted.adapter.g.shape == (elements, o3.Irreps(irreps_out).num_irreps)
    expected = scaled_channels(irreps_out, block(x, one_hot), adapted.adapter.g.exp()[which])
    assert_scales_and_folds(adapted, lambda block: block(x, one_hot), expected)


@pytest.mark.parametrize("correlation", [1, 2, 3])
def test_a_channel_of_a_contraction_is_scaled_by_element(correlation):
    channels, elements = 3, 2
    irreps_in, irreps_out = o3.Irreps("3x0e+3x1o+3x2e"), o3.Irreps("3x0e+3x1o")
    block = randomise(SymmetricContraction(irreps_in, irreps_out, correlation, num_elements=elements))
    adapted = copy.deepcopy(block)
    adapted.contractions = torch.nn.ModuleList(adapt(part, seed) for seed, part in enumerate(block.contractions))
    x = torch.randn(4, channels, irreps_in.dim // channels, generator=torch.Generator().manual_seed(0))
    which = torch.tensor([0, 1, 1, 0])
    one_hot = torch.eye(elements)[which]
    gains = torch.cat([part.adapter.g.exp()[which] for part in adapted.contractions], -1)
    expected = scaled_channels(irreps_out, block(x, one_hot), gains)
    assert_scales_and_folds(adapted, lambda block: block(x, one_hot), expected)


def test_a_layer_of_e3nns_radial_mlp_is_scaled_before_its_activation():
    block = randomise(e3nn_nn.FullyConnectedNet([5, 4, 3], torch.nn.functional.silu).double())
    first, last = block
    adapted, x = adapt(first), features("5x0e")
    gains = adapted.adapter.g.exp()
    assert gains.shape == (1, 4)
    # its activation is normalised, and its last layer has none
    expected = first.act(x @ (first.weight * gains) / 5**0.5)
    assert_scales_and_folds(adapted, lambda block: block(x), expected)
    adapted, x = adapt(last), features("4x0e")
    assert_scales_and_folds(adapted, lambda block: block(x), last(x) * adapted.adapter.g.exp())


def test_a_layer_of_a_newer_radial_mlp_is_scaled():
    block, x = randomise(torch.nn.Linear(5, 4).double()), features("5x0e")
    adapted = adapt(block)
    assert_scales_and_folds(adapted, lambda block: block(x), block(x) * adapted.adapter.g.exp())


@pytest.mark.parametrize("correlation", [1, 3])
def test_gains_scale_a_weight_and_its_low_rank_update(correlation):
    block = randomise(SymmetricContraction(o3.Irreps("3x0e+3x1o"), o3.Irreps("3x1o"), correlation, num_elements=2))
    part = block.contractions[0]
    weights = {name: weight.clone() for name, weight in part.named_parameters() if weight.numel()}
    blocks.adapt(part, "elora+scales", rank=2, alpha=3.0)
    assert isinstance(part.adapter, ScaledLowRank)
    update, gains = randomise(part.adapter).low_rank, part.adapter.scales.g.exp().unsqueeze(1)
    assert list(update.full.s) == [f"weights_{order}" for order in range(correlation - 1)]
    part.fold()
    added = 1.5 * update.A["weights_max"] @ update.B["weights_max"]
    same(part.weights_max, gains * (weights["weights_max"] + added.view(part.weights_max.shape)))
    for order, lower in enumerate(part.weights):
        same(lower, gains * (weights[f"weights.{order}"] + update.full.s[f"weights_{order}"].view(lower.shape)))


def test_E0s_are_shifted():
    model, structures = tiny_mace(), configurations(2, "CH3OH") + configurations(1, "H2O")
    energies, forces = predict(model, structures)
    inject(model, PeftConfig("scales", targets="atomic_energies_fn"))
    assert list(trainable_parameters(model)) == ["atomic_energies_fn.adapter.s.atomic_energies"]
    shift = dict(zip(model.atomic_numbers.tolist(), [0.5, -2.0, 3.0], strict=True))
    with torch.no_grad():
        model.atomic_energies_fn.adapter.s["atomic_energies"].copy_(torch.tensor([list(shift.values())]))
    expected = energies + torch.tensor([sum(shift[number] for number in atoms.numbers) for atoms in structures])
    E0s = model.atomic_energies_fn.atomic_energies.clone()
    for either in (model, merge(model)):
        assert_close(predict(either, structures), (expected, forces), 1e-12)
    same(model.atomic_energies_fn.atomic_energies, E0s + torch.tensor(list(shift.values())))


def test_the_count_of_everything():
    """Three elements on the shape that the idea was first tried on: 1.6 % of the base."""
    paths = {"use_reduced_cg": False} if since("0.3.14") else {}  # 0.3.13 takes all
    model = tiny_mace(channels=64, max_ell=3, **paths)
    base = sum(parameter.numel() for parameter in model.parameters())
    inject(model, SCALES)
    assert {name.rpartition(".adapter.")[2] for name in trainable_parameters(model)} == {"g", "s.atomic_energies"}
    assert sum(parameter.numel() for parameter in trainable_parameters(model).values()) < 0.02 * base


@pytest.mark.parametrize("config", [SCALES, PeftConfig("elora+scales", rank=2, targets="all")],
                         ids=lambda config: config.method)
@pytest.mark.parametrize("interaction", ["RealAgnosticResidualInteractionBlock", "RealAgnosticDensityInteractionBlock"])
def test_a_merged_model_predicts_the_same(config, interaction):
    model = tiny_mace(later=interaction, max_L=2)
    inject(model, config)
    randomise(model, scale=0.3)
    structures = configurations(3, periodic=True)

    def predictions():
        output = model(batch(model, structures), compute_stress=True)
        return [output[name].detach() for name in ("energy", "interaction_energy", "forces", "stress")]

    expected = predictions()
    merge(model)
    assert not is_adapted(model)
    assert_close(predictions(), expected, 1e-12)


@pytest.mark.parametrize("option, value", [("rank", "8"), ("alpha", "2"), ("init_std", "0.1"), ("gate", "exp")])
def test_what_scales_do_not_have_is_refused(option, value):
    with pytest.raises(PeftError) as error:
        read_settings(Namespace(peft="scales", **{f"peft_{option}": value}))
    assert error.value.on_command_line().startswith(f"--peft_{option} {value} has no effect on scales, which has no ")


def test_the_remedy_is_not_what_was_given():
    with pytest.raises(PeftError, match="^init_std 0.1 has no effect on small, which has no gates: leave it out$"):
        read_settings(Namespace(peft="small", peft_init_std="0.1"))
