"""Pseudolabels of replay (``--pseudolabel_replay``): what MACE drops of them without an error."""

import logging
from collections.abc import Callable

import torch
from mace.data import Configuration
from torch import nn

from mace_peft.errors import PeftError


def apply_pseudolabels(original: Callable[..., bool], foundation_model: nn.Module, pt_head_config, **kwargs) -> bool:
    """MACE's ``apply_pseudolabels_to_pt_head_configs``, with a model in the run's dtype and labels that count.

    MACE goes on with the labels of the file where the foundation has another dtype; and to an energy or forces that
    the file lacks it gives weight 0, whatever label they get. A weight that the file gives to a label of its own stays.
    Raises PeftError where MACE could not label all, as where memory is short: those would train to zeros.
    """
    unlabelled = lacking(pt_head_config)
    for config, name in unlabelled:
        config.property_weights[name] = 1.0
    structures = len({id(config) for config, _ in unlabelled})
    done = original(foundation_model=foundation_model.to(torch.get_default_dtype()), pt_head_config=pt_head_config,
                    **kwargs)
    left = len({id(config) for config, _ in lacking(pt_head_config)})
    if left:
        raise PeftError(f"--pseudolabel_replay True left {left} of {structures} structures without labels (MACE's "
                        "log says why): give smaller batches by --batch_size, or labels in --pt_train_file")
    if structures:
        logging.info(f"Replay: {structures} structures without labels take their pseudolabels with weight 1")
    return done


def lacking(pt_head_config) -> list[tuple[Configuration, str]]:
    """Structures of the head, each with a label that it lacks."""
    configs = [*pt_head_config.collections.train, *pt_head_config.collections.valid]
    return [(config, name) for config in configs for name in ("energy", "forces")
            if config.properties.get(name) is None]
