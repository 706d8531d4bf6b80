"""A stand-in for a GPU, in the CPU's memory: an operation that mixes the two devices fails, as on CUDA.

Which device a tensor is on is a mark on its storage. Kernels, streams and memory of a GPU are not stood in for.
"""

import contextlib
import unittest.mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
# copies cross devices, and indices of a tensor on the GPU may be on the CPU
MAY_MIX = ("copy_", "index", "index_put_", "_index_put_impl_")

# weak references: the address of a storage that is gone is not taken by another one
marked: dict[int, StorageWeakRef] = {}
unmarked_gradients: dict[int, StorageWeakRef] = {}


def device_of(tensor: torch.Tensor) -> torch.device:
    return CUDA if tensor.untyped_storage()._cdata in marked else CPU


def put(tree, device: torch.device, marks: dict[int, StorageWeakRef] = marked):
    """Mark all tensors of the tree as being on the device; returns the tree."""
    for storage in [tensor.untyped_storage() for tensor in tensors_in(tree)]:
        if device == CUDA:
            marks[storage._cdata] = StorageWeakRef(storage)
        else:
            marks.pop(storage._cdata, None)
    return tree


def tensors_in(tree) -> list[torch.Tensor]:
    """Of lists, tuples and dictionaries; torch's own flattening takes far longer, at each operation of a run."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for branch in branches for tensor in tensors_in(branch)]


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor if device_of(tensor) == device else put(tensor.clone(), device)


class Operations(TorchDispatchMode):
    """Results are where the operands are, and operands of more than a number are all in one place."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, operands = function._schema.name.split("::")[1], tensors_in((args, kwargs))
        there = any(device_of(operand) == CUDA for operand in operands)
        here = [operand for operand in operands if device_of(operand) == CPU and (operand.dim() or name == "equal")
                and operand.untyped_storage()._cdata not in unmarked_gradients]
        if there and here and name not in MAY_MIX:
            places = [(*operand.shape, str(device_of(operand))) for operand in operands]
            raise RuntimeError(f"{function} mixes devices: {places}")
        result = function(*args, **kwargs or {})
        if not operands and torch._C._current_autograd_node() is not None:
            # zeros of autograd's own, whose device is not seen here
            return put(result, CUDA, unmarked_gradients)
        return put(result, CUDA) if there and name != "copy_" else result


class Functions(TorchFunctionMode):
    """What asks for a device, or is asked for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name == "__get__" and function.__self__ is torch.Tensor.device:
            return device_of(args[0])
        if name == "cpu":
            return move(args[0], CPU)
        if name == "pin_memory":  # of the CPU's memory, in which all is
            return args[0]
        if name == "numpy" and device_of(args[0]) == CUDA:
            raise TypeError("a tensor on CUDA has no numpy array")
        if name == "to":
            return self.to(function, *args, **kwargs)
        if name == "as_tensor" and isinstance(args[0], torch.Tensor):
            return args[0].to(**kwargs)
        if kwargs.get("device") is not None:
            return put(function(*args, **kwargs | {"device": CPU}), full(kwargs["device"]))
        result = function(*args, **kwargs)
        return put(result, device_of(args[0])) if name == "__deepcopy__" else result

    def to(self, function, tensor, *args, **kwargs):
        """``.to(device)``, ``.to(dtype)``, ``.to(other)``, and what they have besides."""
        args, device = [kwargs.pop("device", None), *args] if "device" in kwargs else [*args], device_of(tensor)
        for position, wanted in enumerate(args):
            if isinstance(wanted, (str, torch.device)):
                args[position], device = CPU, full(wanted)
            elif isinstance(wanted, torch.Tensor):
                device = device_of(wanted)
        return move(function(tensor, *args, **kwargs), device)


def full(device) -> torch.device:
    return CUDA if torch.device(device).type == "cuda" else CPU


def no_accelerator(check_available: bool = False) -> None:
    """The compiled one has no driver here, and what is stood in for has to do without its streams."""


@contextlib.contextmanager
def second_device():
    """``cuda`` is there meanwhile, for code of this process."""
    load = torch.load

    def locate(storage, location):
        marked[storage._cdata] = StorageWeakRef(storage)
        return storage

    def load_there(f, map_location=None, **kwargs):
        there = isinstance(map_location, (str, torch.device)) and full(map_location) == CUDA
        return load(f, map_location=locate if there else map_location, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "init": None,
                            "is_current_stream_capturing": False}.items():
            stack.enter_context(unittest.mock.patch.object(torch.cuda, name, lambda value=value: value))
        if hasattr(torch, "accelerator"):  # of which a build for CUDA asks for pinned memory and streams
            stack.enter_context(unittest.mock.patch.object(torch.accelerator, "current_accelerator", no_accelerator))
        stack.enter_context(unittest.mock.patch.object(torch, "load", load_there))
        stack.callback(marked.clear)
        stack.callback(unmarked_gradients.clear)
        stack.enter_context(Functions())
        stack.enter_context(Operations())
        yield
