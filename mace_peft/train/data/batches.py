"""The batches of data loaders: MACE trains on none where data fill no batch, and evaluates those that fill one."""

import logging
from collections.abc import Sized


def whole_batches(dataset: Sized, *, batch_size: int, drop_last: bool = False, **options) -> dict:
    """The options of a data loader, given MACE's.

    One that trains leaves out what fills no batch; where all the data fill none, they come in one smaller batch. MACE
    gives loaders that train, or that processes share, a ``sampler``, which may be None. The others are of tables and
    figures, of one head or a test set: they take all structures.
    """
    if "sampler" not in options:
        return {**options, "batch_size": batch_size, "drop_last": False, "shuffle": False}
    if drop_last and 0 < len(dataset) < batch_size:
        logging.info(f"{len(dataset)} configurations fill no batch of {batch_size}: they come in one of {len(dataset)}")
        batch_size = len(dataset)
    return {**options, "batch_size": batch_size, "drop_last": drop_last}
