"""--peft_rank auto: ranks by the singular values of the first gradients, within the budget."""

import copy
import dataclasses
import functools
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from combined import train_only, write_small
from e3nn import o3
from mace.modules import WeightedEnergyForcesLoss
from runs import E0S, MOLECULE, train_here
from test_reload import assert_reloads
from tiny import assert_equal, batch, configurations, loaded, predict, randomise, tiny_mace

from mace_peft import (
    PeftConfig,
    PeftError,
    choose_ranks,
    eject,
    inject,
    merge,
    print_trainable_parameters,
    save_adapter,
    trainable_parameters,
)
from mace_peft.blocks.adapted import adapted_blocks
from mace_peft.inspect.figures import plot
from mace_peft.inspect.info import info
from mace_peft.model.isolated import E0S as OF_ATOMS
from mace_peft.model.ranks import start_along_gradients
from mace_peft.model.targets import find_targets
from mace_peft.train.options import read_settings
from mace_peft.train.start import settings_from

pytestmark = pytest.mark.usefixtures("double_precision", "uncompiled")

CASES = {
    "elora": PeftConfig("elora", rank="auto", targets="all", budget="20%"),
    "small": PeftConfig("small", targets="all", budget="40%"),
    "gates": PeftConfig("gates", rank="auto", budget="30%"),
    "mmea": PeftConfig("mmea", rank="auto", budget="30%"),
}
every = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def loss_of(model):
    structures = loaded(model, configurations(4))
    output = model(structures.to_dict(), training=True, compute_force=True)
    return WeightedEnergyForcesLoss(1.0, 100.0)(pred=output, ref=structures)


def differentiate(model):
    """The gradients of MACE's loss."""
    loss_of(model).backward()


@functools.cache
def chosen(config):
    return choose_ranks(tiny_mace(), config, differentiate)


@every
def test_the_budget_is_kept_and_used(config):
    model = tiny_mace()
    budget = float(config.budget[:-1]) / 100 * sum(parameter.numel() for parameter in model.parameters())
    inject(model, chosen(config))
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    assert 0.8 * budget < trained <= budget


@every
def test_each_module_has_its_own_rank(config):
    model, ranks = inject(tiny_mace(), chosen(config)), dict(chosen(config).rank_pattern)
    assert len(set(ranks.values())) > 1
    for name, rank in ranks.items():
        adapter = model.get_submodule(name).adapter
        parts = [part for part in adapter.modules() if hasattr(part, "rank") or hasattr(part, "W1")]
        assert {part.rank if hasattr(part, "rank") else part.W1.shape[1] for part in parts} == {rank}
        assert {getattr(part, "scale", 1.0) for part in parts} == {1.0}
    others = {name for name, module in model.named_modules() if hasattr(module, "adapter")} - ranks.keys()
    assert not others or config.method == "small"
    without = [name for name in trainable_parameters(model) if name.partition(".adapter")[0] in others]
    assert all(name.endswith((".adapter.g", ".adapter.s.atomic_energies")) for name in without)


def test_what_trains_is_printed(capsys):
    model = inject(tiny_mace(), chosen(CASES["small"]))
    print_trainable_parameters(model)
    trained, all_of_it = (sum(p.numel() for p in parameters) for parameters in
                          (trainable_parameters(model).values(), model.parameters()))
    assert capsys.readouterr().out == (f"trainable params: {trained:,} || all params: {all_of_it:,} || trainable%: "
                                       f"{100 * trained / all_of_it:.4f}\n")


@every
def test_the_choice_is_the_same_each_time_and_leaves_no_trace(config):
    model = tiny_mace()
    before, expected = copy.deepcopy(model), torch.rand(1, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    assert choose_ranks(model, config, differentiate) == chosen(config)
    assert torch.equal(torch.rand(1), expected)
    assert_equal(predict(model, configurations(1)), predict(before, configurations(1)))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labelled_structures_are_chosen_from():
    """As by a function that leaves the gradients of the loss of forces; E0s and energies do not act."""
    def of_forces(model):
        output = model(batch(model, configurations(4)), training=True, compute_force=True)
        forces = np.concatenate([atoms.arrays["REF_forces"] for atoms in configurations(4)])
        (output["forces"] - torch.from_numpy(forces)).pow(2).mean().backward()

    structures, config, model = configurations(4), CASES["small"], tiny_mace()
    expected = choose_ranks(tiny_mace(), config, of_forces)
    for atoms in structures:
        atoms.info["REF_energy"] += 1e4
    model.atomic_energies_fn.atomic_energies += 1e3
    assert choose_ranks(model, config, structures) == expected
    for atoms in structures:  # where ASE puts what it calls forces
        atoms.calc = SinglePointCalculator(atoms, forces=atoms.arrays.pop("REF_forces"))
    assert choose_ranks(model, config, structures, forces_key="forces") == expected
    assert all("forces" not in atoms.arrays for atoms in structures)
    inject(model, expected)


@pytest.mark.parametrize("config", [config for config in CASES.values() if config.method != "gates"],
                         ids=lambda config: config.method)
def test_a_start_along_the_gradients_lowers_the_loss_most(config):
    """A small step of B alone, down its own gradient: the loss falls by more than from the random start."""
    def fallen(model):
        before = loss_of(model)
        parameters = [parameter for name, parameter in model.named_parameters() if ".B." in name]
        for parameter, gradient in zip(parameters, torch.autograd.grad(before, parameters), strict=True):
            parameter.data -= 1e-9 * gradient
        return (before - loss_of(model)).item()

    model = inject(tiny_mace(), dataclasses.replace(chosen(config), start="gradient"))
    drawn = copy.deepcopy(model)
    assert start_along_gradients(model, differentiate) is model
    assert_equal(predict(model, configurations(1)), predict(tiny_mace(), configurations(1)))
    changed = {name for name, tensor in trainable_parameters(model).items()
               if not torch.equal(tensor, trainable_parameters(drawn)[name])}
    assert changed and all(".A." in name for name in changed)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert fallen(model) > 1.05 * fallen(drawn) > 0


def gradients(**given):
    """Gives these parameters these gradients, by the end of their names."""
    def set_gradients(model):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.zeros_like(parameter)
            for end, gradient in given.items():
                if name.endswith(end.replace("__", ".")):
                    parameter.grad = gradient.reshape(parameter.shape)
    return set_gradients


def test_a_module_gets_no_more_ranks_than_its_gradient_has():
    torch.manual_seed(0)
    low = torch.randn(4, 2) @ torch.randn(2, 4)
    config = choose_ranks(tiny_mace(max_L=0), PeftConfig("elora", rank="auto", targets="linears", budget="100%"),
                          gradients(interactions__1__linear_up__weight=low))
    assert config.rank_pattern == (("interactions.1.linear_up", 2),)


def test_a_larger_gradient_comes_first():
    config = PeftConfig("elora", rank="auto", targets="interactions.*.linear_up", budget="8")
    small, large = torch.diag(torch.tensor([1.0, 1, 1, 1])), torch.diag(torch.tensor([3.0, 0, 0, 0]))
    found = choose_ranks(tiny_mace(max_L=0), config, gradients(interactions__0__linear_up__weight=small,
                                                               interactions__1__linear_up__weight=large))
    assert found.rank_pattern == (("interactions.1.linear_up", 1),)
    more = choose_ranks(tiny_mace(max_L=0), dataclasses.replace(config, budget="24"), gradients(
        interactions__0__linear_up__weight=small, interactions__1__linear_up__weight=large))
    assert more.rank_pattern == (("interactions.0.linear_up", 2), ("interactions.1.linear_up", 1))


@pytest.mark.parametrize("name", ["small", "gates"])
def test_a_run_chooses_says_why_and_keeps_the_choice(tmp_path, name, caplog, capsys):
    inputs, config = write_small(tmp_path), CASES[name]
    options = {"peft": config.method, "peft_targets": "all", "peft_budget": config.budget}
    if name != "small":  # whose rank it is by default
        options["peft_rank"] = "auto"
    train_here(inputs, work_dir=tmp_path / "run", max_num_epochs=1, **options)
    said = capsys.readouterr().out + caplog.text
    assert f"Ranks chosen for a budget of {config.budget}" in said and "kept of the gradient" in said
    model = assert_reloads(inputs, tmp_path / "run")
    ranks = dict(model.peft_config.rank_pattern)
    listed = dict(re.findall(r"^\| (\S+) +\| +(\d+) \| +[\d,]+ \| +\d+ % \|", said, re.MULTILINE))
    assert {module: int(rank) for module, rank in listed.items() if int(rank)} == ranks


def test_a_restart_goes_on_with_the_same_ranks(tmp_path, monkeypatch):
    """Those of the checkpoint, whatever would be chosen now; and with other settings it is refused as ever."""
    inputs = write_small(tmp_path)
    options = {"peft": "elora", "peft_rank": "auto", "peft_targets": "all", "peft_budget": "20%"}
    _, given = train_only(inputs, "whole", max_num_epochs=2, **options)
    monkeypatch.setattr("mace_peft.train.adapt.choose_ranks", None)
    _, again = train_only(inputs, "whole", "--restart_latest", max_num_epochs=3, **options)
    assert again["model"].peft_config.rank_pattern == given["model"].peft_config.rank_pattern
    monkeypatch.undo()
    # where there is no checkpoint yet, they are chosen
    _, again = train_only(inputs, "other", "--restart_latest", max_num_epochs=1, **options)
    assert again["model"].peft_config.rank_pattern


def test_a_run_with_gates_and_updates_leaves_a_model_that_can_be_rebuilt(tmp_path):
    """Updates are merged then, and the gates keep their ranks."""
    inputs = write_small(tmp_path)
    options = {"peft": "mmea", "peft_rank": "auto", "peft_targets": "published", "peft_budget": "40%"}
    train_here(inputs, work_dir=tmp_path / "run", max_num_epochs=1, **options)
    model = torch.load(tmp_path / "run" / "run.model", weights_only=False)
    ranks = dict(model.peft_config.rank_pattern)
    assert ranks and all(model.get_submodule(name).adapter.W1.shape[1] == rank for name, rank in ranks.items())
    again = inject(eject(copy.deepcopy(model)), model.peft_config)
    assert trainable_parameters(again).keys() == trainable_parameters(model).keys()


@pytest.mark.parametrize("name", ["elora", "small"])
def test_what_was_chosen_is_told_and_drawn(tmp_path, name):
    torch.save(tiny_mace(), tmp_path / "foundation.model")
    model = randomise(inject(tiny_mace(), chosen(CASES[name])))
    save_adapter(model, tmp_path / "some_adapter")
    assert "rank auto, alpha as the rank" in info(tmp_path / "some_adapter")
    drawn = plot(tmp_path / "some_adapter", str(tmp_path / "foundation.model"))
    assert {path.name for path in drawn} >= {"some_adapter_updates.png"}


def test_merged_ranks_of_all_sizes_give_the_same_predictions():
    model = randomise(inject(tiny_mace(), chosen(CASES["small"])), scale=0.1)
    expected = predict(model, configurations(2))
    for found, wanted in zip(predict(merge(model), configurations(2)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# --- refusals ---------------------------------------------------------------------------------------------------------


def fails(function, *arguments) -> str:
    with pytest.raises(PeftError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("budget", ["0", "0%", "-5%", "101%", "lots", "nan%", "1.5"])
def test_budgets_that_are_none_are_refused(budget):
    message = fails(lambda: PeftConfig("elora", rank="auto", budget=budget))
    assert message.startswith(f"budget {budget} is not allowed")


def test_what_does_not_fit_together_is_refused():
    assert "budget 5% has no effect on rank 16: leave it out, or use rank auto" in fails(
        lambda: PeftConfig("elora", budget="5%"))
    message = fails(choose_ranks, tiny_mace(), dataclasses.replace(CASES["elora"], budget="3"), differentiate)
    assert "the smallest adapter takes" in message
    assert "choose_ranks" in fails(inject, tiny_mace(), CASES["elora"])
    other = chosen(CASES["elora"])
    assert "targets products differs from the all" in fails(settings_from, other, {"targets": "products"}, "the file")
    assert "no target" in fails(inject, tiny_mace(interactions=1), other)
    assert "leaves no ranks to choose" in fails(choose_ranks, tiny_mace(), PeftConfig("elora"), differentiate)


@pytest.mark.parametrize("structures", ["data.xyz", configurations(1)[0], ["data.xyz"]], ids=["file", "one", "files"])
def test_structures_that_are_no_list_of_them_are_refused(structures):
    message = fails(choose_ranks, tiny_mace(), PeftConfig("elora", rank="auto"), structures)
    assert message.startswith("the structures are no list of ase.Atoms: give one")


def test_what_trains_along_may_change_and_fitted_E0s_go_on():
    adapter = PeftConfig("elora", train_also=f"products.*,{OF_ATOMS}")
    assert settings_from(adapter, {"train_also": "readouts.*"}, "the file").train_also == f"readouts.*,{OF_ATOMS}"
    assert settings_from(PeftConfig("elora"), {"train_also": "readouts.*"}, "the file").train_also == "readouts.*"


def test_structures_from_which_nothing_can_be_learnt_are_refused():
    plain = [atoms.copy() for atoms in configurations(2)]
    for atoms in plain:
        atoms.arrays["force"] = atoms.arrays.pop("REF_forces")
    message = fails(choose_ranks, tiny_mace(), PeftConfig("small"), plain)
    assert message == ("no structure has forces under the key REF_forces: give theirs as forces_key; the keys are "
                       "REF_energy, force")
    assert "no structure has forces" in fails(choose_ranks, tiny_mace(), PeftConfig("small"), [])
    assert "have S, which the model does not know" in fails(
        choose_ranks, tiny_mace(), PeftConfig("small"), configurations(1, "SH2"))
    layers = torch.nn.Sequential(o3.Linear("4x0e", "4x0e"))
    assert "this Sequential takes no structures: give a function" in fails(
        choose_ranks, layers, PeftConfig("elora", rank="auto"), plain)


def test_a_rank_above_what_its_module_can_use_leaves_the_model_as_it_was():
    model = tiny_mace()
    before = {name: type(module) for name, module in model.named_modules()}
    ranks = {"interactions.0.linear_up": 2, "products.1.linear": 4000}
    message = fails(inject, model, dataclasses.replace(CASES["elora"], targets="linears", rank_pattern=ranks))
    assert "products.1.linear 4000" in message and "largest useful rank there is" in message
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_settings_of_an_adapter_to_start_from():
    fixed, auto = PeftConfig("elora", rank=2), chosen(CASES["elora"])
    assert "method scales differs from the elora" in fails(settings_from, fixed, {"method": "scales"}, "the file")
    assert "rank 3 differs from the 2" in fails(settings_from, fixed, {"rank": 3}, "the file")
    assert "which has the rank 2" in fails(settings_from, fixed, {"budget": "5%"}, "the file")
    assert "differs from the 20%" in fails(settings_from, auto, {"budget": "5%"}, "the file")
    assert settings_from(auto, {"budget": "20%"}, "the file") == auto
    assert read_settings(Namespace(peft="elora", peft_adapter="here", peft_budget="20%"))["budget"] == "20%"


def test_the_name_small_is_part_of_an_adapter_to_start_from():
    other = PeftConfig("elora+scales", rank=2)
    message = fails(settings_from, other, {"method": "small"}, "the file")
    assert message.startswith("method small differs from the elora+scales of the adapter in the file: give elora+")
    assert settings_from(chosen(CASES["small"]), {"method": "small"}, "the file") == chosen(CASES["small"])


@pytest.mark.parametrize("config", [*CASES.values(), PeftConfig("scales"), PeftConfig("elora+scales", rank=2)],
                         ids=lambda config: config.method)
def test_settings_are_printed_as_they_are_typed(config):
    typed = dict(option.removeprefix("--").split("=") for option in config.options().split())
    settings = read_settings(Namespace(**typed))
    assert settings.pop("fast") is True  # which is none of the adapter's
    assert PeftConfig(**settings) == config


def test_small_is_elora_and_scales_of_ranks_that_are_chosen():
    def settings(**options):
        read = read_settings(Namespace(peft="small", **options))
        del read["fast"]
        return PeftConfig(**read)

    small = PeftConfig("small")
    assert settings() == small
    assert (small.rank, small.targets, small.budget) == ("auto", "linears", "5%")
    one, other = (find_targets(tiny_mace(), PeftConfig(method, rank=4)) for method in ("small", "elora+scales"))
    assert one == other
    other = settings(peft_budget="2%", peft_targets="all")
    assert other == dataclasses.replace(small, budget="2%", targets="all")
    assert settings(peft_rank="4") == PeftConfig("small", rank=4)
    assert read_settings(Namespace(peft="small", peft_adapter="folder")) == {
        "method": "small", "adapter": "folder", "fast": True}  # which has targets and ranks
    assert "did you mean small" in fails(read_settings, Namespace(peft="smal"))


def test_updates_that_have_been_trained_keep_their_start():
    """And with them what the model predicts; new ones beside them begin along the gradients."""
    model = inject(tiny_mace(), PeftConfig("elora", rank=2, start="gradient"))
    updated = [block.adapter for block in adapted_blocks(model).values()]
    for adapter in updated[1:]:
        for B in adapter.B.values():
            B.data.normal_()
    before, expected = copy.deepcopy(model), predict(model, configurations(1))
    start_along_gradients(model, differentiate)
    assert_equal(predict(model, configurations(1)), expected)
    turned = [not all(torch.equal(A, old.adapter.A[key]) for key, A in block.adapter.A.items())
              for block, old in zip(adapted_blocks(model).values(), adapted_blocks(before).values(), strict=True)]
    assert turned == [True] + [False] * (len(turned) - 1)
    for B in updated[0].B.values():
        B.data.normal_()
    with pytest.raises(PeftError, match="have been trained, and another start would change what it predicts"):
        start_along_gradients(model, differentiate)


@pytest.mark.parametrize("method", ["scales", "gates"])
def test_adapters_without_updates_have_no_start(method):
    with pytest.raises(PeftError, match=f"method {method} have no low-rank updates, which alone have a start"):
        start_along_gradients(inject(tiny_mace(), PeftConfig(method, rank=2 if method == "gates" else None)),
                              differentiate)


def test_more_targets_of_a_further_run_begin_along_the_gradients(tmp_path):
    options = {"peft": "elora", "peft_rank": 1, "peft_start": "gradient", "E0s": E0S[MOLECULE]}
    inputs = write_small(tmp_path)
    first, _ = train_only(inputs, "first", max_num_epochs=1, peft_targets="products.*.linear", **options)
    train_here(inputs, **options, max_num_epochs=1, peft_targets="products.*.linear", work_dir=first.folder)
    _, given = train_only(inputs, "second", **options, peft_adapter=first.adapter(), max_num_epochs=1,
                          peft_targets="products.*.linear,interactions.*.linear", lr=1e-30)
    for name, block in adapted_blocks(given["model"]).items():
        if name.startswith("interactions"):
            for A in block.adapter.A.values():  # columns of length 1 as singular vectors have, and those drawn have not
                assert A.square().sum(0).tolist() == pytest.approx([1], abs=1e-6)


def test_the_least_budget_that_is_named_is_enough():
    config = PeftConfig("elora", rank="auto", targets="interactions.1.linear_up,interactions.1.linear", budget="1")
    gradient = gradients(interactions__1__linear__weight=torch.eye(4).repeat(3, 1))  # nothing for linear_up
    model = tiny_mace(max_L=0)
    least = re.search(r"takes ([\d,]+)", fails(choose_ranks, model, config, gradient))[1]
    assert choose_ranks(model, dataclasses.replace(config, budget=least), gradient).rank_pattern


def test_a_shift_alone_has_no_rank():
    config = PeftConfig("small", targets="atomic_energies_fn")
    assert "choose other targets" in fails(choose_ranks, tiny_mace(), config, differentiate)
    assert "rank 4 has no effect on atomic_energies_fn" in fails(
        inject, tiny_mace(), dataclasses.replace(config, rank=4, budget=None))


def test_labels_that_are_not_finite_are_refused():
    def broken(model):
        differentiate(model)
        next(parameter for parameter in model.parameters() if parameter.grad is not None).grad.fill_(float("nan"))

    assert "not finite" in fails(choose_ranks, tiny_mace(), CASES["elora"], broken)


def test_text_is_read():
    settings = read_settings(Namespace(peft="elora", peft_rank="auto", peft_budget="7.5%"))
    assert settings == {"method": "elora", "rank": "auto", "budget": "7.5%", "fast": True}
    assert "or auto" in fails(read_settings, Namespace(peft="elora", peft_rank="autoo"))
