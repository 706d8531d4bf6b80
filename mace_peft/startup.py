"""The start-up hook: hands ``mace.cli.run_train`` to the plugin when, and only when, that module is imported.

``mace_peft.pth`` imports this module at every start of the interpreter. So it imports ``sys`` alone, and only puts one
finder in front of ``sys.meta_path``; the plugin is imported once MACE's training command has been.
"""

import sys

TARGET = "mace.cli.run_train"
RUN_AS_MAIN = "from mace_peft.run_train import main\nmain()\n"


class Loader:
    """The loader of ``mace.cli.run_train``, followed by the plugin.

    It steps aside for a MACE that looks for plugins itself, which is one that defines ``load_plugins``.
    """

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        if name == "loader":  # not there yet in a copy that is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def exec_module(self, module):
        self.loader.exec_module(module)
        if not hasattr(module, "load_plugins"):
            from mace_peft.train import plugin

            plugin.install(module)

    def get_code(self, name):
        """The module's code; for ``python -m``, code that imports the module and runs its ``main()``.

        ``python -m`` executes this code in ``__main__`` without calling ``exec_module``. While it looks for the module,
        and only then, ``sys.argv[0]`` is "-m".
        """
        code = self.loader.get_code(name)
        if sys.argv[:1] == ["-m"] and "load_plugins" not in code.co_names:
            return compile(RUN_AS_MAIN, code.co_filename, "exec")
        return code


class Finder:
    """Finds ``mace.cli.run_train`` wherever the finders behind this one find it, and wraps its loader."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """The module's spec; None for every other module, which leaves it to the other finders."""
        if name != TARGET:
            return None
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                spec.loader = Loader(spec.loader)
                return spec
        return None


sys.meta_path.insert(0, Finder)
