"""Low-rank updates and the blocks that take them, against their equations written out number by number."""

import copy
import io

import blocks
import mace  # noqa: F401  before e3nn
import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from mace.modules import symmetric_contraction
from mace.modules.symmetric_contraction import Contraction, SymmetricContraction
from tiny import irreps_lists, randomise

from mace_peft import PeftConfig
from mace_peft.blocks.adapted import Updated, take_out
from mace_peft.blocks.e3nn import linear_parts
from mace_peft.methods import LowRank, Part, matrices

DTYPES = (torch.float32, torch.float64)
SEEDS = st.integers(0, 2**31)
RANK, ALPHA = 2, 3.0  # alpha / rank is not 1, so that a missing scale shows
cases = settings(deadline=None, max_examples=25, derandomize=True)


def in_dtype(dtype, make):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def adapt(block, rank=RANK, alpha=ALPHA):
    """The block as ``inject`` adapts one, with a random update."""
    randomise(blocks.adapt(block, "elora", rank=rank, alpha=alpha).adapter, seed=1)
    assert isinstance(block, Updated) and isinstance(block.adapter, LowRank)
    return block


def zeros(parts):
    """Weights of zeros, which an adapter changes to its update."""
    sizes = {part.weight: 0 for part in parts}
    for part in parts:
        sizes[part.weight] += part.rows * part.columns
    return {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}


def features(irreps, rows=3, dtype=torch.float64, seed=0):
    return torch.randn(rows, o3.Irreps(irreps).dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected):
    tolerance = 1e-11 if actual.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def product(A, B, row, column):
    """(alpha / rank) A B, one element of it."""
    return ALPHA / RANK * sum(A[row][k] * B[k][column] for k in range(RANK))


# --- o3.Linear --------------------------------------------------------------------------------------------------------


def linear_oracle(block, x):
    """Per irrep one matrix (channels in, channels out): raw weights, their update, then e3nn's normalisation."""
    irreps_in, irreps_out = block.irreps_in, block.irreps_out
    paths = [(i.i_in, i.i_out) for i in block.instructions if i.i_in >= 0]
    weights, biases = iter(block.weight.tolist()), iter(block.bias.tolist())

    def last(side, ir):
        return 1 + max(path[side] for path in paths if irreps_in[path[0]].ir == ir)

    matrix = {str(ir): {} for _, ir in irreps_out}  # irrep: {(channel in, channel out): weight}
    for i_in, i_out in paths:
        (mul_in, ir), (mul_out, _) = irreps_in[i_in], irreps_out[i_out]
        A, B = block.adapter.A[str(ir)].tolist(), block.adapter.B[str(ir)].tolist()
        # of all channels of the irrep, up to the last one that has a path
        assert len(A) == sum(mul for mul, other in irreps_in[:last(0, ir)] if other == ir)
        assert len(B[0]) == sum(mul for mul, other in irreps_out[:last(1, ir)] if other == ir)
        first_row = sum(mul for mul, other in irreps_in[:i_in] if other == ir)
        first_column = sum(mul for mul, other in irreps_out[:i_out] if other == ir)
        fan_in = sum(irreps_in[other_in].mul for other_in, other_out in paths if other_out == i_out)
        for u in range(first_row, first_row + mul_in):
            for v in range(first_column, first_column + mul_out):
                updated = next(weights) + product(A, B, u, v)
                matrix[str(ir)][u, v] = matrix[str(ir)].get((u, v), 0) + updated / fan_in**0.5

    result = []
    for row in x.tolist():
        channels, out, column = {}, [], 0
        for mul, ir in irreps_in:
            for _ in range(mul):
                channels.setdefault(str(ir), []).append(row[column:column + ir.dim])
                column += ir.dim
        seen = dict.fromkeys(matrix, 0)
        for mul, ir in irreps_out:
            for _ in range(mul):
                v, inputs = seen[str(ir)], channels.get(str(ir), [])
                seen[str(ir)] += 1
                out.extend(sum(matrix[str(ir)].get((u, v), 0) * inputs[u][m] for u in range(len(inputs)))
                           for m in range(ir.dim))
        result.append(out)
    result = torch.tensor(result, dtype=torch.float64)
    column = 0
    for i, (mul, ir) in enumerate(irreps_out):
        if any(ins.i_in == -1 and ins.i_out == i for ins in block.instructions):
            result[:, column:column + mul] += torch.tensor([next(biases) for _ in range(mul)], dtype=torch.float64)
        column += mul * ir.dim
    return result


LINEARS = [  # irreps in, irreps out, options of o3.Linear
    ("4x0e+3x1o", "4x0e+3x1o", {}),
    ("2x0e+3x0e+2x1o+1x1o", "4x0e+2x1o", {}),
    ("4x0e+2x1o", "2x0e+1x1o+3x0e+2x1o", {}),
    ("2x0e+1x1o+3x0e+2x1o", "1x1o+2x0e+2x1o+1x0e", {}),
    ("1x0o+2x0e", "3x0o+1x0e", {}),
    ("1x1o", "1x1o", {}),
    ("3x0e+2x1o", "2x1o+2x2e", {}),  # 0e reaches nothing, 2e comes from nothing
    ("2x0e+1x1o+3x0e", "1x1o+2x0e+1x0e", {"instructions": [(2, 1), (0, 2), (1, 0)]}),
    ("2x0e+3x0e", "2x0e+2x0e", {"instructions": [(1, 0)]}),
    ("2x0e+3x0e", "2x0e+1x0e", {"instructions": [(1, 1), (0, 0), (1, 0)], "path_normalization": "element"}),
    ("3x0e+2x1o", "2x0e+2x1o+1x0e", {"biases": True}),
]


def test_a_linear_layer_has_one_pair_of_factors_per_irrep():
    adapter = adapt(o3.Linear("2x0e+1x1o+3x0e", "4x0e+2x1o+1x2e"), rank=7).adapter
    assert {ir: (tuple(adapter.A[ir].shape), tuple(adapter.B[ir].shape)) for ir in adapter.A} == {
        "0e": ((5, 7), (7, 4)), "1o": ((1, 7), (7, 2))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("irreps_in, irreps_out, options", LINEARS)
def test_linear_follows_the_equations(irreps_in, irreps_out, options, dtype):
    torch.manual_seed(0)
    block = adapt(in_dtype(dtype, lambda: randomise(o3.Linear(irreps_in, irreps_out, **options))))
    x = features(irreps_in, dtype=dtype)
    close(block(x), linear_oracle(block, x))


@cases
@given(irreps_lists(), irreps_lists(), st.sampled_from(DTYPES), SEEDS)
def test_linear_follows_the_equations_on_any_irreps(irreps_in, irreps_out, dtype, seed):
    # one irrep at least is shared: what has no weight has no update
    irreps_in, irreps_out = f"2x1o+{irreps_in}", f"{irreps_out}+3x1o"
    block = adapt(in_dtype(dtype, lambda: randomise(o3.Linear(irreps_in, irreps_out), seed)))
    x = features(irreps_in, dtype=dtype, seed=seed)
    close(block(x), linear_oracle(block, x))


@cases
@given(irreps_lists(), irreps_lists(), SEEDS)
def test_repeated_irreps_count_as_one(irreps_in, irreps_out, seed):
    """The same adapter on a simplified list and on the list in pieces: one update, laid out for each."""
    whole_in, whole_out = (o3.Irreps(irreps).sort().irreps.simplify() for irreps in (irreps_in, irreps_out))
    pieces_in, pieces_out = (o3.Irreps(irreps).sort().irreps for irreps in (irreps_in, irreps_out))
    if not {ir for _, ir in whole_in} & {ir for _, ir in whole_out}:
        return

    def update(irreps_in, irreps_out):
        block = o3.Linear(irreps_in, irreps_out)
        parts = linear_parts(block)
        return randomise(LowRank(parts, zeros(parts), RANK, ALPHA).double(), seed)(zeros(parts))["weight"], block

    (whole, whole_block), (pieces, pieces_block) = update(whole_in, whole_out), update(pieces_in, pieces_out)
    updates = {}
    for (_, ins, view) in whole_block.weight_views(whole, yield_instruction=True):
        updates[whole_in[ins.i_in].ir] = view
    for (_, ins, view) in pieces_block.weight_views(pieces, yield_instruction=True):
        ir = pieces_in[ins.i_in].ir
        row = sum(mul for mul, other in pieces_in[:ins.i_in] if other == ir)
        column = sum(mul for mul, other in pieces_out[:ins.i_out] if other == ir)
        part = updates[ir][row:row + view.shape[0], column:column + view.shape[1]]
        assert torch.equal(part, view) or torch.allclose(part, view, rtol=1e-12, atol=1e-14)


# --- o3.FullyConnectedTensorProduct -----------------------------------------------------------------------------------


def tensor_product_oracle(block, x, y):
    """sum over paths of norm * (W + update)[u, v, w] * x[u] (x) y[v], with Wigner's 3j symbols."""
    irreps1, irreps2, irreps_out = block.irreps_in1, block.irreps_in2, block.irreps_out
    paths = [(a, b, c) for a, (_, ir1) in enumerate(irreps1) for b, (_, ir2) in enumerate(irreps2)
             for c, (_, ir) in enumerate(irreps_out) if ir in ir1 * ir2]
    couples = [f"{irreps1[a].ir}*{irreps2[b].ir}" for a, b, _ in paths]
    weights = iter(block.weight.tolist())
    starts1, starts2, starts_out = ([s.start for s in i.slices()] for i in (irreps1, irreps2, irreps_out))
    out = torch.zeros(len(x), irreps_out.dim, dtype=torch.float64)
    for number, (a, b, c) in enumerate(paths):
        (m1, ir1), (m2, ir2), (m_out, ir) = irreps1[a], irreps2[b], irreps_out[c]
        couple = couples[number]
        name = couple if couples.count(couple) == 1 else f"{couple}_{couples[:number + 1].count(couple)}"
        A, B = block.adapter.A[name].tolist(), block.adapter.B[name].tolist()
        assert (len(A), len(B[0])) == (m1 * m2, m_out)
        fan_in = sum(irreps1[i].mul * irreps2[j].mul for i, j, k in paths if k == c)
        symbol = o3.wigner_3j(ir1.l, ir2.l, ir.l, dtype=torch.float64)
        for u in range(m1):
            for v in range(m2):
                left = x[:, starts1[a] + u * ir1.dim:starts1[a] + (u + 1) * ir1.dim].double()
                right = y[:, starts2[b] + v * ir2.dim:starts2[b] + (v + 1) * ir2.dim].double()
                coupled = torch.einsum("zi,zj,ijk->zk", left, right, symbol)
                for w in range(m_out):
                    weight = (next(weights) + product(A, B, u * m2 + v, w)) * (ir.dim / fan_in)**0.5
                    start = starts_out[c] + w * ir.dim
                    out[:, start:start + ir.dim] += weight * coupled
    return out


TENSOR_PRODUCTS = [
    ("4x0e+3x1o", "3x0e", "4x0e+3x1o"),  # skip_tp: node features by elements
    ("2x0e+1x0e+2x1o", "2x0e", "1x1o+2x0e+3x1o"),
    ("2x0e+1x1o", "1x0e+2x1o", "2x0e+1x1o+1x1e+2x2e"),
    ("1x0o+2x1o", "2x0e+1x0o", "1x0e+2x0o+1x1e+2x1o"),
    ("1x0e", "1x0e", "1x0e"),
    ("2x0e+1x2e", "2x0e", "3x0e+2x1o"),  # 2e reaches nothing, 1o comes from nothing
]


def tensor_product(irreps, dtype, seed=0):
    torch.manual_seed(seed)
    return adapt(in_dtype(dtype, lambda: randomise(o3.FullyConnectedTensorProduct(*irreps), seed)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("irreps", TENSOR_PRODUCTS)
def test_tensor_product_follows_the_equations(irreps, dtype):
    block = tensor_product(irreps, dtype)
    x, y = features(irreps[0], dtype=dtype), features(irreps[1], dtype=dtype, seed=1)
    close(block(x, y), tensor_product_oracle(block, x, y))


@settings(cases, max_examples=12)
@given(irreps_lists(3), irreps_lists(2), irreps_lists(3), st.sampled_from(DTYPES), SEEDS)
def test_tensor_product_follows_the_equations_on_any_irreps(first, second, out, dtype, seed):
    irreps = (f"{first}+1x0e", f"2x0e+{second}", f"{out}+2x0e")  # one path at least
    block = tensor_product(irreps, dtype, seed)
    x, y = features(irreps[0], dtype=dtype, seed=seed), features(irreps[1], dtype=dtype, seed=seed + 1)
    close(block(x, y), tensor_product_oracle(block, x, y))


# --- radial MLPs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", [None, torch.nn.functional.silu])
def test_radial_layer_follows_the_equations(act, dtype):
    torch.manual_seed(0)
    net = in_dtype(dtype, lambda: e3nn_nn.FullyConnectedNet([5, 3], act, variance_in=0.5, variance_out=2,
                                                            out_act=act is not None))
    block, x = adapt(net[0]), torch.randn(4, 5, dtype=dtype)
    A, B = block.adapter.A["weight"].tolist(), block.adapter.B["weight"].tolist()
    W = torch.tensor([[block.weight[i][o].item() + product(A, B, i, o) for o in range(3)] for i in range(5)],
                     dtype=torch.float64)
    expected = x.double() @ W / (5 * 0.5)**0.5
    close(net(x), (block.act(expected) if act else expected) * 2**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_layer_follows_the_equations(dtype):
    torch.manual_seed(0)
    block, x = adapt(torch.nn.Linear(5, 3, dtype=dtype)), torch.randn(4, 5, dtype=dtype)
    A, B = block.adapter.A["weight"].tolist(), block.adapter.B["weight"].tolist()
    assert (len(A), len(B[0])) == (5, 3)
    expected = [[block.bias[o].item() + sum(x[z][i].item() * (block.weight[o][i].item() + product(A, B, i, o))
                                            for i in range(5)) for o in range(3)] for z in range(4)]
    close(block(x), torch.tensor(expected, dtype=torch.float64))


def test_an_update_is_laid_out_as_the_weight():
    """torch's dense layer stores its weight as (columns, rows)."""
    updates = []
    for transposed, shape in ((False, (5, 3)), (True, (3, 5))):
        weights = {"weight": torch.zeros(shape)}
        parts = [Part("weight", 0, (5, 1, 1, 3), "weight", transposed=transposed)]
        updates.append(randomise(LowRank(parts, weights, RANK, ALPHA))(weights)["weight"])
        assert updates[-1].shape == shape
    assert torch.equal(updates[0].T, updates[1])


# --- symmetric contractions -------------------------------------------------------------------------------------------


def contraction(irrep_out="0e", correlation=3, dtype=torch.float64, irreps_in="2x0e+2x1o+2x2e"):
    torch.manual_seed(0)
    return in_dtype(dtype, lambda: Contraction(o3.Irreps(irreps_in), o3.Irreps(irrep_out), correlation,
                                               num_elements=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("irrep_out", ["0e", "1o"])
@pytest.mark.parametrize("correlation", [1, 2, 3])
def test_contraction_equals_its_base_with_updated_weights(irrep_out, correlation, dtype):
    base = contraction(irrep_out, correlation, dtype)
    block = adapt(copy.deepcopy(base))
    elements, paths, channels = base.weights_max.shape
    A, B = block.adapter.A["weights_max"].tolist(), block.adapter.B["weights_max"].tolist()
    assert (len(A), len(B[0])) == (elements * paths, channels)
    assert list(block.adapter.full.s) == [f"weights_{order}" for order in range(correlation - 1)]
    with torch.no_grad():
        for e in range(elements):
            for p in range(paths):
                for c in range(channels):
                    base.weights_max[e, p, c] += product(A, B, e * paths + p, c)
        for order, weight in enumerate(base.weights):
            weight += block.adapter.full.s[f"weights_{order}"].view(weight.shape)
    x, elements_of = torch.randn(4, 2, 9, dtype=dtype), torch.eye(3, dtype=dtype)[[0, 2, 1, 0]]
    close(block(x, elements_of), base(x, elements_of))


def test_every_contraction_of_a_set_has_its_own_update():
    torch.manual_seed(0)
    base = SymmetricContraction("2x0e+2x1o", "2x0e+2x1o", 2, num_elements=2)
    adapted = copy.deepcopy(base)
    for part in adapted.contractions:
        adapt(part)
    plain = copy.deepcopy(adapted)
    for part, unfolded in zip(base.contractions, plain.contractions, strict=True):
        with torch.no_grad():
            for name, weight in unfolded.adapted_weights().items():
                part.get_parameter(name).copy_(weight)
    x, elements_of = torch.randn(4, 2, 4), torch.eye(2)[[0, 1, 1, 0]]
    torch.testing.assert_close(adapted(x, elements_of), base(x, elements_of))


@pytest.mark.since("0.3.14")
def test_a_weight_of_paths_that_do_not_exist_stays_zero():
    """Of a block as it comes from a file, in which that is an ordinary weight."""
    made = contraction("2e", irreps_in="2x0e+2x1o")
    assert isinstance(made.weights[0], symmetric_contraction.EmptyParam)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    block = torch.load(file, weights_only=False)
    adapt(block)
    assert list(block.adapted_weights()) == list(block.adapter.names) == ["weights_max", "weights.1"]
    block.fold()
    assert not block.weights[0].any() and block.weights[1].any()


# --- all of them ------------------------------------------------------------------------------------------------------

BLOCKS = {
    "linear": lambda: (o3.Linear("2x0e+1x1o+2x0e", "3x0e+2x1o", biases=True), [features("4x0e+1x1o")]),
    "tensor product": lambda: (o3.FullyConnectedTensorProduct("2x0e+1x1o", "3x0e", "2x0e+2x1o"),
                               [features("2x0e+1x1o"), features("3x0e", seed=1)]),
    "radial layer": lambda: (e3nn_nn.FullyConnectedNet([5, 3])[0], [features("5x0e")]),
    "dense": lambda: (torch.nn.Linear(5, 3), [features("5x0e")]),
    "contraction": lambda: (contraction("1o"), [features("18x0e").view(3, 2, 9),
                                                torch.eye(3, dtype=torch.float64)]),
}


def block_and_inputs(name):
    torch.manual_seed(0)
    return in_dtype(torch.float64, BLOCKS[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_factors_start_as_published(name):
    """A is N(0, 1), for contractions divided by the number of paths, and B is zero."""
    block, _ = block_and_inputs(name)
    adapter = blocks.target(block, "elora").make(block, PeftConfig("elora", rank=4000))
    paths = block.weights_max.shape[1] if name == "contraction" else 1
    factors = dict(adapter.named_parameters())
    A, B = ([value for key, value in factors.items() if key.startswith(letter)] for letter in "AB")
    assert len(A) == len(B) == (2 if name in ("linear", "tensor product") else 1)
    for factor in A:
        assert (paths * factor).std().item() == pytest.approx(1, rel=0.05)
        assert (paths * factor).mean().item() == pytest.approx(0, abs=0.05)
    assert not any(value.any() for key, value in factors.items() if not key.startswith("A"))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_new_adapter_changes_no_bit(name):
    block, inputs = block_and_inputs(name)
    expected = block(*inputs)
    assert torch.equal(blocks.adapt(block, "elora", rank=RANK)(*inputs), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_folding_changes_no_output(name):
    block, inputs = block_and_inputs(name)
    before, base = block(*inputs), type(block)
    expected = adapt(block)(*inputs)
    assert not torch.allclose(expected, before)
    block.fold()
    take_out(block)
    assert type(block) is base
    close(block(*inputs), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_its_updates_are_what_it_adds_to_the_matrices(name):
    block, _ = block_and_inputs(name)
    adapt(block)
    own = block.own_weights()
    changed = matrices(block.adapter.parts, block.adapted_weights())
    updates = block.adapter.low_rank_updates(own)
    assert list(updates) == list(changed) == list(block.adapter.A)
    for key, (update, matrix) in updates.items():
        close(matrix + update, changed[key])
        close(update, ALPHA / RANK * block.adapter.A[key] @ block.adapter.B[key])


@pytest.mark.parametrize("name", BLOCKS)
def test_forward_leaves_the_weights_as_they_were(name):
    block, inputs = block_and_inputs(name)
    adapt(block)
    before = [(key, weight, weight.detach().clone()) for key, weight in block.named_parameters()]
    block(*inputs)
    with pytest.raises(Exception, match=r"size|shape|mat1|dimension"):
        block(*[value[..., :-1] for value in inputs])
    with torch.no_grad():
        block(*inputs)
    after = dict(block.named_parameters())
    assert list(after) == [key for key, _, _ in before]
    for key, weight, value in before:
        assert after[key] is weight and torch.equal(weight, value), key


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_reach_both_factors(name):
    block, inputs = block_and_inputs(name)
    adapt(block)
    block(*inputs).pow(2).sum().backward()
    for key, parameter in block.adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize("block", [
    o3.Linear("3x0e", "2x1o"), o3.FullyConnectedTensorProduct("3x0e", "2x0e", "2x1o"),
], ids=lambda block: type(block).__name__)
def test_an_operation_without_weights_gets_no_update(block):
    target = blocks.target(block, "elora")
    adapter = target.make(block, PeftConfig("elora", rank=RANK))
    assert not list(adapter.parameters()) and target.largest_rank(block) == 0
    assert not any(weight.numel() for weight in adapter({"weight": block.weight}).values())


@pytest.mark.parametrize("block, weights", [
    (torch.nn.Linear(2, 3, bias=False), 10),
    (o3.Linear("2x0e", "3x0e"), 10),
    (o3.FullyConnectedTensorProduct("1x0e", "2x0e", "3x0e"), 10),
    (contraction(correlation=1), 2 * (3 * 1 + 2)),
], ids=lambda value: type(value).__name__)
def test_repr_is_one_line_with_the_number_of_weights(block, weights):
    assert repr(adapt(block).adapter) == f"LowRank({weights} weights)"


@pytest.mark.parametrize("rank", [2, 5])
def test_a_start_along_the_gradient_is_its_leading_singular_vectors(rank):
    """A (6, rank) of a gradient (6, 3) of rank 2: beyond these two, columns stay as they are drawn."""
    parts = [Part("weight", 0, (6, 1, 1, 3), "all", divisor=4)]
    torch.manual_seed(0)
    adapter = LowRank(parts, {"weight": torch.zeros(18)}, rank=rank, alpha=rank).double()
    drawn, left, right = adapter.A["all"].clone(), *(torch.randn(n, 2).double() for n in (6, 3))
    gradient = left @ right.T
    adapter.start_along({"weight": gradient.flatten()})
    A = adapter.A["all"].detach()
    leading = torch.linalg.eigh(gradient @ gradient.T)[1][:, [5, 4]]  # of the largest eigenvalues
    overlap = (leading.T @ A[:, :2]).abs() * 4
    torch.testing.assert_close(overlap, torch.eye(2).double())
    torch.testing.assert_close(A[:, 2:], drawn[:, 2:])
    assert not adapter.B["all"].any()
