"""Pseudolabels of replay (``--pseudolabel_replay``): what MACE drops of them without an error."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn


def apply_pseudolabels(original: Callable[..., bool], foundation_model: nn.Module, pt_head_config, **kwargs) -> bool:
    """MACE's ``apply_pseudolabels_to_pt_head_configs``, with a model in the run's dtype and labels that count.

    MACE goes on with the labels of the file where the foundation has another dtype; and to an energy or forces that
    the file lacks it gives weight 0, whatever label they get. A weight that the file gives to a label of its own stays.
    """
    configs = [*pt_head_config.collections.train, *pt_head_config.collections.valid]
    lacking = [(config, name) for config in configs for name in ("energy", "forces")
               if config.properties.get(name) is None]
    for config, name in lacking:
        config.property_weights[name] = 1.0
    if lacking:
        structures = len({id(config) for config, _ in lacking})
        logging.info(f"Replay: {structures} structures without labels take their pseudolabels with weight 1")
    return original(foundation_model=foundation_model.to(torch.get_default_dtype()), pt_head_config=pt_head_config,
                    **kwargs)
