"""A run may start from a saved adapter, or from a model that has one."""

import ase.io
import pytest
import torch
from runs import E0S, FEWER_ELEMENTS, MOLECULE, default_foundation, reach_training, train, train_here, write_inputs
from test_load import same
from tiny import configurations, predict, tiny_mace

from mace_peft import PeftConfig, PeftError, inject, load_adapter, save_adapter, trainable_parameters
from mace_peft.model.adapted import is_adapted
from mace_peft.train.start import check_heads, go_on, settings_from

pytestmark = pytest.mark.usefixtures("uncompiled")

STRUCTURES = configurations(3)
CASES = [("mmea", "products"), ("mmea", "published"), ("elora", "published")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fine-tune of one epoch for each method and placement, in a folder of its own, whose data all share."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    return {case: train_here(inputs, work_dir=inputs / "-".join(case), max_num_epochs=1, peft=case[0],
                             peft_targets=case[1], peft_rank=2) for case in CASES}


def results(run, case):
    return run.folder / "-".join(case)


def load(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_run_starts_from_a_saved_adapter_with_its_settings(trained, case):
    folder = trained[case].folder
    given = reach_training(folder, peft_adapter=results(trained[case], case) / "run_adapter")  # which knows its method
    model, before = given["model"], load(results(trained[case], case) / "run.model")
    assert model.peft_config.targets == case[1] and model.peft_config.rank == 2
    assert same(predict(model, STRUCTURES), predict(before, STRUCTURES))
    held = {id(parameter) for group in given["optimizer"].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainable_parameters(model).values()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_run_goes_on_from_the_model_that_a_run_left(trained, case):
    """An MMEA model is trained further; a merged ELoRA model is a foundation like any other."""
    path = results(trained[case], case) / "run.model"
    given = reach_training(trained[case].folder, peft=case[0], peft_rank=2, foundation_model=path)
    assert same(predict(given["model"], STRUCTURES), predict(load(path), STRUCTURES))


def test_its_adapter_goes_with_the_foundation_of_the_first_run(trained, tmp_path):
    case = ("mmea", "products")
    folder = trained[case].folder
    path = results(trained[case], case) / "run.model"
    train_here(folder, work_dir=tmp_path, peft="mmea", max_num_epochs=1, foundation_model=path)
    loaded = load_adapter(load(folder / "foundation.model"), tmp_path / "run_adapter")
    assert same(predict(loaded, STRUCTURES), predict(load(tmp_path / "run.model"), STRUCTURES))
    first = load_adapter(load(folder / "foundation.model"), results(trained[case], case) / "run_adapter")
    assert not same(predict(loaded, STRUCTURES), predict(first, STRUCTURES), 1e-6)


def test_gates_above_merged_updates_go_with_the_model_that_holds_them(trained, tmp_path):
    """The model of an MMEA ``published`` run has its low-rank updates in its weights: that is its foundation now."""
    case = ("mmea", "published")
    folder = trained[case].folder
    path = results(trained[case], case) / "run.model"
    train_here(folder, work_dir=tmp_path, peft="mmea", max_num_epochs=1, foundation_model=path)
    loaded = load_adapter(load(path), tmp_path / "run_adapter")
    assert same(predict(loaded, STRUCTURES), predict(load(tmp_path / "run.model"), STRUCTURES))


def test_a_run_may_adapt_more_than_it_starts_from(trained):
    case = ("mmea", "products")
    first = results(trained[case], case)
    model = reach_training(trained[case].folder, peft="mmea", peft_train_also="readouts.*",
                           peft_adapter=first / "run_adapter")["model"]
    assert any(name.startswith("readouts.") for name in trainable_parameters(model))
    assert same(predict(model, STRUCTURES), predict(load(first / "run.model"), STRUCTURES))


@pytest.mark.since("0.3.15")
def test_E0s_are_estimated_with_the_adapter(trained):
    """They make the mean error of the model that the run starts from zero on its training set, of one molecule."""
    case = ("mmea", "published")
    folder, adapter = trained[case].folder, results(trained[case], case) / "run_adapter"
    model = reach_training(folder, peft="mmea", E0s="estimated", peft_adapter=adapter)["model"]
    data = ase.io.read(folder / "train.xyz", ":")
    errors = [atoms.info["REF_energy"] for atoms in data] - predict(model, data)[0].numpy()
    assert abs(errors).max() > 0.1 and abs(errors.mean()) < 1e-8


def test_fewer_elements_go_on_where_the_adapters_do_not_depend_on_them(trained, tmp_path):
    write_inputs(tmp_path, FEWER_ELEMENTS)
    case = ("mmea", "products")
    options = {"peft": "mmea", "peft_adapter": results(trained[case], case) / "run_adapter", "E0s": E0S[FEWER_ELEMENTS]}
    model = reach_training(tmp_path, **options)["model"]
    assert model.atomic_numbers.tolist() == [1, 8]
    adapters = trainable_parameters(load(results(trained[case], case) / "run.model"))
    assert all(torch.equal(parameter, adapters[name]) for name, parameter in trainable_parameters(model).items())
    save_adapter(model, tmp_path / "saved")
    water = configurations(2, FEWER_ELEMENTS)
    assert same(predict(load_adapter(default_foundation(), tmp_path / "saved"), water), predict(model, water))


def two_heads(inputs, order="ab", **options):
    heads = {name: {"train_file": str(inputs / "train.xyz"), "valid_file": str(inputs / "valid.xyz"),
                    "E0s": E0S[MOLECULE]} for name in order}
    return {"heads": str(heads), "train_file": None, "valid_file": None, "test_file": None, "E0s": None} | options


@pytest.fixture(scope="module")
def two_headed(tmp_path_factory):
    """Inputs and a fine-tune with two heads, whose readouts train along."""
    inputs = write_inputs(tmp_path_factory.mktemp("heads"))
    train_here(inputs, **two_heads(inputs, peft="mmea", peft_rank=2, peft_targets="products", max_num_epochs=1,
                                   peft_train_also="readouts.*"))
    return inputs


@pytest.mark.parametrize("head", ["a", "b"])
def test_a_run_goes_on_from_one_head_of_a_model_that_has_several(two_headed, head, tmp_path):
    trained = load(two_headed / "run.model")
    train_here(two_headed, work_dir=tmp_path, peft="mmea", foundation_model=two_headed / "run.model",
               foundation_head=head, max_num_epochs=1, lr=1e-30)
    model, structures = load(tmp_path / "run.model"), configurations(3)
    for atoms in structures:
        atoms.info["head"] = head
    expected = predict(trained, structures)
    for atoms in structures:
        del atoms.info["head"]
    assert same(predict(model, structures), expected)
    loaded = load_adapter(load(two_headed / "foundation.model"), tmp_path / "run_adapter")
    assert same(predict(loaded, structures), expected)


def test_trained_readouts_do_not_go_to_another_head(two_headed, capsys):
    adapter = two_headed / "run_adapter"
    given = reach_training(two_headed, **two_heads(two_headed, peft="mmea", peft_adapter=adapter))
    assert given["model"].heads == ["a", "b"]
    for order in ("ba", "cd"):
        with pytest.raises(SystemExit):
            reach_training(two_headed, **two_heads(two_headed, order, peft="mmea", peft_adapter=adapter))
        assert f"heads {', '.join(order)}" in capsys.readouterr().err


@pytest.mark.parametrize("config, name", [
    (PeftConfig("scales", targets="products.*,atomic_energies_fn"),
     "atomic_energies_fn.adapter.s.atomic_energies"),
    (PeftConfig("elora", rank=1, targets="readouts.*"), "readouts.0")])
def test_what_is_trained_for_each_head_stays_with_it(config, name):
    adapted = inject(tiny_mace(heads=("a", "b")), config)
    check_heads(["a", "b"], adapted)
    for heads in (["b", "a"], ["c", "d"], ["a"]):
        with pytest.raises(PeftError, match=f"trained {name}.* for a, b: name the heads so"):
            check_heads(heads, adapted)


@pytest.mark.since("0.3.15")
def test_estimated_E0s_do_not_choose_a_head(two_headed, capsys):
    with pytest.raises(SystemExit):
        reach_training(two_headed, peft="mmea", peft_adapter=two_headed / "run_adapter", E0s="estimated")
    assert "cannot choose among the adapter's heads a, b" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["peft_adapter", "foundation_model"])
def test_elements_outside_the_data_keep_the_E0s_of_the_start(trained, source, tmp_path):
    write_inputs(tmp_path, FEWER_ELEMENTS)
    first = results(trained["mmea", "products"], ("mmea", "products"))
    path = {"peft_adapter": first / "run_adapter", "foundation_model": first / "run.model"}[source]
    model = reach_training(tmp_path, peft="mmea", E0s=E0S[FEWER_ELEMENTS], foundation_model_elements=True,
                           **{source: path})["model"]
    assert model.atomic_energies_fn.atomic_energies.flatten().tolist() == [-0.7, -1.9, -2.6]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(trained, capsys):
    """Runs the command in this process; returns the one line with which it stops."""

    def refusal(case, **options):
        with pytest.raises(SystemExit) as stopped:
            reach_training(trained[case].folder, **options)
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mace_run_train: error:")]
        return line

    return refusal


@pytest.mark.parametrize("options, words", [
    ({"peft": "elora"}, ["--peft elora differs from the mmea"]),
    ({"peft": "mmea", "peft_rank": 3}, ["--peft_rank 3 differs from the 2", "give 2"]),
    ({"peft": "mmea", "peft_gate": "exp"}, ["--peft_gate exp differs from the bounded"]),
    ({"peft": "mmea", "peft_targets": "linears"}, ["products.0.adapter.W1", "unknown"]),
], ids=["method", "rank", "gate", "targets"])
def test_other_settings_are_refused(refusal, trained, options, words):
    case = ("mmea", "products")
    line = refusal(case, peft_adapter=results(trained[case], case) / "run_adapter", **options)
    assert all(word in line for word in words), line


def test_an_adapter_directory_is_no_foundation(refusal, trained, tmp_path):
    case = ("mmea", "products")
    adapter = results(trained[case], case) / "run_adapter"
    line = refusal(case, peft="mmea", foundation_model=adapter)
    assert f"--foundation_model {adapter} is the directory of an adapter: give it by --peft_adapter" in line
    assert "trained from ('foundation.model')" in line
    file, nothing = trained[case].folder / "foundation.model", tmp_path / "nothing"
    assert f"{nothing} is no adapter directory, for it does not exist" in refusal(case, peft_adapter=nothing)
    assert f"{file} is no adapter directory, for it is a file" in refusal(case, peft_adapter=file)


def test_an_adapter_of_another_strength_trains_no_further(refusal, trained, tmp_path):
    case = ("mmea", "products")
    model = load_adapter(load(trained[case].folder / "foundation.model"), results(trained[case], case) / "run_adapter",
                         strength=0.5)
    save_adapter(model, tmp_path / "half")
    torch.save(model, tmp_path / "half.model")
    for name, source in (("peft_adapter", "half"), ("foundation_model", "half.model")):
        line = refusal(case, peft="mmea", **{name: tmp_path / source})
        assert f"{tmp_path / source} has the strength 0.5, and only one of strength 1 trains further" in line


def test_a_restart_names_the_adapter_that_its_run_started_from(trained, tmp_path, capsys):
    """Without it the errors of that adapter would be called the foundation's."""
    run, case = trained["mmea", "products"], ("mmea", "products")
    options = {"work_dir": tmp_path, "peft": "mmea", "peft_rank": 2, "peft_targets": "products"}
    train_here(run.folder, **options, peft_adapter=results(run, case) / "run_adapter", max_num_epochs=1)
    with pytest.raises(SystemExit):
        train_here(run.folder, "--restart_latest", **options, max_num_epochs=2)
    assert ("was made with --peft_adapter run_adapter, with which a restart goes on, and this run has none"
            in capsys.readouterr().err)


def test_an_alpha_that_follows_the_ranks_is_to_be_left_out():
    with pytest.raises(PeftError, match="16.0 differs from the None of the adapter in mine: leave it out"):
        settings_from(PeftConfig("elora", rank="auto"), {"alpha": 16.0}, "mine")


def test_a_model_whose_adapter_could_not_be_saved_is_refused_before_its_training():
    with pytest.raises(PeftError, match="no place for the heads"):
        go_on(tiny_mace(heads=("h" * 400,)), PeftConfig("elora", rank=1), {"name": None, "fingerprint": "abc"}, None)


def test_an_adapter_that_fits_nothing_is_refused(refusal, trained, tmp_path):
    case = ("mmea", "products")
    adapter = results(trained[case], case) / "run_adapter"
    assert "missing" in refusal(case, peft="mmea", peft_adapter=tmp_path)
    other = tmp_path / "other.model"
    torch.save(tiny_mace(seed=5), other)
    assert "weights differ" in refusal(case, peft="mmea", peft_adapter=adapter, foundation_model=other)
    torch.save(load(results(trained[case], case) / "run.model"), other)
    assert "leave one out" in refusal(case, peft="mmea", peft_adapter=adapter, foundation_model=other)


@pytest.mark.parametrize("E0s", [E0S[MOLECULE], pytest.param("estimated", marks=pytest.mark.since("0.3.15"))])
def test_elements_that_it_has_never_seen_are_refused(refusal, tmp_path, E0s):
    inputs = write_inputs(tmp_path / "water", FEWER_ELEMENTS)
    train_here(inputs, peft="mmea", peft_rank=2, peft_targets="products", max_num_epochs=1, E0s=E0S[FEWER_ELEMENTS])
    case = ("mmea", "products")
    assert "the run has C, which" in refusal(case, peft="mmea", peft_adapter=inputs / "run_adapter", E0s=E0s)
    assert "the run has C, which" in refusal(case, peft="mmea", foundation_model=inputs / "run.model", E0s=E0s)


def test_updates_that_depend_on_the_elements_go_on_with_fewer_where_all_are_named(trained, tmp_path, capsys):
    write_inputs(tmp_path, FEWER_ELEMENTS)
    case = ("elora", "published")
    options = {"peft": "elora", "peft_adapter": results(trained[case], case) / "run_adapter"}
    with pytest.raises(SystemExit):
        reach_training(tmp_path, **options, E0s=E0S[FEWER_ELEMENTS])
    message = capsys.readouterr().err
    assert 'the run has H O' in message and 'each of H C O: add --atomic_numbers="[1, 6, 8]"' in message
    model = reach_training(tmp_path, **options, E0s=E0S[MOLECULE], atomic_numbers="[1, 6, 8]")["model"]
    assert model.atomic_numbers.tolist() == [1, 6, 8]


def test_a_run_without_peft_refuses_an_adapted_model(refusal, trained):
    case = ("mmea", "products")
    assert "add --peft mmea" in refusal(case, foundation_model=results(trained[case], case) / "run.model")


def test_it_refuses_it_without_the_start_up_hook_too(trained):
    case = ("mmea", "products")
    run = train(trained[case].folder, hook=False, foundation_model=results(trained[case], case) / "run.model",
                name="unhooked")
    assert run.returncode == 2 and run.stderr.splitlines()[-1].startswith("mace_run_train: error:")
    assert "run python -m mace_peft.run_train with --peft" in run.stderr


def test_a_run_without_peft_takes_a_merged_model(trained):
    case = ("elora", "published")
    path = results(trained[case], case) / "run.model"
    given = reach_training(trained[case].folder, foundation_model=path)
    assert not is_adapted(given["model"])
    assert same(predict(given["model"], STRUCTURES), predict(load(path), STRUCTURES))
