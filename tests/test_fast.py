"""Cheaper steps give what MACE's own give: a backward pass to what trains alone, messages that are summed path by path,
and contractions by element.
"""

import contextlib
import copy
import importlib
from collections import Counter

import pytest
import torch
from combined import adapters, assert_same, train_only, write_small
from e3nn import o3
from mace.modules import WeightedEnergyForcesLoss
from mace.modules import blocks as mace_blocks
from mace.modules.irreps_tools import tp_out_irreps_with_instructions
from mace.modules.symmetric_contraction import Contraction
from mace.tools.train import take_step
from tiny import assert_close, assert_equal, batch, configurations, loaded, predict, randomise, tiny_mace
from torch_ema import ExponentialMovingAverage

from mace_peft import PeftConfig, inject, merge, trainable_parameters
from mace_peft.fast import contraction as contractions
from mace_peft.fast.arithmetic import fast_arithmetic
from mace_peft.fast.backward import backward_to
from mace_peft.fast.contraction import by_element
from mace_peft.fast.messages import FastProduct, fast_messages
from mace_peft.fast.polynomial import pairs_of, polynomial
from mace_peft.patching import replaced

STEPS = 10
pytestmark = pytest.mark.usefixtures("double_precision")

steps = importlib.import_module("mace.tools.train")  # MACE binds that name to a function, too


def train(model, cheap: bool) -> tuple[list[float], dict, torch.Tensor | None]:
    """Losses of 10 of MACE's steps, the weights after them, and the gradient that the positions have got."""
    learnt = trainable_parameters(model)
    optimizer = torch.optim.Adam(learnt.values(), lr=0.01, amsgrad=True)
    average = ExponentialMovingAverage(learnt.values(), decay=0.9)
    structures, losses = loaded(model, configurations(4)), []
    if cheap:
        fast_messages(model)
    with contextlib.ExitStack() as stack:
        if cheap:
            stack.enter_context(replaced(torch.Tensor, "backward", backward_to(lambda: list(learnt.values()))))
            stack.enter_context(fast_arithmetic())
        for _ in range(STEPS):
            loss, _ = take_step(
                model=model, loss_fn=WeightedEnergyForcesLoss(1.0, 100.0), batch=structures, optimizer=optimizer,
                ema=average, output_args={"forces": True, "virials": False, "stress": False}, max_grad_norm=1.0,
                device="cpu")
            losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in learnt.items()}, structures["positions"].grad


RANKED = {"mmea": 2, "elora": 2, "scales": None, "elora+scales": 2}
WITH_ADAPTERS = [PeftConfig(method, rank=rank, targets=targets, train_also="readouts.*")
                 for method, rank in RANKED.items() for targets in ("products", "linears", "published", "all")]
FULL = [PeftConfig("full"), PeftConfig("full", train_also="atomic_energies_fn.*")]


@pytest.mark.parametrize("first", ["RealAgnosticInteractionBlock", "RealAgnosticDensityResidualInteractionBlock"])
@pytest.mark.parametrize("config", FULL, ids=["E0s stay", "E0s train"])
def test_all_parameters_learn_as_in_the_whole_backward_pass(config, first):
    check_cheap_steps(inject(tiny_mace(first=first), config))


@pytest.mark.parametrize("config", WITH_ADAPTERS, ids=lambda config: f"{config.method}-{config.targets}")
def test_losses_and_weights_are_those_of_the_whole_backward_pass(config):
    check_cheap_steps(randomise(inject(tiny_mace(), config)))


def check_cheap_steps(model):
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
    assert all(isinstance(block.conv_tp, FastProduct) for block in given["model"].interactions)
    whole, given = train_only(inputs, "whole", "--ema", max_num_epochs=3, peft_fast=False)
    assert not any(isinstance(block.conv_tp, FastProduct) for block in given["model"].interactions)
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
            monkeypatch.setattr(contractions, "CONTRACTION_OF_MACE", forbidden)
        assert_close(results(), expected)
        monkeypatch.undo()
        assert_close([contraction(x[:5], y[:5])], [expected[0][:5]])  # of few atoms it is MACE's, too


def test_coefficients_that_change_are_read_again():
    contraction = Contraction(o3.Irreps("2x0e+2x1o"), o3.Irreps("0e"), 3, num_elements=1)
    x, y = torch.randn(5, 2, 4), torch.ones(5, 1)
    with replaced(Contraction, "forward", by_element):
        contraction(x, y)
        with torch.no_grad():
            contraction.U_matrix_3.mul_(2)
        found = contraction(x, y)
    assert_close([found], [contraction(x, y)])


@pytest.mark.parametrize("orders", [1, 2, 3])
def test_derivatives_of_the_polynomial_are_those_of_differences(orders):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=random, requires_grad=True)
    first, second = pairs_of(3)
    K = [torch.randn(2, 6, width, generator=random) for width in (1, 3, len(first))][:orders]
    if orders > 1:
        K[1] = (K[1].view(2, 2, 3, 3) + K[1].view(2, 2, 3, 3).mT).view(2, 6, 3)
    if orders > 2:
        K[2] = torch.ones(2, 6, len(first)) * (1 + (first != second))  # the same for all i, j and k
    assert torch.autograd.gradcheck(lambda x: polynomial(x, *K), x)
    assert torch.autograd.gradgradcheck(lambda x: polynomial(x, *K), x)
    assert torch.autograd.gradcheck(lambda *K: polynomial(x.detach(), *K), [k.requires_grad_() for k in K])


# --- messages ---------------------------------------------------------------------------------------------------------

EDGES, ATOMS = 7, 4


def message_product(irreps_in: str, l_max: int = 2, to: str = "3x0e+3x1o+3x2e") -> o3.TensorProduct:
    harmonics = o3.Irreps.spherical_harmonics(l_max)
    irreps_mid, paths = tp_out_irreps_with_instructions(o3.Irreps(irreps_in), harmonics, o3.Irreps(to))
    return o3.TensorProduct(irreps_in, harmonics, irreps_mid, paths, shared_weights=False, internal_weights=False)


def inputs_of(product: o3.TensorProduct, edges: int = EDGES) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, Y and w of the edges, and the atoms that receive them: none the last."""
    torch.manual_seed(1)
    widths = product.irreps_in1.dim, product.irreps_in2.dim, product.weight_numel
    return [torch.randn(edges, width, requires_grad=True) for width in widths], torch.randint(ATOMS - 1, (edges,))


def sums(product: o3.TensorProduct, inputs: list[torch.Tensor], receivers: torch.Tensor) -> torch.Tensor:
    """As MACE's interaction blocks make them."""
    return mace_blocks.scatter_sum(src=product(*inputs), index=receivers, dim=0, dim_size=ATOMS)


def to_second_order(product: o3.TensorProduct, edges: int = EDGES) -> list[torch.Tensor]:
    """Messages, their gradients for x, Y and w, and the gradients of a function of all of these."""
    inputs, receivers = inputs_of(product, edges)
    messages = sums(product, inputs, receivers)
    gradients = torch.autograd.grad(messages.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(part.cos().sum() for part in (messages, *gradients)), inputs)
    return [messages, *gradients, *second]


@pytest.mark.parametrize("edges", [EDGES, 0])
@pytest.mark.parametrize("irreps_in", ["3x0e", "3x0e+3x1o", "2x0o+1x1e+2x0e+4x2e", "3x1o+2x1o"])
def test_messages_and_their_derivatives_are_those_of_e3nn(irreps_in, edges):
    product = message_product(irreps_in)
    expected = to_second_order(product, edges)
    fast_messages(product)
    assert_equal(to_second_order(product, edges), expected)  # without the sums it is e3nn's own
    with fast_arithmetic():
        found = to_second_order(product, edges)
    assert type(product) is FastProduct
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_constants_that_change_are_read_again():
    """Rounded ones stay rounded, as a foundation may have them."""
    product = fast_messages(message_product("3x0e+3x1o"))
    with fast_arithmetic():
        exact = to_second_order(product)
        rounded = to_second_order(product.float().double())
    assert not torch.equal(exact[0], rounded[0])
    torch.testing.assert_close(rounded, to_second_order(product), rtol=1e-12, atol=1e-12)


def test_products_of_another_kind_stay_as_they_are():
    irreps, weighted = o3.Irreps("2x0e+2x1o"), [(0, 0, 0, "uvu", True), (1, 1, 0, "uvu", True)]
    others = [o3.FullyConnectedTensorProduct(irreps, "1x0e+1x1o", irreps), o3.ElementwiseTensorProduct(irreps, irreps),
              o3.TensorProduct(irreps, "1x0e+1x1o", "2x0e", weighted, shared_weights=False, internal_weights=False),
              o3.TensorProduct(irreps, "1x0e+1x1o", "2x0e", weighted[:1])]
    classes = [type(product) for product in others]
    assert [type(fast_messages(product)) for product in others] == classes


def test_what_is_restored_is_as_before():
    model = tiny_mace()
    before = copy.deepcopy(model)
    assert fast_messages(model).state_dict().keys() == before.state_dict().keys()
    assert sum(isinstance(module, FastProduct) for module in model.modules()) == 2
    restored = fast_messages(copy.deepcopy(model), fast=False)
    assert [type(module).__name__ for module in restored.modules()] == [type(m).__name__ for m in before.modules()]
    assert_equal(predict(restored, configurations(2)), predict(before, configurations(2)))


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__.startswith("2.3."), reason="its profiler misses some operations")
@pytest.mark.parametrize("config", [PeftConfig("elora", rank=2), PeftConfig("scales"),
                                    PeftConfig("elora+scales", rank=2)], ids=lambda config: config.method)
def test_a_merged_model_predicts_with_the_operations_of_its_base(config):
    def operations(model):
        inputs = batch(model.requires_grad_(False), configurations(2))
        with torch.jit.optimized_execution(False):  # or TorchScript changes the first calls
            model(inputs, training=False, compute_force=True)
            with torch.profiler.profile() as profile:
                model(inputs, training=False, compute_force=True)
        return Counter(event.name for event in profile.events() if event.name.startswith("aten::"))

    base = tiny_mace()
    assert operations(merge(randomise(inject(copy.deepcopy(base), config)))) == operations(base)
