"""A method of a few lines and a row of the table works on every operation: injected, trained, merged, saved, listed."""

import copy

import mace  # noqa: F401  before e3nn
import pytest
import torch
from blocks import adapt
from e3nn import nn as e3nn_nn
from e3nn import o3
from mace.modules.symmetric_contraction import SymmetricContraction
from test_ranks import differentiate
from tiny import assert_close, assert_equal, batch, configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, disable_adapter, inject, load_adapter, merge, save_adapter, trainable_parameters
from mace_peft.inspect.info import info
from mace_peft.inspect.spectra import update_spectra
from mace_peft.methods import METHODS, LowRank, Method, matrices
from mace_peft.methods.weights import join
from mace_peft.model.ranks import choose_ranks
from mace_peft.model.summary import summary

STRUCTURES = configurations(2)


class DoRA(LowRank):
    """Each output channel of a matrix: a learnt norm times the direction of W + (alpha / r) A B, arXiv 2402.09353."""

    kind = "low-rank direction and norm"

    def __init__(self, parts, weights, **settings):
        super().__init__(parts, weights, **settings)
        self.norm = torch.nn.ParameterDict({key: value.norm(dim=0) for key, value in matrices(parts, weights).items()})

    def forward(self, weights):
        updated = weights | super().forward(weights)
        scale = {key: self.norm[key] / matrix.norm(dim=0) for key, matrix in matrices(self.parts, updated).items()}
        scaled = [part.of(updated) * scale[part.factors][part.column:part.column + part.columns] for part in self.parts]
        return self.full(weights) | join(self.parts, scaled, weights)


@pytest.fixture(autouse=True)
def dora(monkeypatch):
    adapters = dict.fromkeys(("linear", "tensor product", "layer", "contraction"), DoRA)
    monkeypatch.setitem(METHODS, "dora", Method("DoRA", adapters, "published", lr=0.01))


def new(**settings):
    return inject(tiny_mace(), PeftConfig("dora", rank=2, alpha=3.0, **settings))


def trained():
    """After one step."""
    model = new()
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=0.01)
    data = batch(model, STRUCTURES)
    output = model(data, training=True, compute_force=True)
    (output["forces"] - data["forces"]).pow(2).mean().backward()
    optimizer.step()
    return model


BLOCKS = {
    "linear": lambda: o3.Linear("2x0e+3x0e+2x1o", "4x0e+2x1o"),
    "tensor product": lambda: o3.FullyConnectedTensorProduct("4x0e+2x1o", "3x0e", "4x0e+2x1o"),
    "layer": lambda: e3nn_nn.FullyConnectedNet([4, 8], torch.nn.functional.silu)[0],
    "dense": lambda: torch.nn.Linear(4, 5),
    "contraction": lambda: SymmetricContraction("2x0e+2x1o", "2x0e", 3, num_elements=2).contractions[0],
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", BLOCKS)
def test_every_operation_takes_it(name):
    """At the start it changes nothing; at random its columns have the norms that were set, and it folds."""
    block = BLOCKS[name]()
    plain = copy.deepcopy(block)
    adapt(block, "dora", rank=2)
    for key, weight in block.adapted_weights().items():
        torch.testing.assert_close(weight, dict(plain.named_parameters())[key], rtol=1e-12, atol=1e-12)
    randomise(block.adapter)
    columns = matrices(block.adapter.parts, block.adapted_weights())
    for key, norm in block.adapter.norm.items():
        torch.testing.assert_close(columns[key].norm(dim=0), norm.abs(), rtol=1e-12, atol=1e-12)
    before = {key: weight.clone() for key, weight in block.adapted_weights().items()}
    block.fold()
    for key, weight in before.items():
        torch.testing.assert_close(dict(block.named_parameters())[key], weight)


def test_it_trains_merges_and_is_switched_off(tmp_path):
    base = predict(tiny_mace(), STRUCTURES)
    assert_close(predict(new(), STRUCTURES), base, 1e-6)  # norms are taken in the default dtype
    model = trained()
    expected = predict(model, STRUCTURES)
    assert (expected[1] - base[1]).norm() > 1e-4 * base[1].norm()
    with disable_adapter(model):
        assert_close(predict(model, STRUCTURES), base)
    assert_close(predict(copy.deepcopy(model), STRUCTURES), expected)
    assert_close(predict(merge(model), STRUCTURES), expected)


def test_it_is_saved_loaded_and_listed(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "adapter")
    assert_equal(predict(load_adapter(tiny_mace(), tmp_path / "adapter"), STRUCTURES), predict(model, STRUCTURES))
    assert "dora, rank 2, alpha 3" in info(str(tmp_path / "adapter"))
    assert DoRA.kind in summary(model)
    assert "interactions.1.skip_tp" in update_spectra(model)["units"]


@pytest.mark.usefixtures("double_precision")
def test_its_ranks_are_chosen():
    config = choose_ranks(tiny_mace(), PeftConfig("dora", rank="auto", budget="60%"), differentiate)
    assert len(set(dict(config.rank_pattern).values())) > 1
    assert trainable_parameters(inject(tiny_mace(), config))
