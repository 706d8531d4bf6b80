"""Cheaper steps give what MACE's own give: a backward pass to what trains alone, messages that copy less, and
contractions by element.
"""

import contextlib
import copy
import importlib

import pytest
import torch
from combined import adapters, assert_same, train_only, write_small
from e3nn import o3
from mace.modules import WeightedEnergyForcesLoss
from mace.modules.symmetric_contraction import Contraction
from mace.tools.train import take_step
from mace_peft.fast.tensor_product import SplitProduct, cut_by_split, is_cut, split_code, split_messages
from tiny import assert_close, assert_equal, configurations, loaded, predict, randomise, tiny_mace
from torch import fx
from torch_ema import ExponentialMovingAverage

from mace_peft import PeftConfig, inject, trainable_parameters
from mace_peft.fast import contraction as contractions
from mace_peft.fast.backward import backward_to
from mace_peft.fast.contraction import by_element
from mace_peft.patching import replaced

STEPS = 20
pytestmark = pytest.mark.usefixtures("double_precision")

steps = importlib.import_module("mace.tools.train")  # MACE binds that name to a function, too


def train(model, cheap: bool) -> tuple[list[float], dict, torch.Tensor | None]:
    """Losses of 20 of MACE's steps, the weights after them, and the gradient that the positions have got."""
    learnt = trainable_parameters(model)
    optimizer = torch.optim.Adam(learnt.values(), lr=0.01, amsgrad=True)
    average = ExponentialMovingAverage(learnt.values(), decay=0.9)
    structures, losses = loaded(model, configurations(4)), []
    if cheap:
        split_messages(model)
    with contextlib.ExitStack() as stack:
        if cheap:
            stack.enter_context(replaced(torch.Tensor, "backward", backward_to(lambda: list(learnt.values()))))
            stack.enter_context(replaced(Contraction, "forward", by_element))
        for _ in range(STEPS):
            loss, _ = take_step(
                model=model, loss_fn=WeightedEnergyForcesLoss(1.0, 100.0), batch=structures, optimizer=optimizer,
                ema=average, output_args={"forces": True, "virials": False, "stress": False}, max_grad_norm=1.0,
                device="cpu")
            losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in learnt.items()}, structures["positions"].grad


@pytest.mark.parametrize("targets", ["products", "linears", "published", "all"])
@pytest.mark.parametrize("method", [{"method": "mmea", "rank": 2}, {"method": "elora", "rank": 2},
                                    {"method": "scales"}, {"method": "elora+scales", "rank": 2}],
                         ids=["mmea", "elora", "scales", "elora-scales"])
def test_losses_and_weights_are_those_of_the_whole_backward_pass(method, targets):
    model = randomise(inject(tiny_mace(), PeftConfig(**method, targets=targets, train_also="readouts.*")))
    losses, weights, of_positions = train(copy.deepcopy(model), cheap=True)
    expected_losses, expected, unused = train(copy.deepcopy(model), cheap=False)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=0)
    assert_same(weights, expected, 1e-10)
    assert losses[-1] < losses[0]
    assert of_positions is None and unused is not None


def test_a_run_ends_as_with_the_steps_of_mace(tmp_path, monkeypatch):
    bound, train_one_epoch = [], steps.train_one_epoch

    def noting_what_is_bound(**arguments):
        bound.append((torch.Tensor.backward, Contraction.forward))
        train_one_epoch(**arguments)

    monkeypatch.setattr(steps, "train_one_epoch", noting_what_is_bound)
    of_mace = torch.Tensor.backward, Contraction.forward
    inputs = write_small(tmp_path)
    run, given = train_only(inputs, "cheap", "--ema", max_num_epochs=3)
    assert all(isinstance(block.conv_tp, SplitProduct) for block in given["model"].interactions)
    whole, given = train_only(inputs, "whole", "--ema", max_num_epochs=3, peft_fast=False)
    assert not any(isinstance(block.conv_tp, SplitProduct) for block in given["model"].interactions)
    assert not {*bound[0]} & {*of_mace} and bound[-1] == of_mace
    assert_same(adapters(run), adapters(whole), 1e-10)


# --- contractions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [1, 2, 3, 4])
@pytest.mark.parametrize("irrep_out", ["0e", "1o", "2e"])
def test_a_contraction_of_every_order_is_the_same(correlation, irrep_out, monkeypatch):
    """Values and derivatives of atoms in any order; of order 4 it is MACE's."""
    irreps = o3.Irreps("2x0e+2x1o+2x2e")
    contraction = Contraction(irreps, o3.Irreps(irrep_out), correlation, num_elements=4)
    torch.manual_seed(0)
    x = torch.randn(14, 2, 9, requires_grad=True)
    y = torch.eye(4)[[2, 0, 2, 1, 2, 2, 2, 0, 2, 2, 2, 2, 2, 2]]  # an element without atoms

    def results():
        out = contraction(x, y)
        force, = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        weights = [weight for weight in contraction.parameters() if weight.requires_grad]
        return [out, force, *torch.autograd.grad(force.pow(2).sum(), [x, *weights], materialize_grads=True)]

    def forbidden(*_):
        raise RuntimeError

    expected = results()
    with replaced(Contraction, "forward", by_element):
        if correlation < 4:
            monkeypatch.setattr(contractions, "OF_MACE", forbidden)
        assert_close(results(), expected)
        monkeypatch.undo()
        assert_close([contraction(x[:5], y[:5])], [expected[0][:5]])  # of few atoms it is MACE's, too


# --- messages ---------------------------------------------------------------------------------------------------------


def test_the_code_has_neither_slices_nor_joins_of_torch(monkeypatch):
    """All is replaced in what MACE is made of; a cut that is none of them stays."""
    used = []

    def noted(*recipe):
        used.append(split_code(*recipe))
        return used[-1]

    monkeypatch.setattr("mace_peft.fast.tensor_product.split_code", noted)
    predict(split_messages(tiny_mace()), configurations(1))
    code = used[1].code  # of the second interaction, which has all kinds of inputs
    assert code.count(".split(") == 3 and code.count("join(") == 1
    assert "[(slice(None" not in code and "torch.cat(" not in code


@pytest.mark.parametrize("columns, replaced", [([(0, 2), (2, 5)], True), ([(0, 2), (3, 5)], False),
                                               ([(0, 2), (2, 4)], False)], ids=["all", "gap", "rest"])
def test_cuts_are_replaced_where_they_are_all_columns(columns, replaced):
    def cut(tensor):
        wide = tensor.reshape(-1, 5)
        return [wide[:, start:stop] for start, stop in columns]

    code = fx.symbolic_trace(cut)
    expected = code(torch.arange(10.0))
    for node in list(code.graph.nodes):
        cut_by_split(code.graph, [user for user in node.users if is_cut(user)])
    code.recompile()
    torch.testing.assert_close(code(torch.arange(10.0)), expected)
    assert ("split" in code.code) == replaced


def test_what_is_restored_is_as_before():
    model = tiny_mace()
    before = copy.deepcopy(model)
    assert split_messages(model).state_dict().keys() == before.state_dict().keys()
    restored = split_messages(copy.deepcopy(model), split=False)
    assert [type(module).__name__ for module in restored.modules()] == [type(m).__name__ for m in before.modules()]
    assert_equal(predict(restored, configurations(2)), predict(before, configurations(2)))
