"""Stage two (``--swa``) starts with an optimizer of its own.

MACE goes on with the moments that the optimizer has gathered from the loss of stage one. Those of the new loss have
another scale, so that the first steps are far too long, and what is spoilt then takes the rest of the run to mend;
with AMSGrad, MACE's default, the largest moment ever seen keeps the later steps too short for that. Here the optimizer
forgets stage one, and the learning rate rises from zero over the first steps: the first moments are of a few batches
alone, and Adam moves every parameter by the full learning rate whatever their size.

Both are told by the optimizer's own state, which checkpoints hold: a restart before, at or after the switch goes on as
the run that was not cut off. Nothing here is about adapters: a full fine-tune can do the same.
"""

import contextlib
from collections.abc import Iterator

import torch

WARM_UP = 100  # steps


def begin_stage_two(optimizer: torch.optim.Optimizer) -> bool:
    """Let the optimizer forget stage one, once: True if it did now."""
    if all(group.get("stage_two") for group in optimizer.param_groups):
        return False
    if hasattr(optimizer, "eval"):  # schedule-free: the averaged weights are those that it has trained
        optimizer.eval()
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["stage_two"] = True
        group.update({name: start for name, start in {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}.items()
                      if name in group})
    return True


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """How many steps the optimizer has in its state."""
    counts = [group["k"] for group in optimizer.param_groups if "k" in group]  # schedule-free
    counts += [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts, default=0)


@contextlib.contextmanager
def warm_up(optimizer: torch.optim.Optimizer, steps: int = WARM_UP) -> Iterator[None]:
    """The learning rate of the optimizer's first steps is lower: it rises in proportion to their number."""
    rates: list[float] = []

    def lower(optimizer, *_):
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        share = min(1.0, (1 + steps_taken(optimizer)) / steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate

    def put_back(optimizer, *_):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    hooks = [optimizer.register_step_pre_hook(lower), optimizer.register_step_post_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
