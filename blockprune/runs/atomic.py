"""Files and folders that are there whole or not at all: written under another name, and on the disk before they get their own.

That name is the same in every process, so that whoever goes on replaces what a killed one left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockprune.errors import UserError
from blockprune.runs.lock import lock

TEMPORARY = 16  # characters that a name has more while what it names is being written


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A temporary path beside the file `target`, which it becomes when the context ends well; folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that no one else may read
        _sync(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which it becomes when the context ends well. `target` must be empty or absent by then.

    UserError while another process is writing it, or when nothing can be written there.
    """
    target = Path(os.path.abspath(target))
    part = target.with_name(f".{target.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        fd = lock(part, wait=False)
    except OSError as err:
        raise UserError(f"cannot write to {str(target)!r} ({err.strerror}): choose another --out") from None
    if fd is None:
        raise UserError(f"another process is writing {str(target)!r}: wait for it, or choose another --out")
    try:
        for left in part.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _sync(file)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(fd)


def _sync(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
