"""The package imports e3nn here and nowhere else.

e3nn 0.4.4, which mace-torch pins, reads constants by ``torch.load``, which torch 2.6 and later refuse unless this
environment variable is set: ``import mace`` sets it for good, and it is set here only while e3nn is imported.
"""

import os

NAME = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
before = os.environ.get(NAME)
os.environ[NAME] = "1"
try:
    from e3nn import __version__, nn, o3
    from e3nn.util.jit import compile, compile_mode
finally:
    if before is None:
        del os.environ[NAME]
    else:
        os.environ[NAME] = before

RadialLayer = type(nn.FullyConnectedNet([1, 1])[0])  # e3nn does not export the class

__all__ = ["RadialLayer", "__version__", "compile", "compile_mode", "nn", "o3"]
