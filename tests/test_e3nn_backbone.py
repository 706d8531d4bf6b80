"""A model that is none of MACE's: layers of e3nn's own operations, as in NequIP (arXiv 2101.03164)."""

import copy
import io

import mace  # noqa: F401  before e3nn
import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from tiny import randomise

from mace_peft import (
    PeftConfig,
    PeftError,
    disable_adapter,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_parameters,
)
from mace_peft.backbones import backbone_of
from mace_peft.model.summary import summary

ELEMENTS, ATOMS = 3, 5
EDGES = torch.tensor([(i, j) for i in range(ATOMS) for j in range(ATOMS) if i != j]).T
pytestmark = pytest.mark.usefixtures("double_precision")


class Layer(torch.nn.Module):
    """Messages of neighbours, summed up, and a self-connection by element."""

    def __init__(self, irreps_in, irreps_out, harmonics):
        super().__init__()
        irreps_in, irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        paths = [(i, j, ir) for i, (_, left) in enumerate(irreps_in) for j, (_, right) in enumerate(harmonics)
                 for ir in left * right if ir in irreps_out]
        messages = o3.Irreps([(irreps_in[i].mul, ir) for i, _, ir in paths])
        self.linear_up = o3.Linear(irreps_in, irreps_in)
        self.convolution = o3.TensorProduct(irreps_in, harmonics, messages, [
            (i, j, k, "uvu", True) for k, (i, j, _) in enumerate(paths)], shared_weights=False, internal_weights=False)
        self.radial = e3nn_nn.FullyConnectedNet([4, 8, self.convolution.weight_numel], torch.nn.functional.silu)
        self.linear = o3.Linear(messages, irreps_out)
        self.self_connection = o3.FullyConnectedTensorProduct(irreps_in, f"{ELEMENTS}x0e", irreps_out)

    def forward(self, features, elements, harmonics, lengths):
        messages = self.convolution(self.linear_up(features)[EDGES[0]], harmonics, self.radial(lengths))
        received = messages.new_zeros(len(features), messages.shape[1]).index_add(0, EDGES[1], messages)
        return self.linear(received) + self.self_connection(features, elements)


class NequIPLike(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.harmonics = o3.Irreps.spherical_harmonics(2)
        self.embedding = o3.Linear(f"{ELEMENTS}x0e", "4x0e")
        self.layers = torch.nn.ModuleList([Layer("4x0e", "4x0e+4x1o", self.harmonics),
                                           Layer("4x0e+4x1o", "4x0e+4x1o", self.harmonics)])
        self.readout = o3.Linear("4x0e+4x1o", "1x0e")

    def forward(self, positions):
        vectors = positions[EDGES[1]] - positions[EDGES[0]]
        lengths = torch.cat([torch.exp(-(vectors.norm(dim=1, keepdim=True) - k) ** 2) for k in range(4)], 1)
        harmonics = o3.spherical_harmonics(self.harmonics, vectors, True)
        elements = torch.eye(ELEMENTS)[[0, 1, 2, 0, 1]]
        features = self.embedding(elements)
        for layer in self.layers:
            features = layer(features, elements, harmonics, lengths)
        return self.readout(features).sum()


CASES = [("elora", "linears"), ("elora", "published"), ("mmea", "linears"), ("mmea", "published"), ("gates", "all"),
         ("scales", "all"), ("elora+scales", "all"), ("mmea", "layers.*.self_connection")]


def base():
    torch.manual_seed(0)
    return NequIPLike()


def positions():
    return torch.randn(ATOMS, 3, generator=torch.Generator().manual_seed(1))


def settings(method, targets):
    return PeftConfig(method, targets=targets, **({} if method == "scales" else {"rank": 2}))


def new(method, targets):
    if "scales" in method:
        with pytest.warns(UserWarning, match="NequIPLike has no atomic energies that could take a shift"):
            return inject(base(), settings(method, targets))
    return inject(base(), settings(method, targets))


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*no atomic energies:UserWarning")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_inject_train_save_load_merge_and_switch_off(case, tmp_path):
    model, plain = new(*case), base()(positions())
    assert backbone_of(model).name == "e3nn" and "% of the base" in summary(model)
    same(model(positions()), plain)
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (model(positions()) - 7.0).pow(2).backward()
        optimizer.step()
    trained = model(positions()).detach()
    assert (trained - 7.0).abs() < (plain - 7.0).abs()
    rotation = o3.rand_matrix()
    same(model(positions() @ rotation.T).detach(), trained)

    with disable_adapter(model):
        same(model(positions()), plain)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    same(torch.load(file, weights_only=False)(positions()), trained)
    same(load_adapter(base(), save_adapter(model, tmp_path / "adapter"))(positions()).detach(), trained)
    with pytest.raises(PeftError, match="a.model cannot be loaded by its name, .*'e3nn': give the model itself"):
        load_adapter("a.model", tmp_path / "adapter")
    if case[0] in ("mmea", "gates") and "self" not in case[1]:
        with pytest.raises(PeftError, match="cannot be merged"):
            merge(copy.deepcopy(model))
    else:
        same(merge(copy.deepcopy(model))(positions()), trained)
    same(eject(model)(positions()), plain)
    assert model.state_dict().keys() == base().state_dict().keys()


def test_a_convolution_whose_messages_go_nowhere_known_is_refused():
    with pytest.raises(PeftError, match="of layers.[01].convolution in this NequIPLike it is not known"):
        inject(base(), settings("gates", "*.convolution"))


def test_a_placement_of_mace_is_refused_before_anything_changes():
    model = base()
    with pytest.raises(PeftError, match="targets 'products' matches no module.*use linears, published, all"):
        inject(model, settings("mmea", "products"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_no_backbone_knows_is_refused():
    with pytest.raises(PeftError, match="Sequential is neither a MACE model nor made of e3nn's layers"):
        inject(torch.nn.Sequential(torch.nn.ReLU()), PeftConfig("elora"))


def test_a_layer_that_is_derived_from_e3nns_is_adapted():
    class Doubled(o3.Linear):
        def forward(self, features):
            return 2 * super().forward(features)

    model = base()
    model.readout = Doubled("4x0e+4x1o", "1x0e")
    randomise(inject(model, PeftConfig("elora", rank=1, targets="readout")))
    expected = model(positions())
    assert model.readout.adapter is not None
    same(merge(model)(positions()), expected)


def test_weights_of_another_form_than_the_paths_say_are_refused():
    model = base()
    model.readout = o3.Linear("4x0e+4x1o", "1x0e", f_in=1, f_out=1)
    model.readout.weight = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(PeftError, match="the weight of a Linear has 7 numbers, and its paths 4"):
        inject(model, PeftConfig("elora", rank=1, targets="readout"))
