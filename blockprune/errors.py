"""The one exception of this package for mistakes a user can mend, failures of the system in words, what a message never shows."""

from __future__ import annotations

import errno
import os
import re

_SECRETS = (
    (re.compile(r"""[^\s'"`(,;]*:[^\s'"`]*@[^\s'"`),;]*"""), "(hidden: it may hold a password)"),
    (re.compile(r"""\b(pass\w*|pwd|secret|token|api_?key)=[^\s'"`&,;)]*""", re.IGNORECASE), r"\1=(hidden)"),
)

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


class UserError(Exception):
    """One line: the rule, the offending value, what to do. The command line prints it and exits with code 2."""


def redacted(text: str) -> str:
    """The text without anything like a name with a password (`user:password@host`) or `password=…`."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def explanation(err: Exception) -> str | None:
    """What went wrong and what to do, where that is the user's or the system's to mend; None for a fault of this package."""
    if isinstance(err, UserError):
        return str(err)
    if (system := _system_error(err)) is not None:
        return _of_system(system)
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(err):
        return "the memory does not suffice: ask for less (--batch-size, --n-images, --resolution), or use a machine with more"
    if type(err).__module__.startswith("sqlalchemy.") or type(err).__name__ == "StorageInternalError":
        return f"the storage failed ({type(err).__name__}): see that its database is up, and run the same command again"
    return None


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
    what = err.strerror or first_line(err)
    return f"{where}{what}: {REMEDIES.get(err.errno or 0, 'mend that and run the same command again')}"


def first_line(err: BaseException) -> str:
    """What an error says, in a line of at most 300 characters."""
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:300]
