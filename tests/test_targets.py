"""Which modules get an adapter, how many parameters that trains, and what is refused."""

from copy import deepcopy
from types import SimpleNamespace

import mace  # noqa: F401  before e3nn
import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from mace import modules
from tiny import batch, configurations, medium_mace, predict, randomise, tiny_mace

from mace_peft import PeftConfig, PeftError, eject, inject, trainable_parameters
from mace_peft.blocks.adapted import Adapted, adapted_blocks
from mace_peft.blocks.e3nn import GatedLinear, GatedMessages
from mace_peft.methods import METHODS, LowRank, ScaledLowRank, Scales
from mace_peft.model.adapted import is_adapted
from mace_peft.model.summary import summary
from mace_peft.model.targets import find_targets, outermost, unit


@pytest.fixture(scope="module")
def shared_model():
    return tiny_mace()


@pytest.fixture
def model(shared_model):
    return deepcopy(shared_model)


def names_of(model, *classes):
    return [name for name, module in model.named_modules() if isinstance(module, classes)]


def targets_of(model, method, targets):
    return list(find_targets(model, PeftConfig(method, targets=targets)))


def refusal(action, *arguments):
    """The message of the PeftError that the action raises: one line."""
    with pytest.raises(PeftError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_model_or_no_settings_is_refused():
    assert "'foundation.model' is no model" in refusal(inject, "foundation.model", PeftConfig("mmea"))
    assert "'mmea' are no settings: give a PeftConfig" in refusal(inject, tiny_mace(), "mmea")


# --- the published counts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def medium():
    return medium_mace()


def radial(*sizes):
    return sum(16 * (rows + columns) for rows, columns in zip(sizes, sizes[1:], strict=False))


LOW_RANK_OF_BOTH = {
    "interactions.0.conv_tp_weights": 14_464,
    "interactions.0.skip_tp": 32_768,
    "interactions.1.conv_tp_weights": 26_752,
    "interactions.1.skip_tp": 8_192,
    "products.0.symmetric_contractions": 12_256,
    "products.1.symmetric_contractions": 5_072,
}
GATES = {
    "node_embedding.linear": 2_240,
    "interactions.0.linear_up": 4_240,
    "interactions.0.linear": 10_768,
    "interactions.1.linear_up": 6_416,
    "interactions.1.linear": 12_816,
    "products.0.linear": 6_416,
    "products.1.linear": 4_240,
    "readouts.0.linear": 2_081,
    "readouts.1.linear_1": 2_336,
    "readouts.1.linear_2": 289,
}
# rank 16 times (channels in + channels out) of every irrep that both sides share
LINEAR_UPDATES = {
    "node_embedding.linear": 16 * (3 + 128),
    "interactions.0.linear_up": 16 * (128 + 128),
    "interactions.0.linear": 16 * 4 * (128 + 128),
    "interactions.1.linear_up": 16 * 2 * (128 + 128),
    "interactions.1.linear": 16 * ((256 + 128) + 3 * (384 + 128) - 128),
    "products.0.linear": 16 * 2 * (128 + 128),
    "products.1.linear": 16 * (128 + 128),
    "readouts.0.linear": 16 * (128 + 1),
    "readouts.1.linear_1": 16 * (128 + 16),
    "readouts.1.linear_2": 16 * (16 + 1),
}
PUBLISHED = {
    "mmea": ({**{name: (count, "gate") for name, count in GATES.items()},
              **{name: (count, "low-rank update") for name, count in LOW_RANK_OF_BOTH.items()}}, 151_346, "20.1"),
    "elora": ({name: (count, "low-rank update") for name, count in {**LINEAR_UPDATES, **LOW_RANK_OF_BOTH}.items()},
              175_872, "23.4"),
}


def rows_of(text):
    """{module: (parameters, what trains)} of a summary."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["module", "what trains", "parameters", "% of base"]
    return {module: (int(number.replace(",", "")), kind) for module, kind, number, _ in cells[1:]}


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_counts(medium, method):
    expected, total, share = PUBLISHED[method]
    assert sum(parameter.numel() for parameter in medium.parameters()) == 751_888
    inject(medium, PeftConfig(method, rank=16, targets="published"))
    try:
        text = summary(medium)
        assert rows_of(text) == expected
        assert sum(number for number, _ in expected.values()) == total
        assert sum(parameter.numel() for parameter in trainable_parameters(medium).values()) == total
        assert text.endswith(f"Trainable: {total:,} parameters, {share} % of the base's 751,888")
    finally:
        eject(medium)


def test_a_radial_mlp_counts_as_its_layers():
    assert radial(8, 64, 64, 64, 512) == LOW_RANK_OF_BOTH["interactions.0.conv_tp_weights"]


# --- placements -------------------------------------------------------------------------------------------------------


def test_products_are_gated_as_a_whole(model):
    assert targets_of(model, "mmea", "products") == ["products.0", "products.1"]


def test_products_are_updated_in_their_weights(model):
    assert targets_of(model, "elora", "products") == [
        "products.0.symmetric_contractions.contractions.0", "products.0.symmetric_contractions.contractions.1",
        "products.0.linear", "products.1.symmetric_contractions.contractions.0", "products.1.linear"]


@pytest.mark.parametrize("method", ["mmea", "gates", "elora"])
def test_linears_are_all_linear_layers(model, method):
    linears = names_of(model, o3.Linear)
    assert len(linears) == 10
    assert targets_of(model, method, "linears") == linears


OF_PUBLISHED = (o3.Linear, o3.FullyConnectedTensorProduct, type(e3nn_nn.FullyConnectedNet([1, 1])[0]),
                modules.symmetric_contraction.Contraction)


@pytest.mark.parametrize("method", ["mmea", "elora"])
@pytest.mark.parametrize("targets", ["published", "all"])
def test_published_are_linears_tensor_products_radial_mlps_and_contractions(model, method, targets):
    """Nor is there more in all, where convolutions take no gate."""
    assert targets_of(model, method, targets) == names_of(model, *OF_PUBLISHED)


@pytest.mark.parametrize("targets", ["published", "all"])
def test_gates_go_where_there_are_features(model, targets):
    assert targets_of(model, "gates", targets) == names_of(model, o3.Linear, o3.FullyConnectedTensorProduct)


@pytest.mark.parametrize("method", ["scales", "elora+scales", "small"])
@pytest.mark.parametrize("targets, classes", [
    ("products", None), ("linears", [o3.Linear]), ("published", OF_PUBLISHED), ("all", OF_PUBLISHED)])
def test_with_scales_go_the_E0s(model, method, targets, classes):
    expected = targets_of(model, "elora", "products") if classes is None else names_of(model, *classes)
    found = targets_of(model, method, targets)
    assert "atomic_energies_fn" in found
    assert [name for name in found if name != "atomic_energies_fn"] == expected


WITH_ADAPTERS = pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method].adapters])


@WITH_ADAPTERS
def test_the_default_placement(model, method):
    expected = {"mmea": "published", "elora": "linears", "elora+scales": "linears", "small": "linears",
                "best": "linears"}
    assert targets_of(model, method, None) == targets_of(model, method, expected.get(method, "all"))


def test_scales_without_E0s_beside_them_are_told_of():
    layers = torch.nn.Sequential(o3.Linear("2x0e", "2x0e"), o3.Linear("2x0e", "3x0e"))
    with pytest.warns(UserWarning, match="scales change the total energy, and Sequential has no atomic energies"):
        assert targets_of(layers, "scales", "linears") == ["0", "1"]


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mmea", "elora"])
@pytest.mark.parametrize("patterns, expected", [
    ("interactions.*.linear", ["interactions.0.linear", "interactions.1.linear"]),
    ("interactions.?.skip_tp", ["interactions.0.skip_tp", "interactions.1.skip_tp"]),
    ("readouts.1.linear_1,node_embedding.linear", ["node_embedding.linear", "readouts.1.linear_1"]),
    (" readouts.0 , readouts.*.linear ,", ["readouts.0.linear"]),
    ("readouts.*", ["readouts.0.linear", "readouts.1.linear_1", "readouts.1.linear_2"]),
    ("interactions.1.conv_tp_weights", [f"interactions.1.conv_tp_weights.layer{i}" for i in range(4)]),
    ("products.1.symm*", ["products.1.symmetric_contractions.contractions.0"]),
])
def test_patterns_name_modules_or_what_contains_them(model, method, patterns, expected):
    assert targets_of(model, method, patterns) == expected


@pytest.mark.parametrize("method, adapter", [("mmea", LowRank), ("elora", LowRank), ("scales", Scales),
                                             ("elora+scales", ScaledLowRank)])
@pytest.mark.parametrize("patterns", ["*.skip_tp", "*.conv_tp_weights", "*.symmetric_contractions", "published"])
def test_what_a_module_gets_is_up_to_the_method(model, method, adapter, patterns):
    """Not to the placement or pattern that finds it."""
    found = find_targets(model, PeftConfig(method, targets=patterns))
    roles = {"tensor product", "layer", "contraction"}
    assert {target.adapter for target in found.values() if target.operation.role in roles} == {adapter}


@pytest.mark.parametrize("method, targets", [
    ("mmea", "*.conv_tp"), ("mmea", "atomic_energies_fn"), ("elora", "*.conv_tp"), ("elora", "atomic_energies_fn"),
    ("scales", "*.conv_tp"), ("gates", "*.conv_tp_weights"), ("gates", "*.symmetric_contractions"),
    ("gates", "atomic_energies_fn")])
def test_what_a_method_does_not_adapt_is_no_target(model, method, targets):
    message = refusal(inject, model, PeftConfig(method, targets=targets))
    assert f"targets {targets!r} matches no module that {method} can adapt" in message


def test_a_pattern_names_an_adaptable_module_itself_and_not_what_is_inside(model):
    assert targets_of(model, "mmea", "products.0") == ["products.0"]
    assert targets_of(model, "mmea", "products.0, products.0.linear") == ["products.0", "products.0.linear"]


def test_many_patterns_look_into_a_module_once(model, monkeypatch):
    looked = []
    monkeypatch.setattr("mace_peft.model.targets.outermost", lambda *given: looked.append(given) or outermost(*given))
    found = targets_of(model, "mmea", "*")
    once = len(looked)
    assert targets_of(model, "mmea", ",".join(f"[!{chr(0x4e00 + number)}]*" for number in range(200))) == found
    assert len(looked) == 2 * once


@pytest.mark.parametrize("targets, close", [
    ("product", "products"),
    ("published_", "published"),
    ("interactions.0.liner_up", "interactions.0.linear_up"),
    ("interaction.0.conv_tp_weight", "interactions.0.conv_tp_weights"),
])
def test_a_target_that_matches_nothing_names_close_ones(model, targets, close):
    message = refusal(inject, model, PeftConfig("mmea", rank=2, targets=targets))
    assert message.startswith(f"targets {targets!r}")
    assert close in message.split("did you mean ")[1].split("?")[0].split(" or ")
    assert "products, linears, published" in message


def test_a_target_that_matches_nothing_lists_what_there_is(model):
    message = refusal(inject, model, PeftConfig("elora", rank=2, targets="zzz"))
    assert "did you mean" not in message
    listed = message.rpartition("this model has ")[2].split(", ")
    assert "interactions.0.conv_tp_weights" in listed and "products.0.symmetric_contractions" in listed
    assert not [name for name in listed if "layer0" in name or "contractions.0" in name]
    for name in listed:
        assert targets_of(model, "elora", name), name


def test_every_pattern_of_a_list_has_to_match(model):
    message = refusal(inject, model, PeftConfig("elora", rank=2, targets="products.*, readout.*"))
    assert "'readout.*'" in message and "'products.*'" not in message


@pytest.mark.parametrize("targets", ["linears, interactions.*", "interactions.*,published"])
def test_a_placement_among_patterns_is_refused(model, targets):
    message = refusal(inject, model, PeftConfig("mmea", rank=2, targets=targets))
    assert repr(targets) in message and "alone" in message


def test_products_among_patterns_are_the_modules_of_that_name(model):
    """MACE has them in a list called products, so that the pattern and the placement agree."""
    assert targets_of(model, "mmea", "products, readouts.0") == ["products.0", "products.1", "readouts.0.linear"]
    assert targets_of(model, "elora", "products,products.*") == targets_of(model, "elora", "products")


def test_modules_without_weights_are_no_targets(model):
    message = refusal(inject, model, PeftConfig("mmea", rank=2, targets="spherical_harmonics"))
    assert "matches no module that mmea can adapt" in message


@WITH_ADAPTERS
@pytest.mark.parametrize("targets", ["products", "linears", "published", "all", "0"])
def test_a_model_without_the_blocks_is_refused(method, targets):
    plain = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Tanh()))
    message = refusal(inject, plain, PeftConfig(method, targets=targets))
    assert message.startswith("Sequential is neither a MACE model nor made of e3nn's layers")
    assert not is_adapted(plain)


@pytest.mark.parametrize("method, blocks, targets, needed", [
    ("elora", [o3.FullyConnectedTensorProduct("2x0e", "2x0e", "2x0e")], "linears", ["Linear"]),
    ("gates", [e3nn_nn.FullyConnectedNet([2, 2])], "published", ["FullyConnectedTensorProduct", "Linear"]),
    ("mmea", [o3.Linear("2x0e", "2x1o")], "linears", ["Linear"]),  # which has no weights
])
def test_a_placement_of_which_a_model_has_nothing_is_refused(method, blocks, targets, needed):
    model = torch.nn.Sequential(*blocks)
    message = refusal(inject, model, PeftConfig(method, rank=2, targets=targets))
    assert message.startswith(f"targets {targets!r} needs ") and "Sequential has none" in message
    assert set(needed) <= set(message.partition(" needs ")[2].partition(", and ")[0].split(", "))
    assert "glob patterns" in message
    assert not is_adapted(model)


def test_a_placement_that_is_one_of_MACE_is_a_pattern_elsewhere():
    layers = torch.nn.ModuleDict({"products": o3.Linear("2x0e", "2x0e"), "other": o3.Linear("2x0e", "2x0e")})
    assert targets_of(layers, "elora", "products") == ["products"]
    message = refusal(inject, layers, PeftConfig("elora", rank=2, targets="produkts"))
    assert "did you mean products" in message and "use linears, published, all, or glob patterns" in message


def test_weights_of_an_odd_form_are_refused():
    """Whose parts nobody knows: rather than to adapt some of them."""
    layer = o3.Linear("2x0e", "3x0e")
    layer.weight = torch.nn.Parameter(torch.randn(2 * 3 + 1))
    message = refusal(inject, torch.nn.Sequential(layer), PeftConfig("elora", rank=2, targets="linears"))
    assert message.startswith("the weight of a Linear has 7 numbers, and its paths 6")
    assert message.endswith("choose targets without it")


@pytest.mark.parametrize("method", ["mmea", "gates", "elora"])
def test_a_linear_layer_without_weights_is_left_alone(method):
    model = torch.nn.Sequential(o3.Linear("2x0e+3x1o", "3x0e"), o3.Linear("3x0e", "2x1o"))
    inject(model, PeftConfig(method, rank=2, targets="linears"))
    assert isinstance(model[0], Adapted) and not isinstance(model[1], Adapted)
    assert model(torch.randn(2, 11)).shape == (2, 6)


def test_a_convolution_is_gated_where_its_messages_are_received(model):
    linear = ["interactions.0.linear", "interactions.1.linear"]
    assert targets_of(model, "gates", "interactions.*.conv_tp") == linear
    assert targets_of(model, "gates", "interactions.0.linear_up, *.conv_tp, products") == [
        "interactions.0.linear_up", *linear, "products.0", "products.1"]
    for targets, mixin in [("*.conv_tp", GatedMessages), ("*.conv_tp, *.linear", GatedMessages), ("all", GatedMessages),
                           ("interactions.*.linear", GatedLinear), ("linears", GatedLinear),
                           ("published", GatedLinear)]:
        found = find_targets(model, PeftConfig("gates", targets=targets))
        assert [found[name].mixin for name in linear] == [mixin, mixin], targets


def test_a_convolution_elsewhere_is_no_part_of_all():
    """Of which nobody knows what takes its messages."""
    model = torch.nn.Sequential(o3.Linear("2x0e", "2x0e"), o3.TensorProduct(
        "2x0e", "0e", "2x0e", [(0, 0, 0, "uvu", True)], shared_weights=False, internal_weights=False))
    assert targets_of(model, "gates", "all") == ["0"]
    message = refusal(inject, model, PeftConfig("gates", rank=2, targets="1"))
    assert "takes the messages of a convolution, and of 1 in this Sequential it is not known" in message
    assert message.endswith("choose targets without it")


# --- parameters that train along --------------------------------------------------------------------------------------


def test_full_trains_every_parameter_and_no_E0s(model):
    """The table has a row for each module, with radial MLPs and contractions as one."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.numel()}
    inject(model, PeftConfig("full"))
    assert {name: parameter.numel() for name, parameter in trainable_parameters(model).items()} == sizes
    assert all(parameter.requires_grad for parameter in trainable_parameters(model).values())
    rows = rows_of(summary(model))
    assert {"interactions.0.conv_tp_weights", "products.1.symmetric_contractions", "readouts.0.linear"} < set(rows)
    assert sum(count for count, _ in rows.values()) == sum(sizes.values())
    eject(model)
    inject(model, PeftConfig("full", train_also="atomic_energies_fn.*"))
    assert trainable_parameters(model).keys() - sizes == {"atomic_energies_fn.adapter.s.atomic_energies"}


@pytest.mark.parametrize("config", [PeftConfig("full"), PeftConfig("elora", rank=2, train_also="*")])
def test_constants_that_MACE_makes_parameters_of_do_not_train(model, config):
    bessel = model.radial_embedding.bessel_fn
    bessel.bessel_weights = torch.nn.Parameter(bessel.bessel_weights.clone())
    inject(model, config)
    assert "radial_embedding.bessel_fn.bessel_weights" not in trainable_parameters(model)
    assert "readouts.0.linear.weight" in trainable_parameters(model)


def test_full_refuses_what_trains_without_it(model):
    message = refusal(inject, model, PeftConfig("full", train_also="atomic_energies_fn.*,readouts.*"))
    assert message == "train_also 'readouts.*' has no effect on full, which trains every parameter: leave it out"


def test_train_also_trains_base_parameters(model):
    inject(model, PeftConfig("mmea", rank=2, targets="products",
                             train_also="readouts.1.*, interactions.0.skip_tp.weight"))
    along = ["interactions.0.skip_tp.weight", "readouts.1.linear_1.weight", "readouts.1.linear_2.weight"]
    trainable = trainable_parameters(model)
    assert [name for name in trainable if ".adapter." not in name] == along
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == list(trainable)
    rows = rows_of(summary(model))
    assert set(rows) == {"products.0", "products.1", *along}
    for name in along:
        assert rows[name] == (model.get_parameter(name).numel(), "itself")


def test_train_also_may_name_what_has_an_adapter(model):
    base = sum(parameter.numel() for parameter in model.parameters())
    inject(model, PeftConfig("elora", rank=2, targets="readouts.*", train_also="readouts.*"))
    linears = names_of(model.readouts, o3.Linear)
    assert {f"readouts.{name}.weight" for name in linears} <= set(trainable_parameters(model))
    total = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    text = summary(model)
    assert f"Trainable: {total:,} parameters" in text and text.endswith(f"the base's {base:,}")


def test_train_also_that_matches_nothing_names_close_parameters(model):
    before = dict(vars(model))
    message = refusal(inject, model, PeftConfig("mmea", rank=2, train_also="readouts.0.linear.weights"))
    assert message.startswith("train_also 'readouts.0.linear.weights'")
    assert "did you mean readouts.0.linear.weight" in message and "'readouts.*'" in message
    assert dict(vars(model)) == before


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, expected", [
    ("interactions.0.conv_tp_weights.layer1", "interactions.0.conv_tp_weights"),
    ("products.0.symmetric_contractions.contractions.1", "products.0.symmetric_contractions"),
    ("products.0.symmetric_contractions", "products.0.symmetric_contractions"),
    ("products.0.linear", "products.0.linear"),
    ("readouts.0", "readouts.0"),
])
def test_the_parts_of_a_composite_go_by_its_name(model, name, expected):
    assert unit(model, name) == expected


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, targets, largest, widest", [
    ("mmea", "products", 4, "products.0"),  # 4 channels
    ("mmea", "interactions.1.linear", 12, "interactions.1.linear"),  # 3 paths of 4 channels to an irrep
    ("mmea", "readouts.1.linear_2", 8, "readouts.1.linear_2"),  # 8 in, 1 out
    ("elora", "interactions.1.linear", 4, "interactions.1.linear"),  # 12 in, 4 out
    ("elora", "readouts.1.linear_2", 1, "readouts.1.linear_2"),
    ("elora", "interactions.1.skip_tp", 4, "interactions.1.skip_tp"),  # 4 * 3 elements in, 4 out
    ("elora", "interactions.0.conv_tp_weights", 8, "interactions.0.conv_tp_weights.layer1"),  # [4, 8, 8, 8, 12]
    ("mmea", "interactions.1.skip_tp", 4, "interactions.1.skip_tp"),  # a low-rank update
    ("gates", "interactions.1.skip_tp", 4, "interactions.1.skip_tp"),
    ("gates", "interactions.1.conv_tp", 12, "interactions.1.linear"),
    ("elora+scales", "interactions.1.linear", 4, "interactions.1.linear"),
    ("small", "products.0.symmetric_contractions", 4, "products.0.symmetric_contractions.contractions.0"),
])
def test_a_rank_that_is_too_large_names_the_largest_of_use(model, method, targets, largest, widest):
    message = refusal(inject, model, PeftConfig(method, rank=largest + 1, targets=targets))
    assert message.startswith(f"rank {largest + 1} ") and f"({widest})" in message
    assert message.endswith(f"largest useful rank here is {largest}")
    assert not is_adapted(model)
    inject(model, PeftConfig(method, rank=largest, targets=targets))


def test_a_rank_of_a_shift_is_refused(model):
    message = refusal(inject, model, PeftConfig("elora+scales", targets="atomic_energies_fn"))
    assert message.startswith("rank 16 has no effect on atomic_energies_fn, which takes a shift")
    assert message.endswith("use method scales")


@pytest.mark.parametrize("targets, more", [("products", "products,*.skip_tp"), ("linears", "published")])
def test_alpha_without_low_rank_updates_is_refused(model, targets, more):
    message = refusal(inject, model, PeftConfig("mmea", rank=2, alpha=3, targets=targets))
    assert message.startswith(f"alpha 3 has no effect on gates, and nothing else is in targets {targets}")
    inject(model, PeftConfig("mmea", rank=2, alpha=3, targets=more))


def test_the_widest_target_decides_on_the_rank(model):
    inject(model, PeftConfig("elora", rank=8, targets="interactions.0.conv_tp_weights, readouts.1.linear_2"))
    assert len(adapted_blocks(model)) == 5


# --- refusals leave the model as it was -------------------------------------------------------------------------------


def test_a_second_injection_is_refused(model):
    inject(model, PeftConfig("mmea", rank=2))
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    message = refusal(inject, model, PeftConfig("elora", rank=2))
    assert "mmea" in message and "eject" in message
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    assert model.peft_config == PeftConfig("mmea", rank=2)


@pytest.mark.parametrize("settings", [{"rank": 1000}, {"targets": "nothing"}, {"train_also": "nothing"}])
def test_a_refused_injection_changes_nothing(model, settings):
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    attributes = set(vars(model))
    refusal(inject, model, PeftConfig("mmea", **{"rank": 2, **settings}))
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    assert set(vars(model)) == attributes and not names_of(model, Adapted)


def test_a_model_for_cuequivariance_is_refused(model):
    model.cueq_config = SimpleNamespace(enabled=True)
    assert "mace_cueq_to_e3nn" in refusal(inject, model, PeftConfig("mmea", rank=2))
    assert not is_adapted(model)


@pytest.mark.parametrize("action", [eject, trainable_parameters, summary])
def test_what_needs_adapters_says_so(model, action):
    assert "has no adapters: inject(model, config)" in refusal(action, model)


# --- other models -----------------------------------------------------------------------------------------------------

NON_LINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
NEWER = pytest.mark.since("0.3.14")  # has that block
OTHER_MODELS = {  # beside those of test_families.py
    "non-linear later": {"later": NON_LINEAR},
    "residual first": {"first": "RealAgnosticResidualInteractionBlock"},
    "two heads": {"heads": ("one", "two")},
}


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=NEWER if "non-linear" in name else ()) for name in OTHER_MODELS])
def other_model(request):
    return tiny_mace(**OTHER_MODELS[request.param])


@pytest.mark.parametrize("method, targets", [
    *((method, targets) for targets in ("products", "linears", "published") for method in ("mmea", "elora")),
    ("gates", "all"), ("elora+scales", "all")])
def test_other_models_run_with_every_placement(other_model, method, targets):
    structures = configurations(1)
    predict(other_model, structures)  # the first call of e3nn's compiled code may differ in the last bit
    expected = predict(other_model, structures)
    model = inject(deepcopy(other_model), PeftConfig(method, rank=2, targets=targets))
    predict(model, structures)
    for a, b in zip(predict(model, structures), expected, strict=True):
        assert torch.equal(a, b)

    randomise(model, scale=0.3)
    output = model(batch(model, structures), training=True, compute_force=True)
    assert (output["forces"] - expected[1]).norm() > 1e-3 * expected[1].norm()
    (output["energy"].sum() + output["forces"].pow(2).sum()).backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())
    assert names_of(eject(model), Adapted) == []


@NEWER
def test_the_newer_radial_mlp_is_one_unit():
    model = tiny_mace(first=NON_LINEAR, later=NON_LINEAR)
    inject(model, PeftConfig("elora", rank=2, targets="interactions.0.conv_tp_weights"))
    assert list(rows_of(summary(model))) == ["interactions.0.conv_tp_weights"]
