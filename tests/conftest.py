"""``@pytest.mark.since("0.3.15")``: what a test needs came with that release of mace-torch, see ``noxfile.py``."""

from importlib import metadata


def release(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def pytest_configure(config):
    config.addinivalue_line("markers", "since(release): deselected before that release of mace-torch")


def pytest_collection_modifyitems(config, items):
    installed = release(metadata.version("mace-torch"))
    early = [item for item in items if any(installed < release(mark.args[0]) for mark in item.iter_markers("since"))]
    if early:
        config.hook.pytest_deselected(items=early)
        items[:] = [item for item in items if item not in early]
