"""An output file that appears whole or not at all, with one writer at a time.

The writer works on a hidden neighbour, `.NAME.partial`; `commit` flushes it to the disk and renames
it over NAME. Appending works on a copy, so that whatever happens, the old file stays readable until
the new one is whole. A killed run leaves the hidden neighbours behind; the next run of the same
output removes them. A file that is replaced passes on its mode bits; of a symbolic link, the file
that it points to is replaced.

The writer holds an flock on `.NAME.lock`, which the system drops with the process, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

from . import config
from .errors import DataError


class OutputTransaction:
    """Lock an output and give a temporary path to write to.

    Parameters
    ----------
    output : Path
        The file to be.
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
            raise DataError(f"{output}: is a folder or a device; give a file name.")
        self._lock = self._acquire()
        try:
            self._remove_leftovers()
            if append and output.exists():
                shutil.copyfile(output, self.path)
        except OSError as error:
            self._release()
            raise DataError(f"{output}: cannot be prepared ({error.strerror}).") from error

    def _acquire(self) -> int:
        while True:
            try:
                handle = os.open(self._lock_path, os.O_CREAT | os.O_RDWR, 0o666)
            except OSError as error:
                raise DataError(f"{self.output}: cannot be written ({error.strerror}).") from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(handle)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise DataError(
                        f"{self.output}: another process is writing it. Wait "
                        "for it, or choose another output."
                    ) from None
                raise DataError(
                    f"{self.output}: its file system gives no lock ({error.strerror}). "
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
        """Path of a further temporary file, which ends with the transaction."""
        return self.path.with_name(f"{self.path.name}-{name}")

    def commit(self) -> None:
        """Make the temporary file the output."""
        if self.output.exists():
            shutil.copymode(self.output, self.path)
        with self.path.open("rb") as f:
            os.fsync(f.fileno())
        self.path.replace(self.output)
        folder = os.open(self.output.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.close()

    def close(self) -> None:
        """Remove temporary files and the lock; without `commit` before, nothing has happened."""
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


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all. Raises DataError."""
    try:
        config.write_atomically(path, data)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from error


def _glob_safe(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
