"""The figures: gains and singular values against their equations, and what is drawn against what was computed."""

import copy
import functools
import io
import itertools
import json
import math
import sys

import mace  # noqa: F401  before e3nn
import numpy as np
import pytest
import torch
from ase import Atoms
from e3nn import o3
from matplotlib.text import Text
from tiny import batch, configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, PeftError, inject
from mace_peft.inspect.figures import draw_constant_gains, draw_gains, draw_updates
from mace_peft.inspect.gains import constant_gains, gain_statistics
from mace_peft.inspect.spectra import update_spectra
from mace_peft.methods import METHODS, matrices
from mace_peft.methods.mmea import BOUND
from mace_peft.model.inject import fold

STRUCTURES = configurations(7, "CH3CH2OH") + configurations(6, "H2O")  # two batches, no carbon in the last structures
ELEMENTS = {1: "H", 6: "C", 8: "O"}
NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"


@functools.cache
def foundation(**options):
    return tiny_mace(**options)


def adapted(method, targets, gate=None, **options):
    """A tiny model of which every adapter weight is random; alpha / rank is not 1, so that a missing scale shows."""
    settings = {"rank": 2, "alpha": 3.0, "gate": gate}
    if method == "mmea" and targets != "published":  # gates have no such scale
        del settings["alpha"]
    settings = {name: value for name, value in settings.items() if name in METHODS[method].settings}
    return randomise(inject(copy.deepcopy(foundation(**options)), PeftConfig(method, targets=targets, **settings)))


@functools.cache
def statistics():
    return gain_statistics(adapted("mmea", "linears", max_L=2), STRUCTURES)


@functools.cache
def spectra():
    return update_spectra(adapted("elora", "published"))


# --- the gains of MMEA ------------------------------------------------------------------------------------------------


def test_gains_that_are_set_by_hand():
    """W1 = W2 = 0 leaves the gains exp(b2), the same for all atoms."""
    model = adapted("mmea", "products", "exp", max_L=2)
    gate = model.products[0].adapter
    with torch.no_grad():
        gate.W1.zero_(), gate.W2.zero_()
        gate.b2.copy_(torch.tensor([1.0, 2, 3, 4, 10, 20, 30, 40]).log())  # 4x1o, 4x2e
    result = gain_statistics(model, STRUCTURES)
    box = {"whislo": 1, "q1": 1.75, "med": 2.5, "q3": 3.25, "whishi": 4}
    for element in ELEMENTS.values():
        assert result["blocks"]["products.0"]["1o"][element] == pytest.approx(box)
        assert result["blocks"]["products.0"]["2e"][element] == pytest.approx({k: 10 * v for k, v in box.items()})


@pytest.mark.parametrize("gate, dtype", [("exp", torch.float32), ("bounded", torch.float64)])
def test_gains_follow_the_equations_by_element_and_irrep(gate, dtype):
    model = adapted("mmea", "interactions.1.linear", gate, max_L=2, dtype=dtype)
    block = model.interactions[1].linear
    assert str(block.irreps_in).startswith("4x0e+4x0e+4x0e+4x1o") and str(block.irreps_out) == "4x0e+4x1o+4x2e"
    model(batch(model, STRUCTURES), compute_force=False)  # after which it knows the energies of isolated atoms
    inputs = []
    hook = block.register_forward_pre_hook(lambda _, given: inputs.extend(given[0].tolist()))
    model(batch(model, STRUCTURES), compute_force=False)
    hook.remove()

    W1, b1, W2, b2 = (getattr(block.adapter, name).tolist() for name in ("W1", "b1", "W2", "b2"))
    gains = {(irrep, number): [] for irrep in ("1o", "2e") for number in ELEMENTS}
    numbers = [number for atoms in STRUCTURES for number in atoms.numbers]
    for number, x in zip(numbers, inputs, strict=True):
        y = [b1[k] + sum(x[i] * W1[i][k] for i in range(12)) for k in range(2)]
        z = ([value / (1 + math.exp(-value)) for value in y] if gate == "exp" else
             [math.tanh(value) - math.tanh(b) for value, b in zip(y, b1, strict=True)])
        for channel in range(8):
            gamma = b2[channel] + sum(z[k] * W2[k][channel] for k in range(2))
            irrep = "1o" if channel < 4 else "2e"
            gains[irrep, number].append(math.exp(gamma if gate == "exp" else BOUND * math.tanh(gamma / BOUND)))

    result = gain_statistics(model, STRUCTURES)
    assert result["structures"] == 13 and result["atoms"] == {"H": 54, "C": 14, "O": 13}
    assert list(result["blocks"]) == ["interactions.1.linear"]
    assert list(result["blocks"]["interactions.1.linear"]) == ["1o", "2e"]
    for (irrep, number), values in gains.items():
        box = result["blocks"]["interactions.1.linear"][irrep][ELEMENTS[number]]
        percentiles = [box[name] for name in ("whislo", "q1", "med", "q3", "whishi")]
        assert percentiles == pytest.approx(np.percentile(values, [1, 25, 50, 75, 99]), rel=1e-5)


def test_gates_that_only_shift_are_left_out():
    blocks = {name: list(irreps) for name, irreps in statistics()["blocks"].items()}
    assert blocks == {"interactions.0.linear": ["1o", "2e"], "interactions.1.linear_up": ["1o", "2e"],
                      "interactions.1.linear": ["1o", "2e"], "products.0.linear": ["1o", "2e"]}


def test_elements_that_the_structures_lack_are_left_out():
    result = gain_statistics(adapted("mmea", "products"), configurations(1, "H2O"))
    assert list(result["atoms"]) == list(result["blocks"]["products.0"]["1o"]) == ["H", "O"]


def test_gains_of_messages_are_apart_from_those_of_the_layer_that_takes_them():
    model = adapted("gates", "all")
    blocks = gain_statistics(model, STRUCTURES[:1])["blocks"]
    assert {"interactions.1.linear", "interactions.1.linear, messages"} < set(blocks)
    assert list(blocks["interactions.1.linear, messages"]) == ["1o", "2e"]


@pytest.mark.since("0.3.14")
def test_linear_layers_of_every_interaction_block_act_on_atoms():
    model = adapted("mmea", "linears", later=NONLINEAR, first=NONLINEAR)
    result = gain_statistics(model, STRUCTURES[:1])
    assert {"interactions.1.linear_res", "interactions.1.linear_2"} < set(result["blocks"])


def test_computing_gains_leaves_no_trace(capsys):
    model, dtype = adapted("mmea", "products"), torch.get_default_dtype()
    before = predict(model, STRUCTURES)
    capsys.readouterr()
    gain_statistics(model, STRUCTURES)
    assert capsys.readouterr() == ("", "")
    assert all(torch.equal(a, b) for a, b in zip(before, predict(model, STRUCTURES), strict=True))
    assert torch.get_default_dtype() == dtype != next(model.parameters()).dtype
    assert not model.products[0].adapter._forward_pre_hooks


def test_progress_shows_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    gain_statistics(adapted("mmea", "products"), STRUCTURES)
    assert "2/2" in terminal.getvalue()


def fails(function, *arguments) -> str:
    with pytest.raises(PeftError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_gains_need_structures_of_known_elements():
    model = adapted("mmea", "products")
    model.forward = None  # nothing is evaluated
    assert "list of structures is empty" in fails(gain_statistics, model, [])
    assert "a structure is empty" in fails(gain_statistics, model, [STRUCTURES[0], Atoms()])
    message = fails(gain_statistics, model, [STRUCTURES[0], Atoms("HgN")])
    assert "have N Hg" in message and "knows H C O" in message


def test_gains_need_a_gate_with_gains():
    for model in (adapted("elora", "products"), adapted("mmea", "products.1")):
        assert model.peft_config.targets in fails(gain_statistics, model, STRUCTURES)
    for function in (gain_statistics, lambda model, _: update_spectra(model)):
        assert "no adapters" in fails(function, foundation(), STRUCTURES)


@pytest.mark.parametrize("rows, message", [(0, "acted on 0 rows for 81 atoms"), (3, "acted on 87 rows for 81 atoms")])
def test_gains_of_other_rows_than_atoms_are_refused(rows, message):
    model = adapted("mmea", "products", "exp")
    gate, features = model.products[0].adapter, torch.zeros(rows, 16, dtype=torch.float64)
    if rows:
        model.register_forward_hook(lambda *_: gate(features, features))
    else:
        model.forward = lambda *_, **options: None
    assert f"products.0 {message}" in fails(gain_statistics, model, STRUCTURES)
    assert not gate._forward_pre_hooks


@pytest.mark.parametrize("value", [math.nan, 1e4])
def test_gains_that_are_not_finite_are_refused(value):
    model = adapted("mmea", "products", "exp")
    torch.nn.init.constant_(model.products[0].adapter.b2, value)
    assert "gains at products.0 are not finite" in fails(gain_statistics, model, STRUCTURES)


# --- constant gains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["scales", "elora+scales"])
def test_constant_gains_are_the_ratios_of_merged_to_base_weights(method):
    model = adapted(method, "all")
    base = copy.deepcopy(model)
    for name, parameter in base.named_parameters():
        if name.endswith(".g"):
            torch.nn.init.zeros_(parameter)
    units, merged, base = constant_gains(model)["units"], fold(model), fold(base)
    for name in ("interactions.0.linear_up", "interactions.1.linear_up"):
        ratios = (merged.get_submodule(name).weight / base.get_submodule(name).weight).view(-1, 4, 4)
        assert ratios[:, 0].flatten().tolist() == pytest.approx(units[name])
    layers = [(merged.get_submodule(f"interactions.0.conv_tp_weights.layer{i}").weight
               / base.get_submodule(f"interactions.0.conv_tp_weights.layer{i}").weight)[0] for i in range(4)]
    assert torch.cat(layers).tolist() == pytest.approx(units["interactions.0.conv_tp_weights"])
    contractions = [(m.weights_max / b.weights_max)[:, 0] for m, b in zip(
        merged.products[0].symmetric_contractions.contractions, base.products[0].symmetric_contractions.contractions,
        strict=True)]
    assert torch.cat([gains.flatten() for gains in contractions]).tolist() == pytest.approx(
        units["products.0.symmetric_contractions"])
    assert "atomic_energies_fn" not in units  # a shift


def test_constant_gains_need_some_that_are_finite():
    for method, targets in (("mmea", "products"), ("mmea", "published"), ("gates", "all"), ("elora", "products")):
        assert "no constant gains" in fails(constant_gains, adapted(method, targets))
    model = adapted("scales", "linears")
    torch.nn.init.constant_(model.products[0].linear.adapter.g, 1e4)
    assert "gains of products.0.linear are not finite" in fails(constant_gains, model)


@pytest.mark.parametrize("method, title", [("scales", "scales"), ("elora+scales", "ELoRA and scales")])
def test_a_box_for_each_module_with_constant_gains(method, title):
    gains = constant_gains(adapted(method, "all"))
    figure = draw_constant_gains(gains)
    axes, = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{name} ({len(values)})" for name, values in gains["units"].items()]
    assert title in figure.get_suptitle()


# --- low-rank updates -------------------------------------------------------------------------------------------------


def rows(module, *counts):
    """The module's weights, which lie one after the other, as matrices of so many rows and 4 columns."""
    return [part.view(-1, 4) for part in module.weight.split([4 * count for count in counts])]


# by unit of the tiny model (3 elements, 4 channels): the names of its weights, and each as a matrix
MATRICES = {
    "node_embedding.linear": (["0e"], lambda m: rows(m.node_embedding.linear, 3)),
    "interactions.0.linear": (["0e", "1o", "2e"], lambda m: rows(m.interactions[0].linear, 4, 4, 4)),
    "interactions.1.linear": (["0e", "1o", "2e"], lambda m: rows(m.interactions[1].linear, 8, 12, 8)),
    "interactions.0.skip_tp": (["0e*0e", "1o*0e", "2e*0e"], lambda m: rows(m.interactions[0].skip_tp, 12, 12, 12)),
    "interactions.0.conv_tp_weights": (
        ["layer0", "layer1", "layer2", "layer3"],
        lambda m: [layer.weight for layer in m.interactions[0].conv_tp_weights]),
    "products.0.symmetric_contractions": (
        ["contractions.0", "contractions.1"],
        lambda m: [c.weights_max.reshape(-1, 4) for c in m.products[0].symmetric_contractions.contractions]),
}
NEWER = {  # its radial MLP is made of nn.Linear layers
    "interactions.1.conv_tp_weights": (
        ["net.0", "net.3", "net.6", "net.9"],
        lambda m: [m.interactions[1].conv_tp_weights.net[i].weight for i in (0, 3, 6, 9)]),
}


@pytest.mark.parametrize("method, options, expected", [
    ("elora", {}, MATRICES),
    ("mmea", {}, {name: MATRICES[name] for name in MATRICES if "linear" not in name}),
    pytest.param("elora", {"later": NONLINEAR}, NEWER, marks=pytest.mark.since("0.3.14")),
])
def test_singular_values_are_those_of_merged_minus_base_weights(method, options, expected):
    base = foundation(**options)
    model = adapted(method, "published", **options)
    units = update_spectra(model)["units"]
    merged = fold(model)
    for name, (names, split) in expected.items():
        assert [update["weight"] for update in units[name]] == names
        for update, before, after in zip(units[name], split(base), split(merged), strict=True):
            values = torch.linalg.svdvals(after - before)
            assert update["singular_values"] == pytest.approx(values[:2].tolist())
            assert values[2:].sum() < 1e-12 and values[0] > 0.01
            assert update["weight_norm"] == pytest.approx(before.pow(2).sum().sqrt().item())


def test_an_irrep_in_several_blocks_is_one_matrix():
    block = o3.Linear("2x0e+1x1o+3x0e", "2x0e+2x1o+1x0e").double()
    w = torch.arange(17.0).double() + 1
    with torch.no_grad():
        block.weight.copy_(w)
    model = inject(torch.nn.ModuleDict({"layer": block}), PeftConfig("elora", rank=2, alpha=3, targets="layer"))
    randomise(block.adapter)
    # e3nn's order: first to first 0e, first 0e to last, 1o, last 0e to first, last to last
    base = {"0e": torch.cat([torch.cat([w[:4].view(2, 2), w[4:6].view(2, 1)], 1),
                             torch.cat([w[8:14].view(3, 2), w[14:].view(3, 1)], 1)]), "1o": w[6:8].view(1, 2)}
    assert {irrep: matrix.tolist() for irrep, matrix in matrices(block.adapter.parts, {"weight": w}).items()} == {
        irrep: matrix.tolist() for irrep, matrix in base.items()}
    for update, irrep in zip(update_spectra(model)["units"]["layer"], base, strict=True):
        values = torch.linalg.svdvals(1.5 * block.adapter.A[irrep] @ block.adapter.B[irrep])
        assert update["weight"] == irrep and update["weight_norm"] == pytest.approx(base[irrep].norm().item())
        assert update["singular_values"] == pytest.approx(values[:2].tolist())


def test_every_updated_module_is_there_once():
    units = spectra()["units"]
    assert list(units) == ["node_embedding.linear", "interactions.0.linear_up", "interactions.0.conv_tp_weights",
                           "interactions.0.linear", "interactions.0.skip_tp", "interactions.1.linear_up",
                           "interactions.1.conv_tp_weights", "interactions.1.linear", "interactions.1.skip_tp",
                           "products.0.symmetric_contractions", "products.0.linear",
                           "products.1.symmetric_contractions", "products.1.linear",
                           "readouts.0.linear", "readouts.1.linear_1", "readouts.1.linear_2"]
    published = update_spectra(adapted("mmea", "published"))["units"]  # gates at the linear layers
    assert list(published) == [name for name in units if not name.rpartition(".")[2].startswith("linear")]


def test_updates_need_a_low_rank_update():
    message = fails(update_spectra, adapted("mmea", "products"))
    assert message.startswith("method mmea at products has no low-rank update")
    assert "draw an adapter of elora" in message


def test_updates_that_are_not_finite_are_refused():
    model = adapted("elora", "products.0.linear")
    torch.nn.init.constant_(model.products[0].linear.adapter.B["0e"], math.nan)
    assert "update of products.0.linear is not finite" in fails(update_spectra, model)


# --- figures ----------------------------------------------------------------------------------------------------------


def drawn_from_file(draw, values):
    """The figure that is drawn from the values' JSON, and after it has been saved."""
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text) == values
    figure = draw(json.loads(text))
    file = io.BytesIO()
    figure.savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")
    return figure


def test_lines_are_singular_values_over_the_norm_of_the_weight():
    figure = drawn_from_file(draw_updates, spectra())
    assert figure.get_suptitle().startswith("ELoRA, rank 2")
    assert [axes.get_title().replace("\n", "") for axes in figure.axes] == list(spectra()["units"])
    for axes, updates in zip(figure.axes, spectra()["units"].values(), strict=True):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        low, high = axes.get_ylim()
        for line, label, update in zip(axes.lines, labels, updates, strict=True):
            ratios = [value / update["weight_norm"] for value in update["singular_values"]]
            assert list(line.get_xdata()) == list(range(1, len(ratios) + 1))
            assert list(line.get_ydata()) == pytest.approx(ratios)
            assert all(low < ratio < high for ratio in ratios)
            name, percentage = label.removesuffix(" %)").split(" (")
            assert name == update["weight"]
            assert float(percentage) == pytest.approx(100 * math.hypot(*ratios), rel=0.06)
        styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert len(styles) == len(updates)


def test_updates_of_zero_are_drawn_as_none():
    model = adapted("elora", "products")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    for axes in drawn_from_file(draw_updates, update_spectra(model)).axes:
        assert all("(0 %)" in text.get_text() for text in axes.get_legend().get_texts())


def test_boxes_are_those_of_the_statistics_above_their_labels():
    figure = drawn_from_file(draw_gains, statistics())
    assert figure.get_suptitle() == "MMEA, rank 2, gate bounded: gains at 81 atoms of 13 structures"
    assert "gain" in figure.get_supylabel() and "1st and 99th percentile" in figure.legends[0].get_title().get_text()
    assert [axes.get_title() for axes in figure.axes] == list(statistics()["blocks"])
    for axes, irreps in zip(figure.axes, statistics()["blocks"].values(), strict=True):
        labels = {tick: label.get_text() for tick, label in
                  zip(axes.get_xticks(minor=True), axes.get_xticklabels(minor=True), strict=True)}
        centres = {tick: label.get_text().strip() for tick, label in
                   zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
        assert list(labels.values()) == ["H", "C", "O"] * 2 and list(centres.values()) == ["1o", "2e"]
        for patch in axes.patches:
            (x0, y0), (x1, y1) = patch.get_path().get_extents().get_points()
            irrep = centres[min(centres, key=lambda centre: abs(centre - (x0 + x1) / 2))]
            box = irreps[irrep][labels[(x0 + x1) / 2]]
            assert (y0, y1) == pytest.approx((box["q1"], box["q3"]))
        assert len(axes.patches) == 6
        shades = [patch.get_facecolor()[0] for patch in axes.patches]
        assert shades[:3] == shades[3:] and len(set(shades)) == 3  # one lightness per element
        drawn = [box for found in irreps.values() for box in found.values()]
        low, high = axes.get_ylim()
        assert low < min(box["whislo"] for box in drawn) and high > max(box["whishi"] for box in drawn)


@pytest.mark.parametrize("factor, scale", [(1, "linear"), (100, "log")])
def test_gains_over_more_than_a_decade_have_a_log_scale(factor, scale):
    box = {"whislo": 0.9, "q1": 0.95, "med": 1.0, "q3": 1.1, "whishi": 1.2 * factor}
    values = {"peft": PeftConfig("mmea").to_dict(), "structures": 1, "atoms": {"H": 2},
              "blocks": {"products.0": {"1o": {"H": box}}}}
    (axes,) = draw_gains(values).axes
    assert axes.get_yscale() == scale


def check_texts(figure, but=frozenset()):
    """All texts lie inside the figure, and none, but for these, on another."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:  # where it ends, no tick is drawn
        low, high = sorted(axis.get_view_interval())
        undrawn = {label for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
                   if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
        texts = [text for text in texts if text not in undrawn]
    extents = [text.get_window_extent() for text in texts]
    for one, text in zip(extents, texts, strict=True):
        assert figure.bbox.x0 <= one.x0 < one.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= one.y0 < one.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in itertools.combinations(zip(extents, texts, strict=True), 2):
        if not {first, second} & but:
            assert not one.overlaps(other), (first, second)
    return texts


LONG_NAMES = [f"field_dependent_charges_maps.{i}.potential_embedding.potential_linear" for i in range(12)]


@pytest.mark.parametrize("modules, elements", [(1, ["Si"]), (2, ["H", "C", "N", "O", "Si", "Cl"]), (12, ["H", "O"])])
def test_texts_of_gains_neither_overlap_nor_leave_the_figure(modules, elements):
    box = {"whislo": 0.5, "q1": 0.9, "med": 1.0, "q3": 1.1, "whishi": 2.0}
    irreps = {irrep: dict.fromkeys(elements, box) for irrep in ("1o", "2e", "3o")}
    figure = draw_gains({"peft": PeftConfig("mmea").to_dict(), "structures": 1, "atoms": dict.fromkeys(elements, 5),
                         "blocks": dict.fromkeys(LONG_NAMES[:modules], irreps)})
    irrep_labels = {text for axes in figure.axes for text in axes.get_xticklabels()}  # whose first line is empty
    texts = check_texts(figure, irrep_labels)
    assert {figure._suptitle, figure._supylabel} < set(texts)


@pytest.mark.parametrize("modules", [1, 3, 12])
def test_texts_of_constant_gains_neither_overlap_nor_leave_the_figure(modules):
    gains = {"peft": PeftConfig("small").to_dict(), "units": dict.fromkeys(LONG_NAMES[:modules], [0.9, 1.0, 1.3])}
    figure = draw_constant_gains(gains)
    texts = check_texts(figure)
    assert {figure._suptitle, figure._supxlabel, *figure.axes[0].get_yticklabels()} < set(texts)


@pytest.mark.parametrize("modules, weights", [(1, 1), (4, 3), (12, 5)])
def test_updates_fill_their_panels_and_their_texts_stay_outside(modules, weights):
    updates = [{"weight": f"contractions.{i}", "weight_norm": 1.0, "singular_values": [0.3, 0.03, 0.003]}
               for i in range(weights)]
    units = dict.fromkeys(LONG_NAMES[:modules], updates)
    figure = draw_updates({"peft": PeftConfig("elora").to_dict(), "units": units})
    texts = check_texts(figure)
    for axes in figure.axes:
        low, high = (math.log(limit) for limit in axes.get_ylim())
        assert math.log(0.3 / 0.003) > 0.75 * (high - low)
        panel = axes.get_window_extent()
        assert not [text for text in texts if text.get_window_extent().overlaps(panel)]
        assert set(axes.get_legend().get_texts()) < set(texts) and panel.height > 100  # pixels
