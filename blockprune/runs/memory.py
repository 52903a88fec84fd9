"""A run that is kept in memory: what a notebook gets when it names no directory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from blockprune.runs.directory import plain


class MemoryRun:
    """Like `Run`, but nothing is written to disk and nothing is there to resume."""

    def __init__(self, command: str, asked: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        self.about: dict[str, Any] = plain({"command": command, "asked": asked, **note})
        self.files: dict[str, bytes] = {}
        self._rows: list[dict[str, Any]] = []

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> MemoryRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is there."""
        yield

    def claims(self, name: str) -> Unshared:
        """As `Run.claims`."""
        return Unshared()

    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows)

    def append(self, row: Mapping[str, Any]) -> None:
        self._rows.append(dict(row))

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        self._rows = [row for row in self._rows if wanted(row)]

    def write(self, name: str, content: str | bytes) -> None:
        self.files[name] = content.encode() if isinstance(content, str) else content

    def read(self, name: str) -> bytes | None:
        """What was written under that name; None when nothing was."""
        return self.files.get(name)

    def names(self, folder: str) -> list[str]:
        """The files in a folder, sorted."""
        paths = map(PurePosixPath, self.files)
        return sorted(path.name for path in paths if path.parent == PurePosixPath(folder))


class Unshared:
    """As `Claims` where no other process is: every item is this one's."""

    def __enter__(self) -> Unshared:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def take(self, size: int, missing: Callable[[], Collection[int]]) -> list[int]:
        """The missing items of the first block of `size`."""
        left = {*missing()}
        start = min(left, default=0) // size * size
        return sorted({*range(start, start + size)} & left)
