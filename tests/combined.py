"""Fine-tunes with a feature of MACE, and what each has to leave whichever that is."""

import contextlib
from pathlib import Path

import torch
from releases import since
from runs import MOLECULE, NAME, STAGES, Run, around_training, train_here, write_inputs
from tiny import configurations, predict, tiny_mace

from mace_peft import disable_adapter, load_adapter
from mace_peft.train.checkpoints import measures

PEFT = {"peft": "mmea", "peft_rank": 2, "peft_targets": "products"}
RESCALED = ("atomic_energies_fn.atomic_energies", "scale_shift.scale", "scale_shift.shift")  # of the run, not the base


def write_small(folder: Path, molecule: str = MOLECULE) -> Path:
    """Inputs with a foundation of one layer, which takes half the time, for what no model makes a difference to.

    Of earlier releases of MACE, some cannot fine-tune one.
    """
    return write_inputs(folder, molecule, tiny_mace(interactions=1 if since("0.3.16") else 2))


def fine_tune(inputs: Path, name: str, *flags: str, **options) -> Run:
    """Fine-tune the inputs in this process; files go to a folder of that name there. Checks what the run leaves."""
    run = Run(inputs / name)
    run.folder.mkdir(exist_ok=True)
    train_here(inputs, *flags, **PEFT | {"work_dir": run.folder} | options)
    for stage_two in {False, bool(run.checkpoints(stage_two=True))}:
        check_result(run, stage_two, inputs / "foundation.model")
    return run


def train_only(inputs: Path, name: str, *flags: str, **options) -> tuple[Run, dict]:
    """A run that ends with the training, of which only checkpoints are left; and what MACE's training was given."""
    run, given = Run(inputs / name), {}

    def train_and_stop(train, **arguments):
        given.update(arguments)
        train(**arguments)
        raise KeyboardInterrupt

    with around_training(train_and_stop), contextlib.suppress(KeyboardInterrupt):
        train_here(inputs, *flags, **PEFT | {"work_dir": run.folder} | options)
    check_base(run, False, inputs / "foundation.model")
    return run, given


def adapters(run: Run, stage_two: bool = False) -> dict[str, torch.Tensor]:
    """The adapters in the latest checkpoint."""
    return {key: tensor for key, tensor in run.checkpoint(stage_two)["model"].items() if ".adapter." in key}


def check_base(run: Run, stage_two: bool, foundation_file: Path) -> torch.nn.Module:
    """The base is the foundation's to the last bit, but for what MACE narrows. Returns the foundation."""
    foundation = torch.load(foundation_file, weights_only=False)
    base = run.checkpoint(stage_two).get("base")  # None without --peft
    for key, tensor in foundation.state_dict().items():
        if base is not None and key not in RESCALED and not key.startswith("readouts."):  # one for each head
            same = base[key] == measures(tensor) | {"dtype": base[key]["dtype"]}  # that of the run
            assert base[key]["shape"] != list(tensor.shape) or same, key
    return foundation


def check_result(run: Run, stage_two: bool, foundation_file: Path) -> None:
    """Files are there, what has learnt has, the base is the foundation's, and all that was saved agrees."""
    stem = f"{NAME}{STAGES[stage_two]}"
    assert all((run.folder / f"{stem}{end}").exists() for end in (".model", "_compiled.model", "_adapter"))
    loaded = load_adapter(check_base(run, stage_two, foundation_file), run.adapter(stage_two))
    tensors, checkpoint = run.adapter_tensors(stage_two), run.result(stage_two)
    assert_same(tensors, {key: checkpoint[key] for key in tensors})
    structures = [atoms for head in loaded.heads for atoms in configurations(1, MOLECULE, seed=7)]
    for head, atoms in zip(loaded.heads, structures, strict=True):
        atoms.info["head"] = head
    expected = predict(loaded, structures)
    torch.testing.assert_close(predict(run.model(stage_two), structures), expected, rtol=1e-10, atol=1e-10)
    with disable_adapter(loaded):
        learnt = not torch.allclose(predict(loaded, structures)[1], expected[1], rtol=1e-3)
    assert learnt == (run.progress().result(stage_two) is not None)


def assert_same(tensors: dict, expected: dict, tolerance: float = 0) -> None:
    """Equal to the last bit, or to a tolerance."""
    assert tensors.keys() == expected.keys()
    torch.testing.assert_close(tensors, expected, rtol=tolerance, atol=tolerance)


def differ(tensors: dict, others: dict) -> bool:
    """Whether two runs end at different adapters: what is the same here is so for a reason."""
    return any(not torch.allclose(tensor, others[key], rtol=1e-3) for key, tensor in tensors.items())
