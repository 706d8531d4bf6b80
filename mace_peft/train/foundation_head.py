"""The head of the foundation that a run starts from."""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import nn

from mace_peft.blocks.adapted import adapted_blocks
from mace_peft.errors import PeftError, did_you_mean
from mace_peft.model.adapted import trainable_parameters
from mace_peft.model.inject import eject, inject
from mace_peft.train.data.heads import PT_HEAD, read_heads


def choose_foundation_head(args: argparse.Namespace, foundation: nn.Module, adapted: bool) -> None:
    """Set ``--foundation_head`` to the head that the run starts from, where the foundation has several.

    If none is given, that is the one with the name of the run's head, and without such a one the first, as in MACE.
    Raises PeftError for one that is not there, and where the run has several heads and the foundation has heads of
    their names: all start from one. adapted: whether the run goes on from adapters, which have a part for each head.
    """
    known, given = list(foundation.heads), args.foundation_head
    if given is not None and given not in known:
        raise PeftError(f"--foundation_head {given} is not in the foundation model, which has {', '.join(known)}"
                        f"{did_you_mean(given, known)}: give one of them, or leave it out")
    if given is not None or len(known) == 1:
        return
    names = [name for name in read_heads(args) if name != PT_HEAD]
    same = [name for name in names if name in known]
    if same and len(names) > 1 and not adapted:
        raise PeftError(f"the run has the heads {', '.join(names)}, and the foundation model has {', '.join(known)}: "
                        "all heads of a run start from one head of the foundation; choose it by --foundation_head")
    args.foundation_head = same[0] if len(names) == 1 and same else first_head(known)


def first_head(heads: list[str]) -> str:
    """The head that MACE takes where none is chosen."""
    return next((head for head in heads if head != PT_HEAD), heads[0])


@torch.no_grad()
def with_one_head(adapted: nn.Module, head: str, remove_pt_head: Callable) -> nn.Module:
    """The adapted model with that head alone, where MACE's ``remove_pt_head`` knows no gates on readouts.

    A readout has the channels of one head after those of the other, and so have the gates on them. Raises PeftError
    for other adapters on readouts: weights of another number of channels are scaled.
    """
    odd = [name for name, block in adapted_blocks(adapted).items()
           if name.startswith("readouts.") and not block.adapter.on_features]
    if odd:
        raise PeftError(f"the adapter on {odd[0]} is one for the heads {', '.join(adapted.heads)} together, and the "
                        f"run starts from {head}: merge the adapter first, or start from the foundation")
    trained = copy.deepcopy(adapted)
    held = dict(trained.named_parameters()) | dict(trained.named_buffers())
    trained.peft_originals = {name: held[name].clone() for name in trained.peft_originals}  # for eject to leave them
    single = inject(remove_pt_head(eject(trained), head), adapted.peft_config)
    sources = trainable_parameters(adapted)
    for name, parameter in trainable_parameters(single).items():
        source = sources[name]
        if ".adapter." not in name:
            continue
        for dim, channels in enumerate(parameter.shape):
            if source.shape[dim] != channels:
                source = source.unflatten(dim, (len(adapted.heads), channels))
                source = source.select(dim, adapted.heads.index(head))
        parameter.copy_(source)
    return single
