"""The singular values of the low-rank updates that an adapter has learnt, as plain values."""

import torch
from torch import nn

from mace_peft.blocks.adapted import Updated, adapted_blocks
from mace_peft.errors import PeftError
from mace_peft.model.adapted import check_adapted
from mace_peft.model.targets import unit


@torch.no_grad()
def update_spectra(model: nn.Module) -> dict:
    """Singular values of each low-rank update (alpha / r) A B, and the Frobenius norm of the raw weight it is added to.

    Returns ``{"peft": settings, "units": {module: [{"weight": its name, "singular_values": [at most rank, descending],
    "weight_norm": number}]}}``. A weight is one matrix of the operation: that of an irrep, a path or a layer; of a
    symmetric contraction the highest order, (elements * paths, channels).

    Raises PeftError if the model has no low-rank update, or if one is not finite.
    """
    check_adapted(model)
    config = model.peft_config
    units: dict[str, list[dict]] = {}
    for name, block in adapted_blocks(model).items():
        own = block.own_weights() if isinstance(block, Updated) else {}
        updates = block.adapter.low_rank_updates(own) if own else {}
        for key, (update, weight) in updates.items():
            if not update.isfinite().all():
                raise PeftError(f"the update of {name} is not finite: the training has diverged, lower its rate")
            owner = unit(model, name)
            part = name[len(owner) + 1 :]
            values = torch.linalg.svdvals(update.double())[: config.of_module(name).rank]
            units.setdefault(owner, []).append({
                "weight": part if key in own else f"{part} {key}".strip(),  # of a layer there is one matrix, its weight
                "singular_values": values.tolist(), "weight_norm": weight.double().norm().item()})
    if not units:
        raise PeftError(f"<method> {config.method} at {config.targets or 'no module'} has no low-rank update to draw: "
                        "draw an adapter of elora, or of mmea with targets published")
    return {"peft": config.to_dict(), "units": units}
