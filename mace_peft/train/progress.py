"""How far a run has come, and which weights are its result so far: what a restart has to know beside the weights."""

import dataclasses
import math

import torch


@dataclasses.dataclass
class Stage:
    """A part of the training with one loss, on the validation set.

    start: the loss of what the stage has to beat; best, epoch, file: the lowest loss of its epochs so far, which epoch
    that was, and the name of its checkpoint.
    """

    start: float
    best: float = math.inf
    epoch: int | None = None
    file: str | None = None

    @property
    def better(self) -> bool:
        """Whether an epoch of it has beaten its start."""
        return self.best < self.start


@dataclasses.dataclass
class Progress:
    """A run between two epochs.

    weights: what trains, by name, as it was before the first epoch; stages: one or two; epoch: the next; loss: of the
    last validation; waited: validations since the best one of the stage; stopped: whether ``--patience`` has ended the
    training; kept: structures of ``--peft_keep`` that the steps have taken, None without.
    """

    weights: dict[str, torch.Tensor]
    stages: list[Stage]
    epoch: int = 0
    loss: float = math.inf
    waited: int = 0
    stopped: bool = False
    kept: int | None = None

    @classmethod
    def from_dict(cls, held: dict) -> "Progress":
        return cls(**{**held, "stages": [Stage(**stage) for stage in held["stages"]]})

    def to_dict(self) -> dict:
        """As values that a checkpoint can hold."""
        return {**vars(self), "stages": [dataclasses.asdict(stage) for stage in self.stages]}

    @property
    def stage(self) -> Stage:
        return self.stages[-1]

    @property
    def in_stage_two(self) -> bool:
        return len(self.stages) == 2

    def begin_stage_two(self, loss: float) -> None:
        """loss: that of stage two, of the result of stage one."""
        self.stages.append(Stage(loss))
        self.waited = 0

    def take(self, loss: float, file: str) -> bool:
        """Note the validation loss of the epoch; returns whether it is the lowest of its stage."""
        self.loss = loss
        if loss < self.stage.best:
            self.stage.best, self.stage.epoch, self.stage.file = loss, self.epoch, file
            self.waited = 0
            return True
        self.waited += 1
        return False

    def result(self, stage_two: bool) -> Stage | None:
        """The stage whose best epoch is the result, after stage one or two; None for the start of the run.

        An epoch that is no better than what its stage started from is no result.
        """
        return next((stage for stage in self.stages[1 if stage_two else 0::-1] if stage.better), None)
