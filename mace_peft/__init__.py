"""Parameter-efficient fine-tuning for MACE interatomic potentials."""

__version__ = "0.1.0"

# Imported on first use: the start-up hook imports this package at every start of Python, where torch has no place.
_PUBLIC = {
    "PeftConfig": "config",
    "PeftError": "errors",
    "inject": "model.inject",
    "eject": "model.inject",
    "merge": "model.inject",
    "choose_ranks": "model.ranks",
    "start_along_gradients": "model.ranks",
    "trainable_parameters": "model.adapted",
    "print_trainable_parameters": "model.summary",
    "disable_adapter": "model.strength",
    "set_strength": "model.strength",
    "save_adapter": "adapter.directory",
    "load_adapter": "adapter.load",
    "calculator": "deploy",
}
__all__ = list(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from mace_peft.errors import needs_mace

    with needs_mace(name):
        module = importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    return getattr(module, name)


def __dir__():
    return sorted([*globals(), *_PUBLIC])
