"""The times that a training logs, and the line that moves on a terminal."""

import io
import logging
import re
import sys
import types

import pytest
import torch

from mace_peft.train.progress import Progress, Stage
from mace_peft.train.timing import span, timed

WEIGHT = torch.nn.Parameter(torch.ones(1))


def train(epochs: int, first: int = 0, stop: int | None = None, **options) -> None:
    """Epochs of two steps each; patience stops after the last of ``stop``."""
    run = types.SimpleNamespace(**{"optimizer": torch.optim.SGD([WEIGHT]), "train_loader": [1, 2], "rank": 0,
                                   "max_num_epochs": epochs} | options)
    progress = Progress({}, [Stage(1.0)], epoch=first)
    with timed(run, progress) as tell:
        while progress.epoch < epochs and not progress.stopped:
            for _ in run.train_loader:
                run.optimizer.step()
            progress.epoch += 1
            progress.stopped = progress.epoch == stop
            tell()


@pytest.mark.parametrize("options, left", [
    ({"epochs": 3}, [2, 1]), ({"epochs": 100}, [99, *range(90, 0, -10)]), ({"epochs": 1}, []),
    ({"epochs": 30, "first": 27}, [2, 1]), ({"epochs": 100, "stop": 15}, [99, 90]),
], ids=str)
def test_the_log_has_the_time_of_an_epoch_and_of_the_end(caplog, options, left):
    with caplog.at_level(logging.INFO):
        train(**options)
    *on_the_way, last = caplog.messages
    assert all(re.fullmatch(r"Time: \S+ s per epoch; \d+ more take about 0:00:\d\d, until [-\d]+ \d\d:\d\d", line)
               for line in on_the_way)
    assert [int(line.split("; ")[1].split()[0]) for line in on_the_way] == left
    assert re.fullmatch(r"Time: \S+ s per epoch, 0:00:\d\d in all", last)


def test_a_line_moves_on_a_terminal_alone(caplog, capsys, monkeypatch):
    train(3)
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(3, rank=1)  # of a distributed run
    assert terminal.getvalue() == ""
    train(3)
    assert "epoch 0 of 3:   0%" in terminal.getvalue() and "epoch 2 of 3:  67%" in terminal.getvalue()


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00:00"), (3723, "1:02:03"), (90000, "1 day, 1:00:00")])
def test_spans_of_time(seconds, text):
    assert span(seconds) == text
