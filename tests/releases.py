"""Which release of mace-torch the tests run with: ``@pytest.mark.since("0.3.15")`` and ``since("0.3.15")``."""

from importlib import metadata


def release(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def since(first: str) -> bool:
    """Whether that release of mace-torch is installed, or a later one."""
    return release(metadata.version("mace-torch")) >= release(first)
