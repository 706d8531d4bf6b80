"""Most of the time of a test goes into building and copying models: what is the same in a process is made once.

The same are models of the same arguments and the same random numbers, which go on as after the building. What they are
made of, generated code, is in ``remembered_graphs``.
"""

import copy
import functools
import pickle
from collections.abc import Callable

import torch
from mace.modules import models

from mace_peft.backbones import mace as backbone

BUILT: dict[tuple[bytes, ...], tuple[dict, torch.Tensor]] = {}


def remember_models() -> None:
    models.MACE.__init__ = build_once(models.MACE.__init__)
    backbone.rebuild = with_random_numbers_of_its_own(backbone.rebuild)


def build_once(build: Callable) -> Callable:
    @functools.wraps(build)
    def __init__(self, *args, **kwargs):
        before = torch.get_rng_state()
        try:
            # one by one, for a pickle says which of its objects are one and the same
            key = (*map(pickle.dumps, (*args, *kwargs.items(), torch.get_default_dtype())), before.numpy().tobytes())
        except (pickle.PicklingError, AttributeError, TypeError):  # such as of functions without a name
            build(self, *args, **kwargs)
            return
        if key in BUILT:
            content, after = BUILT[key]
            self.__dict__.update(copy.deepcopy(content))
            torch.set_rng_state(after)
            return
        build(self, *args, **kwargs)
        BUILT[key] = copy.deepcopy(self.__dict__), torch.get_rng_state()
        while len(BUILT) > 50:
            BUILT.pop(next(iter(BUILT)))

    return __init__


def with_random_numbers_of_its_own(rebuild: Callable) -> Callable:
    """The weights of a model that is rebuilt are replaced: so that they are the same each time."""
    @functools.wraps(rebuild)
    def wrapped(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return rebuild(*args, **kwargs)

    return wrapped
