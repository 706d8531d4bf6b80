"""MACE's contractions and e3nn's layers are graphs of torch.fx. Each model that is built, copied or read traces them,
writes them as Python and compiles that: most of what a small model costs.

A graph that holds no tensors is the same wherever its code is: it is made once in a process, and shared.
"""

import copy
import functools
import io
import types
import weakref
from collections.abc import Callable

import torch
from e3nn.o3 import _linear
from e3nn.o3._tensor_product import _tensor_product
from e3nn.util.codegen import _mixin
from mace.modules import symmetric_contraction
from mace.tools import cg
from opt_einsum_fx import jitable, optimize_einsums_full
from torch import _jit_internal
from torch.fx import GraphModule, graph_module
from torch.utils.weak import WeakIdKeyDictionary

TENSORS = ("_parameters", "_buffers", "_modules")  # where a graph holds them
COMPILED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of graphs, the compiled code, or its file
SAVED: weakref.WeakKeyDictionary[torch.jit.ScriptModule, bytes] = weakref.WeakKeyDictionary()
LOADED: weakref.WeakValueDictionary[bytes, torch.jit.ScriptModule] = weakref.WeakValueDictionary()
IMPORTS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of graphs, as files say them


def remember_graphs() -> None:
    _jit_internal.get_type_hint_captures = functools.cache(_jit_internal.get_type_hint_captures)  # it reads sources
    GraphModule.__deepcopy__ = copied
    GraphModule.__reduce__ = of_bare(reduced, GraphModule.__reduce__)
    graph_module.reduce_graph_module = read_once(graph_module.reduce_graph_module)
    symmetric_contraction.opt_einsum_fx.optimize_einsums_full = once(optimize_einsums_full, shapes)
    torch.fx.symbolic_trace = once(torch.fx.symbolic_trace, text)
    for module, name in ((_linear, "_codegen_linear"), (_tensor_product, "codegen_tensor_product_left_right"),
                         (_tensor_product, "codegen_tensor_product_right")):
        setattr(module, name, written_once(getattr(module, name)))
    if cg.CUET_AVAILABLE:
        from cuequivariance_torch.primitives import segmented_polynomial_naive as naive

        naive._tensor_product_fx = copied_from_the_first(naive._tensor_product_fx)
    # e3nn writes the code of a module that is copied to bytes, reads them, and compiles what they say
    jit = types.SimpleNamespace(script=compiled, ScriptModule=torch.jit.ScriptModule, save=save, load=load)
    _mixin.torch, _mixin.jitable = types.SimpleNamespace(jit=jit), lambda graph: graph


def written_once(write: Callable) -> Callable:
    """The graph of a layer of e3nn, whose constants have the default dtype."""
    known: dict[tuple[str, torch.dtype], object] = {}

    @functools.wraps(write)
    def wrapped(*args, **options):
        key = repr((args, options)), torch.get_default_dtype()
        if key not in known:
            known[key] = write(*args, **options)
        return known[key]

    return wrapped


def compiled(graph: GraphModule) -> torch.jit.ScriptModule:
    """One of its own where it has constants, which follow their model."""
    if graph not in COMPILED:
        code = torch.jit.script(jitable(graph))
        file = io.BytesIO()
        torch.jit.save(code, file)
        COMPILED[graph] = file.getvalue() if code.state_dict() else code
    code = COMPILED[graph]
    return torch.jit.load(io.BytesIO(code)) if isinstance(code, bytes) else code


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


def copied_from_the_first(make: Callable) -> Callable:
    """The graph that is made of equal arguments, which can be compared, with tensors of its own."""
    known: dict[tuple, torch.nn.Module] = {}

    @functools.wraps(make)
    def wrapped(*args, **options):
        key = (*args, *options.items())
        if key not in known:
            known[key] = make(*args, **options)
        return copy.deepcopy(known[key])

    return wrapped


def is_bare(state: dict) -> bool:
    return not any(state[held] for held in TENSORS)


def of_bare(cheap: Callable, method: Callable) -> Callable:
    """The cheap way for graphs without tensors."""
    @functools.wraps(method)
    def wrapped(self, *args):
        return (cheap if is_bare(self.__dict__) else method)(self, *args)

    return wrapped


def copied(module: GraphModule, memo: dict | None = None) -> GraphModule:
    """With tensors of its own, and the same code."""
    new = object.__new__(type(module))  # GraphModule's own makes a class
    new.__dict__.update({name: value.copy() if isinstance(value, dict) else value
                         for name, value in module.__dict__.items()})
    new.__dict__.update({name: copy.deepcopy(module.__dict__[name], memo) for name in TENSORS})
    return new


OF_TORCH = GraphModule.__reduce__


def reduced(module: GraphModule) -> tuple:
    if module._graph not in IMPORTS:
        IMPORTS[module._graph] = OF_TORCH(module)[1][1]
    state = {name: value for name, value in module.__dict__.items() if name != "_graph"}
    return graph_module.reduce_graph_module, (state, IMPORTS[module._graph])


def read_once(read: Callable) -> Callable:
    known: dict[tuple[str, str], GraphModule] = {}

    @functools.wraps(read)
    def reduce_graph_module(state: dict, imports: str) -> GraphModule:
        key = state["_code"], imports
        if not is_bare(state):
            return read(state, imports)
        if key not in known:
            known[key] = read(dict(state), imports)
        module = copied(known[key])
        module.__dict__.update(state)
        return module

    return reduce_graph_module


def once(make: Callable, key: Callable) -> Callable:
    """The graph that is made of equal arguments; key: of the arguments, or None where they say too little."""
    known: dict = {}

    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        found = key(*args, **kwargs)
        if found is None:
            return make(*args, **kwargs)
        if found not in known:
            known[found] = make(*args, **kwargs)
        return copied(known[found])

    return wrapped


def shapes(model: GraphModule, example_inputs: tuple) -> tuple | None:
    return (model.code, *(tuple(example.shape) for example in example_inputs)) if is_bare(model.__dict__) else None


def text(function: Callable, **options) -> tuple | None:
    """Of a function that reads nothing but strings around it."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if options or not cells or not all(isinstance(cell, list) and all(isinstance(part, str) for part in cell)
                                       for cell in cells):
        return None
    return (function.__code__, *map(tuple, cells))
