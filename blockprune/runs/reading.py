"""Rows and pictures that may be damaged or of another version, for readers that go on without them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockprune.errors import UserError
from blockprune.runs import Readable, parts
from blockprune.runs.directory import Stored, read_rows
from blockprune.runs.schema import check_row


def rows_of(run: Readable, unread: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a run. Where there is `unread`, those that this version does not read are left out and counted there, and
    UserError is only for a line that is no row at all."""
    if unread is None or not isinstance(run, Stored):
        return run.rows()
    rows, found = read_rows(run.path), []
    for row in rows:
        with suppress(UserError):
            check_row(run.command, row, "a row", "run it again")
            found.append(row)
    if lacking := len(rows) - len(found):
        unread.append(f"{lacking} of {len(rows)} rows of {run.path.name!r} lack what this version reads, and are left out.")
    return found


def images_of(run: Readable, name: str, n: int, unread: list[str] | None = None) -> NDArray[np.uint8] | None:
    """(n, H, W, 3) images that a run keeps in one file, square ones where `n` is 0; None where there is none, and, with a sentence
    in `unread`, for a damaged one."""
    try:
        data = run.read(name)
        return None if data is None else parts.strip_images(data, n)
    except (UserError, OSError, ValueError, SyntaxError) as err:
        if unread is not None:
            where = str(run.path / name) if isinstance(run, Stored) else name
            unread.append(f"The picture {where!r} cannot be read ({err}).")
        return None
