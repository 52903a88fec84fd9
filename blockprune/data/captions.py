"""Text that comes in files: prompts, and the captions of a folder's images. One reader for each format, whoever asks."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from blockprune.data.image_files import IMAGE_SUFFIXES
from blockprune.errors import UserError

FILE_COLUMNS = ("file_name", "file", "filename", "image")
CAPTION_COLUMNS = ("text", "caption", "prompt")
PROMPT_COLUMNS = ("prompt", "caption", "text")
METADATA = ("metadata.csv", "metadata.jsonl")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


def flaw(text: str) -> str:
    """What no tokenizer takes in a text, in words: a NUL character or half a surrogate pair; "" when there is neither."""
    found = _UNUSABLE.search(text)
    return f"the character U+{ord(found[0]):04X}, which is no text" if found else ""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, blank ones left out: .txt one per line; .csv and .jsonl in the column prompt, caption or text.

    A CSV without a header has a single column, or image files and their captions. UserError when the file cannot be read, holds
    no prompt, or holds one that is no text.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _lines, ".csv": _csv_prompts, ".jsonl": _jsonl_prompts}
    if path.suffix.lower() not in readers:
        raise UserError(f"a prompts file is .txt, .csv or .jsonl: got {str(path)!r}")
    prompts = [p.strip() for p in readers[path.suffix.lower()](path) if p.strip()]
    if not prompts:
        raise UserError(f"a prompts file needs at least one prompt: {str(path)!r} has none; write one per line")
    for number, prompt in enumerate(prompts, start=1):
        if why := flaw(prompt):
            raise UserError(f"prompt {number} of {str(path)!r}, {prompt[:60]!r}, holds {why}: mend or drop it")
    return prompts


def metadata_of(folder: Path) -> Path | None:
    """The metadata.csv, else the metadata.jsonl of a folder of images; None when it has neither."""
    return next((folder / name for name in METADATA if os.path.isfile(folder / name)), None)


def read_metadata(path: Path) -> Iterator[tuple[str, str]]:
    """(file, caption) of every row of a metadata.csv or metadata.jsonl, in that order; a caption that is missing is blank.

    A CSV has a header with one of FILE_COLUMNS and one of CAPTION_COLUMNS, in any order and among others. Where its first row names
    an image instead, it has none: column 0 is the file, column 1 the caption, as in BK-SDM. UserError for anything else.
    """
    return _jsonl_pairs(path) if path.suffix == ".jsonl" else _csv_pairs(path)


@contextmanager
def _reading(path: Path) -> Iterator[IO[str]]:
    """The text of a file; lines end only where the file says so, for captions hold other separators."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot read {str(path)!r}: it is no regular file; give a text file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read {str(path)!r}: {reason}; give a readable text file") from None
    except csv.Error as err:
        raise UserError(f"{str(path)!r} is not valid CSV: {err}; quote the fields that hold commas or quotes") from None


def _lines(path: Path) -> Iterator[str]:
    with _reading(path) as file:
        yield from file


def _csv_pairs(path: Path) -> Iterator[tuple[str, str]]:
    with _reading(path) as file:
        rows = _csv_rows(file)
        first = next(rows, None)
        if first is None:
            return
        headed = not _names_image(first[0], path.parent)
        at = _places(first, FILE_COLUMNS, CAPTION_COLUMNS) if headed else [0, 1]
        if min(at) < 0:
            raise UserError(
                f"{str(path)!r} needs a first line that names the columns file_name and text, or an image and its caption: "
                f"it is {', '.join(first)[:80]!r}; mend it"
            )
        for row in rows if headed else chain([first], rows):
            name, caption = (row[i] if i < len(row) else "" for i in at)
            yield name, caption


def _csv_prompts(path: Path) -> Iterator[str]:
    with _reading(path) as file:
        rows = _csv_rows(file)
        first = next(rows, [""])
        alone, images = len(first) == 1, len(first) > 1 and _names_image(first[0], path.parent)
        at = 1 if images else _places(first, PROMPT_COLUMNS)[0]
        if at < 0 and not alone:
            raise UserError(
                f"a prompts CSV has a column named {', '.join(PROMPT_COLUMNS)}, or a single column: "
                f"{str(path)!r} has {', '.join(first)[:80]}; rename the column"
            )
        for row in rows if at >= 0 and not images else chain([first], rows):
            if alone and len(row) > 1:
                raise UserError(
                    f"{str(path)!r} has a single column at first, and then the row {', '.join(row)[:80]!r}: "
                    "quote the prompts that hold commas"
                )
            yield row[max(at, 0)] if at < len(row) else ""


def _csv_rows(file: IO[str]) -> Iterator[list[str]]:
    """The rows of a table that are not blank, without the space around their cells."""
    return (row for row in ([cell.strip() for cell in row] for row in csv.reader(file, strict=True)) if any(row))


def _places(header: Sequence[str], *wanted: Sequence[str]) -> list[int]:
    """Where a header has the first of each group of names that it has; -1 for none."""
    names = [name.lower() for name in header]
    return [next((names.index(name) for name in group if name in names), -1) for group in wanted]


def _names_image(cell: str, folder: Path) -> bool:
    return Path(cell).suffix.lower() in IMAGE_SUFFIXES or (bool(cell) and os.path.isfile(folder / cell))


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise UserError(f"{str(path)!r} line {number} is not JSON: {err}; mend or drop it") from None
        if not isinstance(row, dict):
            raise UserError(f"{str(path)!r} line {number} must be a JSON object: got {line.strip()[:40]!r}")
        yield number, row


def _jsonl_pairs(path: Path) -> Iterator[tuple[str, str]]:
    for number, row in _json_lines(path):
        file = next((row[name] for name in FILE_COLUMNS if isinstance(row.get(name), str)), None)
        if file is None or not any(name in row for name in CAPTION_COLUMNS):
            shown = json.dumps(row)[:60]
            raise UserError(f"{str(path)!r} line {number} needs file_name and text or caption: it is {shown!r}; mend it")
        yield file, caption_of(row)


def _jsonl_prompts(path: Path) -> Iterator[str]:
    for number, row in _json_lines(path):
        found = [row[key] for key in PROMPT_COLUMNS if isinstance(row.get(key), str)]
        if not found:
            raise UserError(f"{str(path)!r} line {number} has no text under {', '.join(PROMPT_COLUMNS)}: add one of them")
        yield found[0]


def caption_of(row: Mapping[str, Any] | Any) -> str:
    """The caption in a JSON object, "" where there is none."""
    found = [row[name] for name in CAPTION_COLUMNS if isinstance(row.get(name), str)] if isinstance(row, Mapping) else []
    return found[0].strip() if found else ""
