"""Pseudolabels of replay (``--pseudolabel_replay``): what MACE drops of them without an error."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn


def apply_pseudolabels(original: Callable[..., bool], foundation_model: nn.Module, pt_head_config, **kwargs) -> bool:
    """MACE's ``apply_pseudolabels_to_pt_head_configs``, with a model in the run's dtype and labels that count.

    MACE goes on with the labels of the file where the foundation has another dtype; and to a structure that has none
    there it gives weight 0, whatever label it gets.
    """
    configs = [*pt_head_config.collections.train, *pt_head_config.collections.valid]
    unlabelled = [config for config in configs if config.properties.get("energy") is None
                  and config.properties.get("forces") is None]
    for config in unlabelled:
        config.property_weights |= {"energy": 1.0, "forces": 1.0}
    if unlabelled:
        logging.info(f"Replay: {len(unlabelled)} structures without labels take their pseudolabels with weight 1")
    return original(foundation_model=foundation_model.to(torch.get_default_dtype()), pt_head_config=pt_head_config,
                    **kwargs)
