"""Batches of fewer structures where there are not enough for one: MACE would train on none."""

import logging
from collections.abc import Sized


def full_batches(dataset: Sized, *, batch_size: int, drop_last: bool = False, **options) -> dict:
    """The options of a data loader that leaves out what fills no batch, with batches that the data can fill."""
    if drop_last and 0 < len(dataset) < batch_size:
        logging.info(f"{len(dataset)} configurations fill no batch of {batch_size}: they come in one of {len(dataset)}")
        batch_size = len(dataset)
    return {"batch_size": batch_size, "drop_last": drop_last, **options}
