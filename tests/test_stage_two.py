"""Stage two begins with an optimizer that has forgotten stage one, and with short steps.

That a run does so: ``test_combinations_training.py``.
"""

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch.optim import LBFGS, Adam, AdamW

from mace_peft.train.stage_two import WARM_UP, forget, steps_taken, warm_up

OPTIMIZERS = {"adam": lambda p: Adam(p, lr=0.1, amsgrad=True), "adamw": lambda p: AdamW(p, lr=0.1),
              "schedule-free": lambda p: AdamWScheduleFree(p, lr=0.1), "lbfgs": lambda p: LBFGS(p, lr=0.1)}


def step(optimizer, parameter, scale: float) -> float:
    """One step on a loss of that scale; returns how far it went."""
    getattr(optimizer, "train", lambda: None)()

    def closure():
        optimizer.zero_grad()
        loss = scale * (parameter ** 2).sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    optimizer.step(closure)
    return (parameter.detach() - before).norm().item()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizer_forgets_stage_one_and_warms_up(make):
    """It goes on as a new one does, whatever it has seen, but for the length of its first steps."""
    parameter, fresh = (torch.nn.Parameter(torch.tensor([3.0, -2.0])) for _ in range(2))
    optimizer = make([parameter])
    for _ in range(5):
        step(optimizer, parameter, 1e4)
    forget(optimizer)
    assert steps_taken(optimizer) == 0
    with torch.no_grad():
        fresh.copy_(parameter)
    other = make([fresh])
    for _ in range(3):
        assert step(optimizer, parameter, 1.0) == pytest.approx(step(other, fresh, 1.0))
    assert torch.equal(parameter, fresh)

    forget(optimizer)
    with warm_up(optimizer):
        short = step(optimizer, parameter, 1.0)
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert short <= step(make([fresh]), fresh, 1.0) * 1.01 / WARM_UP


def test_the_steps_lengthen_until_the_rate_is_whole():
    parameter = torch.nn.Parameter(torch.tensor([1e6], dtype=torch.float64))
    optimizer = Adam([parameter], lr=0.1)  # its steps on a constant slope have the length of the rate
    with warm_up(optimizer, 4):
        lengths = [step(optimizer, parameter, 1.0) for _ in range(6)]
    assert lengths == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rel=0.4)
    assert steps_taken(optimizer) == 6
