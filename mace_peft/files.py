"""Files that are complete or not there, and one line where the disk takes none."""

import contextlib
import errno
import functools
import io
import os
import stat
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

from mace_peft.errors import PeftError, one_line

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

# what a disk that is full, over its quota or read-only says, and a file above the limit of the process
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
REMEDY = "make room or give it another place"
NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0)
NOT_WAITED_FOR = getattr(os, "O_NONBLOCK", 0)


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


@contextlib.contextmanager
def complete_file(path: str | os.PathLike, content: bytes | memoryview, name: str | None = None) -> Iterator[None]:
    """Write the file beside its place, hidden; it has its own name, on the disk, when the block ends well.

    Killed, on a full disk, or where the block fails, the file that was there stays. Of several writers each waits for
    the one before. No link under either name is followed. name: of the file while it is unfinished, by default made
    of its own.
    """
    folder, own = os.path.split(os.path.abspath(path))
    file, unfinished = open_unfinished(os.path.join(folder, f".{name or own}.mace_peft_unfinished"))
    with file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            yield
            os.replace(unfinished, path)
            sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(unfinished)
            raise
        finally:
            lock(file, free=True)  # closing it is not enough where another process was forked meanwhile


def open_unfinished(path: str) -> tuple[BinaryIO, str]:
    """The file, made or emptied, for this writer alone, and its name. A link or device in its place is removed.

    Where the system has no locks, each writer has a name of its own, which nobody takes up if it is killed.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):
            there = os.lstat(path)
            if not stat.S_ISREG(there.st_mode) or there.st_nlink > 1:
                os.remove(path)
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | NOT_FOLLOWED, 0o666), "r+b")
        if not lock(file):
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            path = f"{path}_{uuid.uuid4().hex}"
            return open(path, "x+b"), path
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                file.truncate()
                return file, path
        file.close()  # another writer has finished it, or given it up, while this one waited


def lock(file: BinaryIO, free: bool = False) -> bool:
    """Wait until no other writer has the file; returns whether the system can tell."""
    try:
        fcntl.flock(file, fcntl.LOCK_UN if free else fcntl.LOCK_EX)
    except (AttributeError, OSError):  # Windows has no such locks, and neither have some file systems
        return False
    return True


def make_folder(path: str | os.PathLike) -> None:
    """The folder, with those that it lies in, on the disk."""
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path))
        os.makedirs(path, exist_ok=True)
        sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """Bring the names in the folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # some file systems, and Windows, take no such order
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_regular(path: str | os.PathLike) -> None:
    """Raise PeftError if something is there under this name, or where it leads to, that is no regular file."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return  # whoever opens it says what is wrong
    if not regular:
        raise PeftError(f"{path} is no regular file, but a directory, pipe or device: give the name of a file")


def open_regular(path: str | os.PathLike, most: int) -> BinaryIO:
    """The file, of at most so many bytes, to be read. No link is followed, and no pipe waited for.

    Raises PeftError for what is no regular file or is larger, OSError if it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | NOT_FOLLOWED | NOT_WAITED_FOR)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise PeftError(f"{path} is a link: copy the file that it leads to here") from None
    there = os.fstat(descriptor)
    if stat.S_ISREG(there.st_mode) and there.st_size <= most:
        return open(descriptor, "rb")
    os.close(descriptor)
    what = f"has {there.st_size:,} bytes, of at most {most:,}" if stat.S_ISREG(there.st_mode) else "is no regular file"
    raise PeftError(f"{path} {what}: save or copy it again")


def write_complete(path: str | os.PathLike, content: bytes | memoryview, name: str | None = None, **remedy: str
                   ) -> None:
    """Write the file, complete or not at all, see ``complete_file``.

    Raises PeftError if it cannot be written, with the ``remedy``, see ``one_line_errors``, or would take the place of
    a pipe or device.
    """
    check_regular(path)
    with one_line_errors(path, **remedy), complete_file(path, content, name):
        pass


def complete(save: Callable, **remedy: str) -> Callable:
    """``torch.save``, ``Figure.savefig`` and the like, but the file is complete or not there: ``write_complete``."""

    @functools.wraps(save)
    def save_complete(obj, f, *args, **kwargs):
        if not isinstance(f, (str, os.PathLike)):
            return save(obj, f, *args, **kwargs)
        content = io.BytesIO()
        save(obj, content, *args, **kwargs)
        write_complete(f, content.getbuffer(), **remedy)

    return save_complete
