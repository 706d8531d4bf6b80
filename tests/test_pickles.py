"""Files of adapted models name one path of this package, so that they outlive all others."""

import io
import pickletools
import subprocess
import sys
import zipfile

import pytest
import torch
from tiny import configurations, predict, randomise, tiny_mace

from mace_peft import PeftConfig, inject
from mace_peft.methods import METHODS


def globals_of(content: bytes) -> set[str]:
    """``module name`` of everything that the pickle imports."""
    found, texts = set(), []
    for operation, argument, _ in pickletools.genops(content):
        if operation.name == "GLOBAL":
            found.add(argument)
        elif operation.name == "STACK_GLOBAL":
            found.add(" ".join(texts[-2:]))
        elif isinstance(argument, str):
            texts.append(argument)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_model_file_names_one_path(method):
    ranked = {"rank": 2} if METHODS[method].rank is not None else {}
    placed = {} if METHODS[method].trains_base else {"targets": "all", "train_also": "readouts.*"}
    model = randomise(inject(tiny_mace(), PeftConfig(method, **placed, **ranked)))
    file = io.BytesIO()
    torch.save(model, file)
    with zipfile.ZipFile(file) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert {name for name in globals_of(content) if name.startswith("mace_peft")} == {"mace_peft.restore restore"}


def test_a_model_file_loads_in_another_process(tmp_path):
    """Which imports nothing of this package before."""
    for method, targets in (("gates", "products"), ("gates", "all"), ("mmea", "published"), ("elora+scales", "all")):
        model = randomise(inject(tiny_mace(), PeftConfig(method, rank=2, targets=targets)), scale=0.3)
        torch.save((model, predict(model, configurations(1))), tmp_path / f"{method}-{targets}.pt")
    code = f"""if True:
        import pathlib, sys, torch
        sys.path[:] = {sys.path!r}
        loaded = [torch.load(path, weights_only=False) for path in pathlib.Path({str(tmp_path)!r}).glob("*.pt")]
        from tiny import assert_close, configurations, predict
        for model, expected in loaded:
            assert_close(predict(model, configurations(1)), expected)
        assert len(loaded) == 4"""
    subprocess.run([sys.executable, "-c", code], check=True)
