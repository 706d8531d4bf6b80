"""The gains of training go with the adapter, and the calculator warns, once, of those far from them."""

import re
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from tiny import configurations, loaded, predict, randomise, tiny_mace

from mace_peft import PeftConfig, calculator, inject, load_adapter, save_adapter
from mace_peft.inspect.figures import RANGE, draw_gains
from mace_peft.inspect.gain_ranges import gain_ranges, limits, watched
from mace_peft.inspect.gains import gain_statistics
from mace_peft.inspect.info import info
from mace_peft.model.adapted import adapted_blocks


def adapted(method="mmea", **settings):
    model = inject(tiny_mace(), PeftConfig(method, rank=2, **settings))
    for block in adapted_blocks(model).values():
        randomise(block.adapter)
    return model


@pytest.fixture
def trained(tmp_path):
    """A directory whose ranges are those of some structures."""
    model = adapted()
    model.peft_gains = gain_ranges(model, [loaded(model, configurations(3)), loaded(model, configurations(2, seed=1))])
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_ranges_are_those_of_all_atoms_and_channels(trained):
    model = load_adapter(tiny_mace(), trained)
    boxes = gain_statistics(model, configurations(3) + configurations(2, seed=1))["blocks"]
    assert model.peft_gains.keys() == boxes.keys()
    for name, ends in model.peft_gains.items():
        inside = [value for irrep in boxes[name].values() for box in irrep.values() for value in box.values()]
        assert ends["low"] <= min(inside) and max(inside) <= ends["high"]
        assert ends["low"] == pytest.approx(min(inside), rel=0.1)
        assert ends["high"] == pytest.approx(max(inside), rel=0.1)


def test_what_has_no_gates_has_no_ranges():
    assert gain_ranges(adapted("elora"), []) is None


def test_the_calculator_warns_once_of_gains_far_outside(trained):
    home, model = configurations(3)[0], load_adapter(tiny_mace(), trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calculator(tiny_mace(), trained).calculate(home)

    name = "products.0.linear"
    gains = []
    with watched(model, lambda gate, found: gains.append(found) if gate == name else None):
        predict(model, [home])
    highest = gains[0].max(-1).values
    model.peft_gains[name] = {"low": gains[0].min().item(), "high": highest.max().item() / 2}  # as of other data
    save_adapter(model, trained)
    calc, atom = calculator(tiny_mace(), trained), int(highest.argmax())
    with pytest.warns(UserWarning, match=rf"{name} has a gain of .* at atom {atom} \({home.symbols[atom]}\) of CH4O"):
        calc.calculate(home)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calc.calculate(configurations(3)[1])
    assert not any(module._forward_pre_hooks for module in calc.models[0].modules())  # it costs nothing any more


@pytest.mark.parametrize("low, high, least, most", [
    (0.9, 1.0, 0.9 / 1.1, 1.1), (1.0, 16.0, 0.5, 32.0), (0.5, 8.0, 0.25, 16.0)])
def test_far_is_a_quarter_of_the_width_and_at_least_a_tenth(low, high, least, most):
    assert limits(low, high) == pytest.approx((least, most))


def test_what_was_seen_of_another_structure_is_forgotten(trained):
    """Such as one whose prediction failed, or that the model was asked for outside of the calculator."""
    calc = calculator(tiny_mace(), trained)
    (guard,), large, small = calc.guards, configurations(1, "CH3CH2OH")[0], configurations(1, "H2O")[0]
    guard.ranges = {name: {"low": 0.99, "high": 1.0} for name in guard.ranges}
    predict(calc.models[0], [large])
    with pytest.warns(UserWarning, match=r"at atom [012] \([HO]\) of H2O"):
        calc.calculate(small)


def test_predictions_are_the_same_with_and_without_a_guard(trained):
    watched, model = calculator(tiny_mace(), trained), load_adapter(tiny_mace(), trained)
    model.peft_gains = None
    save_adapter(model, trained)
    unwatched = calculator(tiny_mace(), trained)
    for calc in (watched, unwatched):
        calc.calculate(configurations(1)[0])
    np.testing.assert_array_equal(watched.results["forces"], unwatched.results["forces"])


def test_a_gate_whose_gains_are_not_finite_has_no_range():
    model = adapted(gate="exp", targets="products")
    with torch.no_grad():
        model.products[0].adapter.b2.fill_(1e4)
    assert "products.0" not in gain_ranges(model, [loaded(model, configurations(1))])


def test_info_and_the_figure_show_them(trained):
    model = load_adapter(tiny_mace(), trained)
    said = info(str(trained))
    figure = draw_gains(gain_statistics(model, configurations(2)))
    bands = {axes.get_title(): [patch for patch in axes.patches if to_hex(patch.get_facecolor()) == RANGE]
             for axes in figure.axes}
    for name, ends in model.peft_gains.items():
        assert re.search(rf"\| {name} .*\| +{ends['low']:.3g} to {ends['high']:.3g} +\|", said)
        (band,) = bands[name]
        assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((ends["low"], ends["high"]))
