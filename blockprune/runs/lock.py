"""Locks between processes, free again when their holder ends or is killed: of a whole file or folder, or of items of some work."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def lock(path: Path, wait: bool = True, shared: bool = False) -> int | None:
    """A descriptor that holds a file, which is made, or a folder, until it is closed; any number may hold it as `shared`.

    None when another process holds it and this one is not to wait.
    """
    is_folder = path.is_dir()
    while True:
        fd = os.open(path, os.O_RDONLY if is_folder else os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            # its last holder may have removed the file, and another process have made and locked a new one
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError as err:
            if is_folder:  # a network file system may lock no folders
                return fd
            if not isinstance(err, FileNotFoundError):
                os.close(fd)
                raise
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """True while no other process is to write that file; its lock is a hidden file beside it, which goes with it."""
    file = path.with_name(f".{path.name}.lock")
    fd = lock(file, wait)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            file.unlink(missing_ok=True)
            os.close(fd)


class Claims:
    """Items 0, 1, 2, … of some work, divided among processes in blocks: item i is taken by a lock on byte i of a file.

    One object for a file in one process: POSIX releases all of a process's locks on a file when any of its descriptors is closed.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_CREAT | os.O_RDWR)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)

    def take(self, size: int, missing: Callable[[], Collection[int]]) -> list[int]:
        """The missing items of the first block of `size` (items 0 to size - 1, and so on) of which no other process holds any.

        What was held before is let go; nothing is taken when the list is empty. `missing` is asked again once a block is locked:
        another process may have ended an item between question and lock.
        """
        fcntl.lockf(self._file, fcntl.LOCK_UN)
        for start in sorted({item // size * size for item in missing()}):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, size, start)
            except OSError:  # taken
                continue
            if mine := sorted({*range(start, start + size)} & {*missing()}):
                return mine
            fcntl.lockf(self._file, fcntl.LOCK_UN, size, start)
        return []
