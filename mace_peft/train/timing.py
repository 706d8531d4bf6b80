"""How long the training takes: lines in the log, and on a terminal a line that moves."""

import contextlib
import datetime
import logging
import time
import types
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mace_peft.train.progress import Progress

LINES = 10  # in the log, of a whole run


@contextlib.contextmanager
def timed(run: types.SimpleNamespace, progress: Progress) -> Iterator[Callable[[], None]]:
    """What it gives is to be called after each epoch: it logs the time of an epoch, and when the training will end.

    run: the arguments of ``mace.tools.train.train``. It logs after the first epoch, about ten times on the way, and at
    the end. Meanwhile a bar stands below the log where stderr is a terminal.
    """
    begun, epochs, first, last = time.monotonic(), 0, progress.epoch, run.max_num_epochs
    every = max(1, (last - first) // LINES)
    steps = 1 if isinstance(run.optimizer, torch.optim.LBFGS) else len(run.train_loader)  # of an epoch

    def tell() -> None:
        nonlocal epochs
        epochs += 1
        bar.n = progress.epoch * steps  # patience may have left some out
        bar.set_description(f"epoch {progress.epoch} of {last}")
        seconds, left = time.monotonic() - begun, last - progress.epoch
        said = f"Time: {seconds / epochs:.3g} s per epoch"
        if progress.stopped or not left:
            logging.info(f"{said}, {span(seconds)} in all")
        elif epochs == 1 or epochs % every == 0:
            more = seconds / epochs * left
            end = datetime.datetime.now() + datetime.timedelta(seconds=more)
            logging.info(f"{said}; {left} more take about {span(more)}, until {end:%Y-%m-%d %H:%M}")

    with tqdm(total=last * steps, initial=first * steps, desc=f"epoch {first} of {last}", unit="batch", smoothing=0,
              leave=False, disable=None if run.rank == 0 else True) as bar:
        step = run.optimizer.register_step_post_hook(lambda *_: bar.update())
        try:
            with contextlib.nullcontext() if bar.disable else logging_redirect_tqdm():
                yield tell
        finally:
            step.remove()


def span(seconds: float) -> str:
    """Such as 1:02:03, or 2 days, 1:02:03."""
    return str(datetime.timedelta(seconds=round(seconds)))
