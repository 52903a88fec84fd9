"""Where the trials of a search are kept: in memory, in a journal file, or in a database."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Annotated

import msgspec
import optuna
from msgspec import Meta
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import IntegrityError, ProgrammingError

from blockprune.decode import checked, json_lines
from blockprune.errors import UserError
from blockprune.runs.lock import lock

MEND = "put back a sound copy, or search in another --out"
_URL = re.compile(
    r"(?P<kind>postgres(ql)?|mysql|sqlite)(\+\w+)?://([^@/?#]*@)?"
    r"(?P<host>[A-Za-z0-9.-]*(:[0-9]+)?)/(?P<database>[\w./ -]*)(\?[^@]*)?"
)
# what a driver may say of a failure, all of it without a word of the URL
REASONS = (
    "connection refused",
    "password authentication failed",
    "no password supplied",
    "timeout expired",
    "could not translate host name",
    "failed to resolve host",
    "name or service not known",
    "server closed the connection",
    "unable to open database file",
    "file is not a database",
    "database is locked",
    "permission denied",
    "does not exist",
    "could not parse",
    "can't load plugin",
)

optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_storage(url: str | None, path: Path | None) -> BaseStorage:
    """The storage behind a URL; a journal file at `path` when there is none, memory without either.

    Raises UserError for a database that cannot be reached or a driver that is not installed.
    """
    if url is None:
        return InMemoryStorage() if path is None else _journal(path)
    try:
        return _connected(re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url))
    except ImportError:
        raise UserError(f"{storage_name(url)} needs its driver: pip install 'blockprune[postgresql]'") from None
    except Exception as err:  # drivers raise whatever they like, and may repeat the URL in it
        text = str(err).lower()
        why = next((reason for reason in REASONS if reason in text), type(err).__name__)
        raise UserError(f"cannot open {storage_name(url)} ({why}): give a URL like postgresql://user@host/name") from None


class Operation(msgspec.Struct):
    """A line of Optuna's journal."""

    op_code: Annotated[int, Meta(ge=0, le=10)]
    worker_id: str


def _journal(path: Path) -> JournalStorage:
    """The storage of a journal file; UserError for a line that is not one of a journal."""
    for what, line in json_lines(path, MEND) if path.exists() else ():
        checked(line, Operation, what, MEND)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_FileLock(path)))
    except Exception as err:  # replaying other lines than Optuna wrote raises anything, assertions too
        raise UserError(f"cannot read {str(path)!r}: its lines do not fit together ({type(err).__name__}: {err}); {MEND}") from None


def _connected(url: str) -> RDBStorage:
    """The database; tried again when another process is just making its tables."""
    for attempt in range(10):
        try:
            return RDBStorage(url)
        except (IntegrityError, ProgrammingError):
            time.sleep(0.2 * (attempt + 1))
    return RDBStorage(url)


def storage_name(url: str) -> str:
    """What messages call a storage: its kind, host and database where the URL says them in the usual form; no other part of it."""
    found = _URL.fullmatch(url)
    if not found:
        return "the storage"
    return f"the storage {found['kind']}://{found['host'] or ''}/{found['database']}"


class _FileLock(JournalFileOpenLock):
    """A lock that the system releases when its holder is killed; taking it cuts off a line that a kill has torn."""

    def __init__(self, path: Path) -> None:
        self.path, self._held = path, threading.local()

    def acquire(self) -> bool:
        self._held.fd = lock(self.path.with_name(self.path.name + ".lock"))
        self._trim()
        return True

    def release(self) -> None:
        os.close(self._held.fd)

    def _trim(self) -> None:
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size and file.seek(size - 1) and file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
