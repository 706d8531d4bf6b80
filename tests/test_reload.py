"""After a real run, foundation file + adapter directory is the trained model: energies, forces and stress."""

import itertools

import pytest
import torch
from runs import E0S, FEWER_ELEMENTS, NAME, train_here, write_inputs
from test_load import same
from tiny import batch, configurations, predict, tiny_mace

from mace_peft import disable_adapter, load_adapter, trainable_parameters
from mace_peft.inspect.info import info

pytestmark = pytest.mark.usefixtures("uncompiled")

CASES = [*itertools.product(["mmea", "elora"], ["products", "linears", "published"]), ("gates", "all"),
         ("scales", "all"), ("small", "linears")]
HEADS = "{{'a': {{'train_file': '{0}/train.xyz', 'valid_file': '{0}/valid.xyz', 'E0s': '{1}'}}, " \
        "'b': {{'train_file': '{0}/train.xyz', 'valid_file': '{0}/valid.xyz', 'E0s': '{2}'}}}}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Water, and a foundation of H, C and O whose file is in float32; the runs are in float64."""
    folder = tmp_path_factory.mktemp("inputs")
    return write_inputs(folder, FEWER_ELEMENTS, tiny_mace(dtype=torch.float32))


def assert_reloads(folder, work_dir):
    """The reloaded model and that of the run agree to 1e-10 in all that they predict for every head."""
    trained = torch.load(work_dir / f"{NAME}.model", weights_only=False)
    foundation = torch.load(folder / "foundation.model", weights_only=False).double()
    loaded = load_adapter(foundation, work_dir / f"{NAME}_adapter")
    assert loaded.atomic_numbers.tolist() == trained.atomic_numbers.tolist() and loaded.heads == trained.heads
    for head in trained.heads:
        structures = configurations(2, FEWER_ELEMENTS, seed=3, periodic=True)
        for atoms in structures:
            atoms.info["head"] = head
        expected, found = (model(batch(model, structures), compute_stress=True) for model in (trained, loaded))
        for quantity in ("energy", "forces", "stress"):
            close = torch.allclose(found[quantity], expected[quantity], rtol=1e-10, atol=1e-11)
            assert close, (head, quantity, (found[quantity] - expected[quantity]).abs().max())
    return loaded


def options(method, targets):
    rank = None if method == "scales" else 2  # which have none
    return {"peft": method, "peft_rank": rank, "peft_targets": targets, "max_num_epochs": 1}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_fewer_elements_and_other_E0s(inputs, tmp_path, case):
    train_here(inputs, work_dir=tmp_path, E0s=E0S[FEWER_ELEMENTS], **options(*case))
    model = assert_reloads(inputs, tmp_path)
    assert model.atomic_numbers.tolist() == [1, 8]
    assert model.atomic_energies_fn.atomic_energies.flatten().tolist() == [-0.7, -2.6]


@pytest.mark.parametrize("case", [("mmea", "published"), ("elora", "published"), ("scales", "all")], ids="-".join)
def test_all_elements_of_the_foundation(inputs, tmp_path, case):
    train_here(inputs, work_dir=tmp_path, E0s="average", foundation_model_elements=True, **options(*case))
    assert assert_reloads(inputs, tmp_path).atomic_numbers.tolist() == [1, 6, 8]


@pytest.mark.parametrize("case, train_also", [(("mmea", "published"), None), (("elora", "products"), "readouts.*"),
                                              (("scales", "all"), None)], ids=["mmea", "elora", "scales"])
def test_two_heads(inputs, tmp_path, case, train_also):
    heads = HEADS.format(inputs, E0S[FEWER_ELEMENTS], "{1: -0.9, 8: -3.1}")
    train_here(inputs, work_dir=tmp_path, heads=heads, peft_train_also=train_also, train_file=None, valid_file=None,
               test_file=None, E0s=None, **options(*case))
    model = assert_reloads(inputs, tmp_path)
    assert model.heads == ["a", "b"]


def test_a_head_of_a_foundation_that_has_several(tmp_path, capsys):
    foundation = tiny_mace(heads=("pt_head", "other"), dtype=torch.float32)
    inputs = write_inputs(tmp_path, FEWER_ELEMENTS, foundation)
    arguments = options("mmea", "products") | {"E0s": E0S[FEWER_ELEMENTS]}
    train_here(inputs, work_dir=tmp_path / "first", foundation_head="other", **arguments)
    assert_reloads(inputs, tmp_path / "first")
    further = {"peft_adapter": tmp_path / "first" / f"{NAME}_adapter", **arguments}
    train_here(inputs, work_dir=tmp_path / "second", foundation_head="other", **further)
    assert_reloads(inputs, tmp_path / "second")
    with pytest.raises(SystemExit):
        train_here(inputs, work_dir=tmp_path / "third", foundation_head="pt_head", **further)
    assert "add --foundation_head other" in capsys.readouterr().err


def test_heads_of_the_run_that_are_named_as_those_of_the_foundation(tmp_path):
    """MACE gives each head of the run the one head that it takes of the foundation."""
    inputs = write_inputs(tmp_path, "CH3OH", tiny_mace(heads=("a", "b")))
    heads = HEADS.format(inputs, E0S["CH3OH"], E0S["CH3OH"])
    train_here(inputs, work_dir=tmp_path, foundation_head="b", heads=heads, train_file=None, valid_file=None,
               test_file=None, E0s=None, **options("elora", "products"))
    assert assert_reloads(inputs, tmp_path).heads == ["a", "b"]


def test_a_foundation_from_before_heads(tmp_path):
    foundation = tiny_mace()
    inputs = write_inputs(tmp_path, FEWER_ELEMENTS, foundation)
    del foundation.heads
    torch.save(foundation, inputs / "foundation.model")
    train_here(inputs, work_dir=tmp_path / "run", E0s=E0S[FEWER_ELEMENTS], **options("mmea", "products"))
    assert_reloads(inputs, tmp_path / "run")
    assert "heads        Default" in info(str(inputs / "foundation.model"), trust=True)


def test_stage_two_and_the_moving_average(inputs, tmp_path):
    """What is saved is what was evaluated: the averaged adapters, of each stage its own."""
    train_here(inputs, "--ema", "--swa", work_dir=tmp_path, start_swa=1, E0s=E0S[FEWER_ELEMENTS],
               **options("mmea", "products") | {"max_num_epochs": 2})
    first = trainable_parameters(assert_reloads(inputs, tmp_path))
    (tmp_path / f"{NAME}_stagetwo.model").replace(tmp_path / f"{NAME}.model")
    (tmp_path / f"{NAME}_adapter").rename(tmp_path / "first")
    (tmp_path / f"{NAME}_stagetwo_adapter").rename(tmp_path / f"{NAME}_adapter")
    second = trainable_parameters(assert_reloads(inputs, tmp_path))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_three_adapters_swap_on_one_foundation(inputs, tmp_path):
    """Each gives its own predictions bit for bit, in any order; switched off, the base gives the foundation's."""
    structures = configurations(2, FEWER_ELEMENTS)
    foundation = torch.load(inputs / "foundation.model", weights_only=False).double()
    base, expected = predict(foundation, structures), {}
    for number, (method, targets) in enumerate([("mmea", "published"), ("elora", "linears"), ("mmea", "products")]):
        name = f"{method}-{targets}"
        train_here(inputs, work_dir=tmp_path / name, peft=method, peft_targets=targets, peft_rank=2, max_num_epochs=1,
                   E0s=f"{{1: -{number}.5, 8: -2.6}}", peft_train_also=[None, "readouts.*", None][number])
        expected[name] = predict(load_adapter(foundation, tmp_path / name / f"{NAME}_adapter"), structures)
    model = load_adapter(foundation, tmp_path / "mmea-products" / f"{NAME}_adapter")
    for name in [*expected, *reversed(expected), *expected]:
        assert load_adapter(model, tmp_path / name / f"{NAME}_adapter") is model
        assert equal(predict(model, structures), expected[name])
        with disable_adapter(model):
            assert same(predict(model, structures), base)
        assert equal(predict(model, structures), expected[name])
    assert not any(equal(a, b) for a, b in itertools.combinations(expected.values(), 2))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
