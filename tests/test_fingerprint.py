"""The fingerprint sees what changes a prediction, and nothing else."""

import copy
import io
import numbers
from collections import OrderedDict, deque

import e3nn
import numpy as np
import pytest
import torch
from e3nn import o3
from releases import since
from remembered import BUILT
from tiny import configurations, new_mace, predict, tiny_mace

from mace_peft import PeftConfig, PeftError, eject, inject, load_adapter, save_adapter
from mace_peft.adapter.load import become
from mace_peft.fast.messages import fast_messages
from mace_peft.model.adapted import fingerprint

STRUCTURES = [*configurations(1), *configurations(1, "H2O")]
FAMILIES = [{}, {"interactions": 1, "correlation": 2}, {"pair_repulsion": True, "distance_transform": "Agnesi"},
            {"first": "RealAgnosticDensityInteractionBlock", "later": "RealAgnosticDensityResidualInteractionBlock"}]
if since("0.3.15"):
    FAMILIES.append({"first": "RealAgnosticResidualNonLinearInteractionBlock",
                     "later": "RealAgnosticResidualNonLinearInteractionBlock"})


def other(value):
    """Another value of the kind, or None for what is no number, text, array or container of such."""
    if isinstance(value, (bool, np.bool_)):
        return not value
    if isinstance(value, numbers.Number):
        return type(value)(value * 2 + 1)
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.dtype not in (bool, torch.bool):
        return value * 2 + 1
    if isinstance(value, list) and value and other(value[0]) is not None:
        return [other(value[0]), *value[1:]]
    return {"component": "norm", "norm": "component"}.get(value) if isinstance(value, str) else None


def places(model):
    """For every tensor and attribute of every module: its name, how it is set, its value and another one."""
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        for key, tensor in tensors.items():
            if tensor is not None and tensor.numel():
                changed = tensor.detach().flip(0) if key == "atomic_numbers" else tensor.detach() * 1.5 + 1
                yield f"{name}.{key}", lambda new, held=tensor: setattr(held, "data", new), tensor.data, changed
        if not isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
            for key, value in list(vars(module).items()):
                if (changed := other(value)) is not None and key != "training":
                    yield f"{name}.{key}", lambda new, held=module, at=key: vars(held).update({at: new}), value, changed


def outcome(model):
    """Predictions of each structure, or why there are none."""
    try:
        return [tensor.nan_to_num() for structure in STRUCTURES for tensor in predict(model, [structure])]
    except Exception as error:  # another value of an attribute fails in many ways
        return type(error)


def differ(one, other):
    if not isinstance(one, list) or not isinstance(other, list):
        return one is not other
    return any(a.shape != b.shape or not torch.allclose(a, b, rtol=1e-8, atol=1e-8)
               for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", FAMILIES, ids=str)
def test_whatever_changes_a_prediction_changes_the_fingerprint(options):
    model = tiny_mace(**options)
    expected, known = outcome(model), fingerprint(model)
    assert isinstance(expected, list) and fingerprint(model) == known  # a prediction leaves no trace
    acting, unseen = [], []
    for name, put, value, changed in places(model):
        put(changed)
        seen = fingerprint(model) != known
        if not seen or name.rpartition(".")[2] in ("r_max", "atomic_energies"):
            if differ(outcome(model), expected):
                (acting if seen else unseen).append(name)
        put(value)
    assert not unseen
    assert {"radial_embedding.cutoff_fn.r_max", "atomic_energies_fn.atomic_energies"} <= set(acting)
    assert fingerprint(model) == known


@pytest.mark.parametrize("change", [
    lambda model: model.atomic_numbers.copy_(torch.tensor([8, 6, 1])),
    lambda model: setattr(model, "heads", ["other"]),
    lambda model: setattr(model.interactions[1], "avg_num_neighbors", torch.tensor(9.0)),
    lambda model: setattr(model.readouts[1].non_linearity.acts[0], "f", torch.tanh),
    lambda model: setattr(model.readouts[1], "__class__", type("Other", (type(model.readouts[1]),), {})),
    lambda model: next(buffer for name, buffer in model.named_buffers() if "U_matrix" in name).mul_(1.1),
], ids=["order of elements", "heads", "a tensor that is no buffer", "activation", "class", "U matrix"])
def test_an_adapter_does_not_go_to_a_foundation_that_differs(tmp_path, change):
    save_adapter(inject(tiny_mace(), PeftConfig("mmea", rank=2, targets="products")), tmp_path)
    foundation = tiny_mace()
    change(foundation)
    with pytest.raises(PeftError, match="weights differ"):
        load_adapter(foundation, tmp_path)


def test_what_changes_no_prediction_keeps_the_fingerprint():
    model, file = tiny_mace(), io.BytesIO()
    known = fingerprint(model)
    torch.save(model, file)
    file.seek(0)
    older = tiny_mace()
    del older.heads  # as in files of before MACE had them
    older.atomic_energies_fn.atomic_energies = torch.atleast_2d(older.atomic_energies_fn.atomic_energies)
    for same in (copy.deepcopy(model), torch.load(file, weights_only=False), tiny_mace().float(),
                 tiny_mace().float().double(), tiny_mace().eval().requires_grad_(False), older):
        assert fingerprint(same) == known


@pytest.mark.parametrize("config", [PeftConfig("mmea", rank=2, train_also="readouts.*"), PeftConfig("scales"),
                                    PeftConfig("elora+scales", rank=2)], ids=lambda config: config.method)
def test_adapters_keep_the_fingerprint_of_their_base(config):
    known = fingerprint(tiny_mace())
    model = inject(tiny_mace(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    assert fingerprint(model) == known
    assert fingerprint(fast_messages(copy.deepcopy(model))) == known
    assert fingerprint(eject(model)) == known


def test_compiled_or_not_the_fingerprint_is_the_same():
    made = []
    for compiled in (False, True):
        before = e3nn.get_optimization_defaults()["jit_script_fx"]
        e3nn.set_optimization_defaults(jit_script_fx=compiled)
        torch.manual_seed(0)
        BUILT.clear()  # no copy, which would be compiled
        try:
            made.append(new_mace())
        finally:
            e3nn.set_optimization_defaults(jit_script_fx=before)
    fewer, more = (sum(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
                   for model in made)
    assert fewer < more
    assert fingerprint(made[0]) == fingerprint(made[1])


class Scaled(torch.nn.Module):
    """What a model of e3nn's layers may have beside them."""

    def __init__(self, **attributes):
        super().__init__()
        self.layer = o3.Linear("2x0e+1x1o", "1x0e+1x1o")
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(3.0))
        for name, value in {"factor": 2.0, "bias": np.array([0.5]), "settings": {"on": True, "kind": "soft"},
                            "activation": torch.tanh, **attributes}.items():
            setattr(self, name, value)


@pytest.mark.parametrize("attributes", [
    {"factor": 2.5}, {"bias": np.array([0.6])}, {"settings": {"on": False, "kind": "soft"}}, {"activation": torch.sin},
    {"settings": {"on": True, "kind": "hard"}}, {"more": (1, 2)}],
    ids=["a number", "an array", "a switch", "a function", "a text", "more"])
def test_attributes_of_other_models_count(attributes):
    assert fingerprint(Scaled(**attributes)) != fingerprint(Scaled())


def linear(seed):
    torch.manual_seed(seed)
    return o3.Linear("2x0e+1x1o", "2x0e+1x1o")


ONE, TWO = linear(1), linear(2)


def with_buffer(buffer):
    model = Scaled()
    model.register_buffer("more", buffer)
    return model


@pytest.mark.parametrize("one, other", [
    (torch.nn.Sequential(ONE, ONE), torch.nn.Sequential(ONE)),
    (torch.nn.Sequential(OrderedDict(a=ONE, b=TWO)), torch.nn.Sequential(OrderedDict(b=TWO, a=ONE))),
    (Scaled(more=slice(0, 2)), Scaled(more=slice(2, 4))),
    (Scaled(more=range(0, 2)), Scaled(more=range(2, 4))),
    (Scaled(more=deque([0, 1])), Scaled(more=deque([2, 3]))),
    (Scaled(hooke_constant=1.0), Scaled(hooke_constant=5.0)),
    (with_buffer(torch.tensor(2**30)), with_buffer(torch.tensor(2**30 + 1))),
    (Scaled(more=np.array(2**30)), Scaled(more=np.array(2**30 + 1))),
    (Scaled(more=np.array("abc")), Scaled(more=np.array("abd"))),
], ids=["a module twice", "order", "slice", "range", "deque", "no hook", "buffer of int64", "array of int64", "text"])
def test_whatever_changes_predictions_of_other_models_counts(one, other):
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("one, other", [
    (Scaled(more=np.arange(3.0)[::-1]), Scaled(more=np.array([2.0, 1.0, 0.0]))),
    (Scaled(more=np.arange(3.0).astype(">f8")), Scaled(more=np.arange(3.0))),
    (Scaled(more=np.arange(3.0).astype(np.longdouble)), Scaled(more=np.arange(3.0))),
    (Scaled(more=np.array("abc")), Scaled(more="abc")),
    (Scaled(more=np.str_("abc")), Scaled(more="abc")),
    (with_buffer(torch.eye(3).to_sparse()), with_buffer(torch.eye(3))),
    (with_buffer(torch.tensor([1 + 2j]).conj()), with_buffer(torch.tensor([1 - 2j]))),
    (with_buffer(torch.tensor([1 + 2j]).conj().imag), with_buffer(torch.tensor([-2.0]))),
], ids=["strides", "byte order", "long double", "0-d text", "text of numpy", "sparse", "conjugated", "negated"])
def test_how_numbers_are_held_does_not_count(one, other):
    assert fingerprint(one) == fingerprint(other)


def test_what_cannot_be_read_is_one_line():
    model = Scaled()
    model.layer.register_buffer("more", torch.ones(3, device="meta"))
    with pytest.raises(PeftError, match=r"^layer.more of the Scaled cannot be read for its fingerprint \(") as error:
        fingerprint(model)
    assert "\n" not in str(error.value)


def test_a_module_of_two_places_keeps_its_fingerprint_where_it_trains_along():
    model = torch.nn.Sequential(linear(1), linear(2))
    model.append(model[0])
    known = fingerprint(model)
    inject(model, PeftConfig("elora", rank=1, targets="1", train_also="0.*"))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert fingerprint(model) == known


def test_a_model_takes_over_all_but_hooks():
    model, hook = Scaled(hooke_constant=1.0), lambda *_: None
    model.register_forward_hook(hook)
    become(model, Scaled(hooke_constant=5.0))
    assert model.hooke_constant == 5.0 and list(model._forward_hooks.values()) == [hook]


def test_the_fingerprint_stays_from_release_to_release():
    """Of Python, torch and this package: adapters that were saved know their foundation."""
    model = Scaled(later_releases_add=None, these_too=[], factor=np.float32(2.0))
    known = "45fa5c697739198fde932873134fb54788cee910bb2ded60259bf75a15dbc4ce"
    assert fingerprint(model.double()) == fingerprint(Scaled()) == known
