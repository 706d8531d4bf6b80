"""Most of the time of a test goes into building and copying models: what is the same in a process is made once.

The same are models of the same arguments and the same random numbers, which go on as after the building; and the code
that e3nn generates for a module and for a copy of it, where it holds no tensors.
"""

import copy
import functools
import io
import pickle
import types
import weakref
from collections.abc import Callable

import torch
from e3nn.util.codegen import _mixin
from mace.modules import models

from mace_peft.backbones import mace as backbone

BUILT: dict[tuple[bytes, ...], tuple[dict, torch.Tensor]] = {}
SAVED: weakref.WeakKeyDictionary[torch.jit.ScriptModule, bytes] = weakref.WeakKeyDictionary()
LOADED: weakref.WeakValueDictionary[bytes, torch.jit.ScriptModule] = weakref.WeakValueDictionary()


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


def remember_generated_code() -> None:
    """e3nn writes the code of a module that is copied to bytes, reads them, and compiles what they say."""
    jit = types.SimpleNamespace(script=torch.jit.script, ScriptModule=torch.jit.ScriptModule, save=save, load=load)
    _mixin.torch = types.SimpleNamespace(jit=jit)


def save(code: torch.jit.ScriptModule, file: io.BytesIO) -> None:
    if code in SAVED:
        file.write(SAVED[code])
        return
    torch.jit.save(code, file)
    remember(code, file.getvalue())


def load(file: io.BytesIO) -> torch.jit.ScriptModule:
    content = file.getvalue()
    code = LOADED.get(content)
    if code is None:
        code = torch.jit.load(file)
    remember(code, content)
    return code


def remember(code: torch.jit.ScriptModule, content: bytes) -> None:
    if not code.state_dict():
        SAVED[code], LOADED[content] = content, code
