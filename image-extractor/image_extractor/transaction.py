"""Output files that appear whole or not at all; large ones have one writer at a time.

`whole_file` gives a hidden neighbour of the output to write to and puts it in place when all went
well; `write_whole` does so for bytes in memory. `OutputTransaction` is for data sets, whose writing
takes long: it also holds a lock against a second writer, and appending works on a copy, so that the
old file stays readable until the new one is whole.

A file that is replaced passes on its mode bits; where the output is a symbolic link, the file it
points to is replaced. A killed run leaves hidden neighbours behind; those of a data set are removed
by the next run with the same output.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes `path` if the block ends without an error.

    Devices such as /dev/stdout are written directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all. Raises DataError."""
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise DataError(cannot_write(path, error)) from error


def cannot_write(path: Path, error: Exception) -> str:
    """Message for an error of the system or of HDF5 while writing `path`."""
    reason = getattr(error, "strerror", None) or type(error).__name__
    return (
        f"{path}: cannot be written ({reason}). "
        "Check its folder, the permissions and the free space."
    )


def _put_in_place(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to the disk and rename it to `path`."""
    if path.exists():
        shutil.copymode(path, temporary)
    with temporary.open("rb") as f:
        os.fsync(f.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class OutputTransaction:
    """Lock an output and give a temporary path to write to.

    The lock is an flock on `.NAME.lock`, which the system releases when the process ends, however
    it ends.

    Parameters
    ----------
    output : Path
        The file to be written.
    append : bool
        Begin with a copy of `output`, if it exists.

    Attributes
    ----------
    path : Path
        What to write to until `commit`.

    Raises
    ------
    DataError
        If another process is writing `output`, or the folder, the lock or the copy fails.
    """

    def __init__(self, output: Path, append: bool) -> None:
        self.output = output = output.resolve()
        self.path = output.with_name(f".{output.name}.partial")
        self._lock_path = output.with_name(f".{output.name}.lock")
        if not output.parent.is_dir():
            raise DataError(f"{output}: its folder does not exist. Create {output.parent} first.")
        if output.exists() and not output.is_file():
            raise DataError(f"{output}: is a folder or a device. Give the name of a file.")
        self._lock = self._acquire()
        try:
            self._remove_leftovers()
            if append and output.exists():
                shutil.copyfile(output, self.path)
        except OSError as error:
            self._release()
            raise DataError(cannot_write(output, error)) from error

    def _acquire(self) -> int:
        while True:
            try:
                handle = os.open(self._lock_path, os.O_CREAT | os.O_RDWR, 0o666)
            except OSError as error:
                raise DataError(cannot_write(self.output, error)) from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(handle)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise DataError(
                        f"{self.output}: another process is writing it. Wait "
                        "until it has finished, or choose another output."
                    ) from None
                raise DataError(
                    f"{self.output}: its file system does not support locks ({error.strerror}). "
                    "Write to a local disk and move the file."
                ) from error
            # The holder removes the file when done: a lock on a removed file locks nothing.
            try:
                if self._lock_path.stat().st_ino == os.fstat(handle).st_ino:
                    return handle
            except FileNotFoundError:
                pass
            os.close(handle)

    def _release(self) -> None:
        if self._lock >= 0:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def part(self, name: str) -> Path:
        """Path of a further temporary file, removed with the transaction."""
        return self.path.with_name(f"{self.path.name}-{name}")

    def commit(self) -> None:
        """Make the temporary file the output."""
        _put_in_place(self.path, self.output)
        self.close()

    def close(self) -> None:
        """Remove temporary files and the lock; without `commit` before, nothing has changed."""
        if self._lock < 0:
            return
        self._remove_leftovers()
        self._release()

    def _remove_leftovers(self) -> None:
        """Remove the partial file, parts, and the parts' own partial files and locks (two dots)."""
        for dots in (".", ".."):
            pattern = f"{dots}{_glob_safe(self.output.name)}.partial*"
            for leftover in self.output.parent.glob(pattern):
                leftover.unlink(missing_ok=True)


def _glob_safe(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
