"""The MMEA module against its equations, written out element by element."""

import math

import blocks
import mace  # noqa: F401  before e3nn
import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from mace.modules.blocks import EquivariantProductBasisBlock
from tiny import batch, configurations, irreps_lists, randomise, tiny_mace

from mace_peft import PeftConfig, inject
from mace_peft.blocks.e3nn import GatedLinear, GatedTensorProduct
from mace_peft.blocks.mace import GatedProduct
from mace_peft.methods import GATES, MMEA
from mace_peft.methods.mmea import BOUND

SEEDS = st.integers(0, 2**31)
DTYPES = (torch.float32, torch.float64)
# no scalars in and out, scalars only in, scalars only out, repeats, 0o, single channels, interleaved order
EDGES = [
    ("2x1o", "2x1o"),
    ("3x0e", "3x0e"),
    ("2x1o", "3x0e"),
    ("2x0e", "1x0o+2x1o"),
    ("1x0o", "1x0o+1x0e"),
    ("2x1o+3x0e+1x2e+2x0e", "1x2e+2x0e+3x1o+1x0e+2x0o+1x1o"),
    ("1x0e+1x0e+1x0e", "1x1o+1x1o+1x0e+1x0e"),
]
cases = settings(deadline=None, max_examples=40, derandomize=True)


def adapter(irreps_in, irreps_out, rank=3, gate="exp", dtype=torch.float64, seed=0):
    """An MMEA of which every weight is random."""
    return randomise(MMEA(irreps_in, irreps_out, rank, gate).to(dtype), seed)


def features(irreps, rows=3, dtype=torch.float64, seed=0):
    return torch.randn(rows, o3.Irreps(irreps).dim, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype)


def oracle(mmea, irreps_in, irreps_out, gate, x, h):
    """h' in float64, from one number to the next."""
    W1, b1, W2, b2, W0, b0 = (p.tolist() for p in (mmea.W1, mmea.b1, mmea.W2, mmea.b2, mmea.W0, mmea.b0))
    result = []
    for x_row, h_row in zip(x.tolist(), h.tolist(), strict=True):
        s, column = [], 0
        for mul, ir in o3.Irreps(irreps_in):
            for _ in range(mul):
                if ir.l == 0 and ir.p == 1:
                    s.append(x_row[column])
                column += 2 * ir.l + 1

        z = []
        for k in range(len(b1)):
            y = b1[k] + sum(s[i] * W1[i][k] for i in range(len(s)))
            z.append(y / (1 + math.exp(-y)) if gate == "exp" else math.tanh(y) - math.tanh(b1[k]))
        square = sum(number**2 for number in s)
        u = 1 if gate == "exp" else square / (1 + square)

        out, column, scaled, shifted = [], 0, 0, 0
        for mul, ir in o3.Irreps(irreps_out):
            for _ in range(mul):
                if ir.l == 0 and ir.p == 1:
                    out.append(h_row[column] + u * b0[shifted] + sum(z[k] * W0[k][shifted] for k in range(len(z))))
                    shifted += 1
                else:
                    gamma = b2[scaled] + sum(z[k] * W2[k][scaled] for k in range(len(z)))
                    gain = math.exp(gamma) if gate == "exp" else math.exp(BOUND * math.tanh(gamma / BOUND))
                    out.extend(gain * h_row[column + m] for m in range(2 * ir.l + 1))
                    scaled += 1
                column += 2 * ir.l + 1
        result.append(out)
    return torch.tensor(result, dtype=torch.float64)


def assert_follows_the_equations(irreps_in, irreps_out, rank, gate, dtype, seed):
    mmea = adapter(irreps_in, irreps_out, rank, gate, dtype, seed)
    x, h = features(irreps_in, dtype=dtype, seed=seed), features(irreps_out, dtype=dtype, seed=seed + 1)
    out = mmea(x, h)
    assert out.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.double(), oracle(mmea, irreps_in, irreps_out, gate, x, h), rtol=tolerance,
                               atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("irreps_in, irreps_out", EDGES)
def test_follows_the_equations_on_edge_cases(irreps_in, irreps_out, gate, dtype):
    assert_follows_the_equations(irreps_in, irreps_out, 2, gate, dtype, seed=1)


@cases
@given(irreps_lists(), irreps_lists(), st.integers(1, 4), st.sampled_from(GATES),
       st.sampled_from(DTYPES), SEEDS)
def test_follows_the_equations_on_any_irreps(irreps_in, irreps_out, rank, gate, dtype, seed):
    assert_follows_the_equations(irreps_in, irreps_out, rank, gate, dtype, seed)


@cases
@given(irreps_lists(), irreps_lists(), st.sampled_from(DTYPES), SEEDS)
def test_bounded_gains_keep_their_bounds_and_scalars_of_zero_shift_nothing(irreps_in, irreps_out, dtype, seed):
    mmea = adapter(irreps_in, irreps_out, gate="bounded", dtype=dtype, seed=seed)
    gains, _ = mmea.coefficients(1e6 * features(irreps_in, dtype=dtype, seed=seed))
    assert ((gains > math.exp(-1.001 * BOUND)) & (gains < math.exp(1.001 * BOUND))).all()
    _, shifts = mmea.coefficients(torch.zeros(2, o3.Irreps(irreps_in).dim, dtype=dtype))
    assert not shifts.any()


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_takes_any_leading_dimensions(shape):
    mmea = adapter("2x0e+1x1o", "1x1o+2x0e")
    x, h = torch.randn(*shape, 5, dtype=torch.float64), torch.randn(*shape, 5, dtype=torch.float64)
    out = mmea(x, h)
    assert out.shape == h.shape
    rows = [mmea(a, b) for a, b in zip(x.reshape(-1, 5), h.reshape(-1, 5), strict=True)]
    if rows:
        torch.testing.assert_close(out.reshape(-1, 5), torch.stack(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@cases
@given(irreps_lists(), irreps_lists(), st.sampled_from(DTYPES), SEEDS)
def test_a_new_adapter_is_the_identity_to_the_last_bit(gate, irreps_in, irreps_out, dtype, seed):
    mmea = MMEA(irreps_in, irreps_out, 3, gate).to(dtype)
    x, h = features(irreps_in, dtype=dtype, seed=seed), features(irreps_out, dtype=dtype, seed=seed + 1)
    assert torch.equal(mmea(10 * x, h), h)


def test_a_new_adapter_starts_as_published():
    torch.manual_seed(0)
    mmea = MMEA("50x0e+3x1o", "70x0e+20x1o+10x0o", 60, init_std=0.02)
    assert mmea.W0.shape == (60, 70) and mmea.W2.shape == (60, 30) and mmea.W1.shape == (50, 60)
    assert mmea.W0.std().item() == pytest.approx(0.02, rel=0.05)
    assert mmea.W0.mean().item() == pytest.approx(0, abs=0.002)
    for name in ("b1", "W2", "b2", "b0"):
        assert not getattr(mmea, name).any(), name
    bound = 50**-0.5  # that of nn.Linear
    assert mmea.W1.abs().max() <= bound
    assert mmea.W1.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_the_shift_starts_at_zero_by_default():
    assert not MMEA("5x0e", "5x0e", 4).W0.any()


@cases
@given(irreps_lists(), irreps_lists(), st.sampled_from(GATES), SEEDS)
def test_commutes_with_rotations_and_inversion(irreps_in, irreps_out, gate, seed):
    mmea = adapter(irreps_in, irreps_out, gate=gate, seed=seed)
    x, h = features(irreps_in, seed=seed), features(irreps_out, seed=seed + 1)
    torch.manual_seed(seed)
    rotation = o3.rand_matrix(dtype=torch.float64)
    for transformation in (rotation, -rotation, -torch.eye(3, dtype=torch.float64)):
        D_in, D_out = (o3.Irreps(i).D_from_matrix(transformation) for i in (irreps_in, irreps_out))
        expected = mmea(x, h) @ D_out.T
        error = mmea(x @ D_in.T, h @ D_out.T) - expected
        assert error.norm() <= 1e-10 * expected.norm()


@cases
@given(irreps_lists(), irreps_lists(), SEEDS)
def test_reads_nothing_but_the_scalars_of_x(irreps_in, irreps_out, seed):
    mmea = adapter(irreps_in, irreps_out, seed=seed)
    x, h = features(irreps_in, seed=seed), features(irreps_out, seed=seed + 1)
    other, column = x.clone(), 0
    for mul, ir in o3.Irreps(irreps_in):
        if not (ir.l == 0 and ir.p == 1):
            other[:, column:column + mul * ir.dim] = float("nan")
        column += mul * ir.dim
    assert torch.equal(mmea(other, h), mmea(x, h))


@cases
@given(irreps_lists(), irreps_lists(), st.sampled_from(GATES), SEEDS)
def test_the_other_layout_is_the_same_features_in_another_order(irreps_in, irreps_out, gate, seed):
    mmea, x, h = adapter(irreps_in, irreps_out, gate=gate, seed=seed), features(irreps_in), features(irreps_out)
    expected = ir_mul(mmea(x, h), irreps_out)
    mmea.set_layout("ir_mul")
    assert torch.equal(mmea(ir_mul(x, irreps_in), ir_mul(h, irreps_out)), expected)
    mmea.set_layout("mul_ir")
    assert torch.equal(ir_mul(mmea(x, h), irreps_out), expected)


def ir_mul(features, irreps):
    """The features with the channels of each component together."""
    blocks = [features[:, s].reshape(-1, mul, ir.dim).transpose(1, 2).flatten(1)
              for s, (mul, ir) in zip(o3.Irreps(irreps).slices(), o3.Irreps(irreps), strict=True)]
    return torch.cat(blocks, dim=1)


def test_reads_every_scalar_of_x():
    mmea = adapter("2x1o+3x0e+1x2e+2x0e", "2x0e+1x1o")
    x, h = features("2x1o+3x0e+1x2e+2x0e", rows=1), features("2x0e+1x1o", rows=1)
    for column in (6, 7, 8, 14, 15):
        other = x.clone()
        other[:, column] += 1
        assert (mmea(other, h) != mmea(x, h)).all(), f"column {column}"


@cases
@given(irreps_lists(), irreps_lists(), st.sampled_from(GATES), SEEDS)
def test_gradients_reach_every_weight(irreps_in, irreps_out, gate, seed):
    mmea = adapter(irreps_in, irreps_out, gate=gate, seed=seed)
    x, h = features(irreps_in, seed=seed), features(irreps_out, seed=seed + 1)
    (mmea(x, h) * features(irreps_out, seed=seed + 2)).sum().backward()
    for name, parameter in mmea.named_parameters():
        assert parameter.grad is not None, name
        if parameter.numel() and (gate != "bounded" or o3.Irreps(irreps_in).count("0e")):  # or nothing is shifted
            assert parameter.grad.any(), name


def test_gradients_flow_from_the_first_step_on():
    """W2 and W0 start at zero, so those before them (W1, b1) have to wait for one step, and only for one."""
    torch.manual_seed(0)
    mmea = MMEA("3x0e+2x1o", "3x0e+2x1o+1x0o", 2).double()
    optimizer = torch.optim.SGD(mmea.parameters(), lr=0.1)
    x, h = features("3x0e+2x1o"), features("3x0e+2x1o+1x0o")
    for reached in (("W2", "b2", "W0", "b0"), ("W1", "b1", "W2", "b2", "W0", "b0")):
        optimizer.zero_grad()
        mmea(x, h).pow(2).sum().backward()
        assert all(getattr(mmea, name).grad.all() for name in reached)
        optimizer.step()


@pytest.mark.parametrize("gate", GATES)
def test_compiles_to_torchscript(gate):
    mmea = adapter("2x0e+1x1o+1x0e", "1x1o+2x0e+1x0o", gate=gate)
    x, h = features("2x0e+1x1o+1x0e"), features("1x1o+2x0e+1x0o")
    torch.testing.assert_close(torch.jit.script(mmea)(x, h), mmea(x, h), rtol=1e-14, atol=1e-14)


def gate_block(block, method="mmea"):
    """The block as ``inject`` adapts one, with a random gate."""
    randomise(blocks.adapt(block, method, rank=2).adapter)
    assert isinstance(block.adapter, MMEA)
    return block


def test_the_input_of_a_linear_layer_drives_and_its_output_takes_the_gate():
    torch.manual_seed(0)
    block, x = o3.Linear("3x0e+2x1o", "2x1o+3x0e"), features("3x0e+2x1o", dtype=torch.float32)
    h = block(x)
    expected = oracle(gate_block(block).adapter, "3x0e+2x1o", "2x1o+3x0e", "bounded", x, h)
    assert isinstance(block, GatedLinear)
    torch.testing.assert_close(block(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_first_input_of_a_tensor_product_drives_and_its_output_takes_the_gate():
    torch.manual_seed(0)
    block = o3.FullyConnectedTensorProduct("3x0e+2x1o", "4x0e", "2x1o+3x0e")
    x, elements = features("3x0e+2x1o", dtype=torch.float32), torch.eye(4)[[0, 2, 1]]
    h = block(x, elements)
    expected = oracle(gate_block(block, "gates").adapter, "3x0e+2x1o", "2x1o+3x0e", "bounded", x, h)
    assert isinstance(block, GatedTensorProduct)
    torch.testing.assert_close(block(x, elements).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_gated_linear_layer_takes_weights_from_outside_as_its_base_does():
    torch.manual_seed(0)
    block, x = o3.Linear("3x0e+2x1o", "2x1o+3x0e", biases=True), features("3x0e+2x1o", dtype=torch.float32)
    weight, bias = torch.randn(block.weight_numel), torch.randn(block.bias_numel)
    h = block(x, weight, bias)
    gated = gate_block(block)
    assert torch.equal(gated(x, weight, bias), gated.adapter(x, h))


@pytest.mark.parametrize("use_sc, given", [(True, True), (True, False), (False, True)])
def test_the_whole_output_of_a_product_block_drives_and_takes_its_gate(use_sc, given):
    """The skip connection, where the block uses one, is in it."""
    torch.manual_seed(0)
    irreps = o3.Irreps("2x0e+2x1o")
    block = EquivariantProductBasisBlock(irreps, irreps, correlation=2, use_sc=use_sc, num_elements=3)
    inputs = (torch.randn(4, 2, 4), torch.randn(4, 8) if given else None, torch.eye(3)[[0, 2, 1, 0]])
    h = block(*inputs)
    expected = oracle(gate_block(block).adapter, irreps, irreps, "bounded", h, h)
    assert isinstance(block, GatedProduct)
    torch.testing.assert_close(block(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("double_precision")
def test_a_gain_of_the_received_sum_is_one_of_every_message():
    model = inject(tiny_mace(), PeftConfig("gates", rank=2, targets="interactions.*.conv_tp"))
    plain, inputs, phi = tiny_mace(), batch(model, configurations(2)), []
    for interaction in model.interactions:
        gate = randomise(interaction.linear.adapter["messages"])
        torch.nn.init.zeros_(gate.W0), torch.nn.init.zeros_(gate.b0)  # messages that are scalars are shifted
        gate.register_forward_pre_hook(lambda gate, given: phi.append(gate.coefficients(given[0])[0].detach()))
    gated = model(inputs)["energy"]

    def scale(convolution, _, messages):
        gains, columns, (_, receivers) = phi.pop(0), [], inputs["edge_index"]
        for mul, ir in convolution.irreps_out:
            of_block, gains = gains.tensor_split([0 if ir == o3.Irrep("0e") else mul], dim=1)
            of_block = of_block if ir != o3.Irrep("0e") else gains.new_ones(len(gains), mul)
            columns.append(of_block.repeat_interleave(ir.dim, dim=1))
        return torch.cat(columns, 1)[receivers] * messages

    for interaction in plain.interactions:
        interaction.conv_tp.register_forward_hook(scale)
    torch.testing.assert_close(plain(inputs)["energy"], gated, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(gated, tiny_mace()(inputs)["energy"])


def test_its_state_is_the_six_weights_of_the_equations():
    assert sorted(MMEA("2x0e", "2x0e+1x1o", 3).state_dict()) == ["W0", "W1", "W2", "b0", "b1", "b2"]


def test_its_repr_is_one_line_with_the_number_of_weights():
    mmea = MMEA("2x0e", "2x0e+1x1o", 3)  # W1 6, b1 3, W2 3, b2 1, W0 6, b0 2
    assert repr(mmea).startswith("MMEA(") and "21 weights" in repr(mmea) and "\n" not in repr(mmea)
