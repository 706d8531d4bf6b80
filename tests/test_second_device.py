"""No operation of a fine-tune mixes devices, on a stand-in for CUDA, see ``second_device.py``."""

import pytest
import torch
from runs import E0S, FEWER_ELEMENTS, train_here, write_inputs
from second_device import CPU, CUDA, device_of, second_device
from tiny import configurations, tiny_mace

import mace_peft
from mace_peft.inspect.compare import compare

pytestmark = pytest.mark.usefixtures("uncompiled")
OPTIONS = {
    "published": {"peft": "mmea", "peft_rank": 2, "peft_targets": "published"},
    "all": {"peft": "gates", "peft_rank": 2, "peft_targets": "all", "peft_train_also": "readouts.*"},
    "small": {"peft": "small", "peft_budget": "20%"},
}


def test_what_mixes_devices_fails():
    with second_device():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert (there + 1).device == there.to("cpu").to(there).device == CUDA and there.cpu().device == CPU
        with pytest.raises(RuntimeError, match="mixes devices"):
            there + here
        with pytest.raises(TypeError):
            there.numpy()
        assert here.pin_memory().device == CPU


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_goes_on_and_its_adapter_loads(tmp_path, options):
    """All that MACE makes anew for fewer elements, and a restart, a run from the adapter and one from the model."""
    write_inputs(tmp_path, FEWER_ELEMENTS)
    run = {"device": "cuda", "E0s": E0S[FEWER_ELEMENTS], "max_num_epochs": 1} | options
    if options["peft"] == "gates":
        run["peft_keep"] = tmp_path / "test.xyz"
    with second_device():
        train_here(tmp_path, **run)
        train_here(tmp_path, "--restart_latest", **run | {"max_num_epochs": 2})
        if options["peft"] == "small":
            train_here(tmp_path, **run | {"name": "further", "peft_adapter": tmp_path / "run_adapter"})
            train_here(tmp_path, **run | {"name": "again", "foundation_model": tmp_path / "run.model"})
        foundation = torch.load(tmp_path / "foundation.model", map_location="cuda", weights_only=False)
        model = mace_peft.load_adapter(foundation, tmp_path / "run_adapter")
        assert {device_of(tensor) for tensor in model.state_dict().values()} == {CUDA}
        atoms = configurations(1, FEWER_ELEMENTS)[0]
        atoms.calc = mace_peft.calculator(tiny_mace(), tmp_path / "run_adapter", device="cuda")
        atoms.get_forces()
        compare(str(tmp_path / "foundation.model"), [tmp_path / "run_adapter"], str(tmp_path / "test.xyz"),
                device="cuda")


def test_a_run_on_cuequivariance(tmp_path):
    write_inputs(tmp_path, foundation=tiny_mace(max_ell=1))
    with second_device():
        train_here(tmp_path, device="cuda", peft="elora", peft_rank=2, peft_targets="products", enable_cueq=True,
                   max_num_epochs=1, peft_keep=tmp_path / "test.xyz")
