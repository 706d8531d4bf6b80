"""Files that are complete or not there, and one line where the disk takes none."""

import contextlib
import errno
import functools
import io
import os
from collections.abc import Callable, Collection, Iterator

from mace_peft.errors import PeftError, one_line

# what a disk that is full, over its quota or read-only says, and a file above the limit of the process
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
REMEDY = "make room or give it another place"


@contextlib.contextmanager
def one_line_errors(what: object, only: Collection[int] | None = None, *,
                    remedy: str = f"{REMEDY}, and go on with --restart_latest") -> Iterator[None]:
    """Raise PeftError in the place of an OSError (of only these numbers) that kept ``what`` from being written."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        raise PeftError(f"{what} cannot be written ({error.strerror or one_line(error)}): {remedy}") from None


def write_complete(path: str | os.PathLike, content: bytes | memoryview, unfinished: str | os.PathLike | None = None,
                   **remedy: str) -> None:
    """Write the file under the name ``unfinished``, then give it its own: killed, or on a full disk, none is cut short.

    Raises PeftError if it cannot be written, with the ``remedy``, see ``one_line_errors``.
    """
    unfinished = unfinished or f"{os.fspath(path)}.unfinished"
    with one_line_errors(path, **remedy):
        try:
            with open(unfinished, "wb") as file:
                file.write(content)
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(unfinished)
            raise


def complete(save: Callable) -> Callable:
    """``torch.save`` or ``torch.jit.save``, but the file is complete or not there, see ``write_complete``."""

    @functools.wraps(save)
    def save_complete(obj, f, *args, **kwargs):
        if not isinstance(f, (str, os.PathLike)):
            return save(obj, f, *args, **kwargs)
        content = io.BytesIO()
        save(obj, content, *args, **kwargs)
        write_complete(f, content.getbuffer())

    return save_complete
