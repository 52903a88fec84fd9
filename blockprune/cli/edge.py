"""Where a command meets the system: what goes wrong becomes one line and exit code 2, and what is printed can be printed."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import typer

from blockprune.errors import UserError, redacted

MAX_CHARACTERS = 1500
FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter one",
    errno.EACCES: "choose a place where you may read and write",
    errno.EPERM: "choose a place where you may read and write",
    errno.EROFS: "choose a place where you may write",
    errno.ENOTDIR: "a file stands where a folder should be, choose another path",
    errno.EEXIST: "a file stands where a folder should be, choose another path",
    errno.EISDIR: "a folder stands where a file should be, choose another path",
    errno.ENOENT: "check the path",
    errno.ELOOP: "mend the links",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
    errno.EPIPE: "what reads the output stopped early, let it read to the end",
}
CLICK_ERROR = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within this context a mistake of the user's or a failure of the system ends the process with one line and code 2.

    Anything else is a fault of this package and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except Exception as err:
        if (message := explanation(err)) is None:
            raise
        fail(message)


def fail(message: str) -> NoReturn:
    line = redacted(" ".join(message.split()))
    if len(line) > MAX_CHARACTERS:
        line = f"{line[: MAX_CHARACTERS // 2]} … {line[-MAX_CHARACTERS // 2 :]}"
    with suppress(OSError):
        print("error: " + line, file=sys.stderr)
    sys.exit(2)


def explanation(err: Exception) -> str | None:
    """What went wrong and what to do, where that is the user's or the system's to mend; None for a fault of this package."""
    if isinstance(err, UserError):
        return str(err)
    if isinstance(err, CLICK_ERROR):
        return _of_usage(err)
    if (system := _system_error(err)) is not None:
        return _of_system(system)
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(err):
        return "the memory does not suffice: ask for less (--batch-size, --n-images, --resolution), or use a machine with more"
    if type(err).__module__.startswith("sqlalchemy.") or type(err).__name__ == "StorageInternalError":
        return f"the storage failed ({type(err).__name__}): see that its database is up, and run the same command again"
    return None


def _of_usage(err: Exception) -> str:
    """A word that the command does not know, or lacks."""
    message = str(getattr(err, "format_message", err.__str__)()).strip().rstrip(".")
    context = getattr(err, "ctx", None)
    return f"{message}: see `{context.command_path} --help`" if context is not None else message


def _system_error(err: Exception) -> OSError | None:
    """The error itself, or the one that a compiled reader or writer tells of in its message only."""
    if isinstance(err, OSError):
        return err
    if found := re.search(r"\(os error (\d+)\)", str(err)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if "No space left on device" in str(err) else None


def _of_system(err: OSError) -> str:
    path = err.filename2 or err.filename
    where = "" if path is None else f"{os.fsdecode(path) if isinstance(path, bytes) else str(path)!r}: "
    if err.errno in FULL or "No space left on device" in str(err):
        return f"{where}the disk is full: free some space and run the same command again"
    if err.errno == errno.EPIPE:
        _discard_output()
    what = err.strerror or (str(err).strip().splitlines() or [type(err).__name__])[0]
    return f"{where}{what}: {REMEDIES.get(err.errno or 0, 'mend that and run the same command again')}"


def _discard_output() -> None:
    """Nobody reads standard output any more: what is left in its buffer must not fail once more when the process ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_printable() -> None:
    """Characters that the terminal's encoding lacks are replaced, so that printing never fails."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors=errors)
