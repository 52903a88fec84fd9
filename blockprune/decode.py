"""Files from outside, decoded into typed values: JSON, lines of JSON, TOML, safetensors. Needs no torch.

Whatever is wrong with one is a UserError of one line: the file, the place in it as a JSON path, what is expected there, what to do.

A schema must not have a tuple of fixed length in a union with a number or text that has bounds: msgspec 0.22 then crashes the
process when garbage is collected.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from blockprune.errors import UserError

T = TypeVar("T")
Finite = Annotated[float, Meta(ge=-1e308, le=1e308)]  # bounds keep NaN out as well
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**60)]
Object = dict[str, Any]

LIMIT = 256 * 2**20  # bytes of a file that is read whole
DEPTH = 64  # objects and lists inside one another
GONE = (errno.ENOENT, errno.ENOTDIR)
FETCH = "fetch it again"
AGAIN = "leave the run out, or run it again"
NAMED_FLOATS = re.compile(rb"-?\b(?:NaN|Infinity)\b")
HALF_PAIR = re.compile(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]")


def read_bytes(path: Path, remedy: str, missing: str = "", limit: int = LIMIT) -> bytes:
    """The contents of a regular file of at most `limit` bytes; `missing` is the whole message where there is none."""
    with _opened(path, remedy, missing) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise UserError(f"cannot read {str(path)!r}: it has {size:,} bytes, more than the {limit:,} allowed; {remedy}")
        try:
            return file.read()
        except OSError as err:
            raise UserError(f"cannot read {str(path)!r}: {err.strerror or err}; {remedy}") from None


def regular_file(path: Path, remedy: str, missing: str = "") -> Path:
    """The path itself, which is that of a regular file that may be read."""
    _opened(path, remedy, missing).close()
    return path


def _opened(path: Path, remedy: str, missing: str) -> Any:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: a FIFO has no writer to wait for
    except (OSError, ValueError) as err:
        if missing and getattr(err, "errno", None) in GONE:
            raise UserError(missing) from None
        raise UserError(f"cannot read {str(path)!r}: {getattr(err, 'strerror', None) or err}; {remedy}") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(f"cannot read {str(path)!r}: it is {kind}; {remedy}")
    return os.fdopen(fd, "rb")


def checked(data: object, kind: type[T], what: str, remedy: str) -> T:
    """Plain data as a value of that type. `what` is what errors call it, `remedy` what they advise."""
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, RecursionError) as err:
        raise UserError(f"cannot read {what}: {_explained(err, data)}; {remedy}") from None


def parse_json(text: bytes | str, kind: type[T], what: str, remedy: str, infinite: bool = False) -> T:
    """A JSON text as a value of that type. NaN and infinities, which JSON has not, are taken only where `infinite` is set."""
    try:
        data = _plain_json(text.encode() if isinstance(text, str) else text, infinite)
    except (ValueError, RecursionError, msgspec.DecodeError) as err:
        raise UserError(f"cannot read {what}: {_explained(err)}; {remedy}") from None
    return checked(data, kind, what, remedy)


def _plain_json(text: bytes, infinite: bool) -> Any:
    """Objects, lists, texts and numbers; ValueError and its like for everything that is not strict JSON in UTF-8."""
    text.decode()
    named = infinite and NAMED_FLOATS.search(text)
    try:
        data = msgspec.json.decode(NAMED_FLOATS.sub(b"null", text) if named else text)
    except msgspec.DecodeError:
        if HALF_PAIR.search(text):
            raise ValueError("it has half of a surrogate pair, which is no character") from None
        raise
    return _shallow(json.loads(text) if named else data)


def _shallow(data: Any) -> Any:
    """The data itself; RecursionError when it is nested deeper than what is done with it later can bear."""
    level = [data]
    for _ in range(DEPTH + 1):
        level = [v for part in level if isinstance(part, dict | list) for v in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return data
    raise RecursionError


def read_json(path: Path, kind: type[T], remedy: str, missing: str = "", infinite: bool = False) -> T:
    """A JSON file as a value of that type."""
    return parse_json(read_bytes(path, remedy, missing), kind, repr(str(path)), remedy, infinite)


def json_lines(path: Path, remedy: str, missing: str = "", limit: int = LIMIT) -> Iterator[tuple[str, Object]]:
    """The objects in the whole lines of a JSON Lines file, each with what errors call it; a last line without end is left out.

    Measured numbers may be NaN or infinite.
    """
    complete, _, _ = read_bytes(path, remedy, missing, limit).rpartition(b"\n")
    for number, line in enumerate(complete.splitlines(), 1):
        what = f"line {number} of {str(path)!r}"
        yield what, parse_json(line, Object, what, remedy, infinite=True)


def read_toml(path: Path, kind: type[T], what: str, remedy: str) -> T:
    """A TOML file as a value of that type."""
    try:
        data = _shallow(tomllib.loads(read_bytes(path, remedy).decode()))
    except (ValueError, RecursionError) as err:
        raise UserError(f"cannot read {what}: {_explained(err)}; {remedy}") from None
    return checked(data, kind, what, remedy)


def read_named_toml(kind: str, folder: Path, text: str, form: type[T]) -> T:
    """The file of that name in `folder`, or a .toml file, as a dataclass; `kind` is what errors call it.

    UserError for a file that is not one, and for keys that the dataclass has not.
    """
    path = folder / f"{text}.toml" if not text.endswith(".toml") else Path(text)
    if not os.path.isfile(path):
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise UserError(f"no {kind} {text!r}: choose from {known}, or give a .toml file (copy one of {str(folder)!r})")
    what, remedy = f"the {kind} {str(path)!r}", f"mend it, or copy one of {str(folder)!r}"
    data = read_toml(path, Object, what, remedy)
    value = checked(data, form, what, remedy)
    check_keys(data, form, what)
    return value


def check_keys(data: Any, form: Any, what: str) -> None:
    """Raises UserError for a key that the dataclass has not."""
    names = [f.name for f in fields(form)]
    if unknown := sorted(data.keys() - {*names}):
        raise UserError(f"{what} has the unknown key {unknown[0]!r}: it may have {', '.join(names)}")


def _explained(err: Exception, data: object = None) -> str:
    """What is wrong, with the JSON path and the value there."""
    if isinstance(err, RecursionError):
        return f"it is nested more than {DEPTH} deep"
    if isinstance(err, UnicodeDecodeError):
        return f"it is no UTF-8 text (byte {err.start})"
    message, _, where = str(err).replace("`", "").partition(" - at ")
    where = where or "$"
    if found := re.match(r"Object missing required field (.*)", message):
        return f"{'it' if where == '$' else where} lacks {found[1]!r}"
    if found := re.match(r"Object contains unknown field (.*)", message):
        return f"{'it' if where == '$' else where} has the unknown key {found[1]!r}"
    if not isinstance(err, msgspec.ValidationError):
        return message[:200]
    value = _at(data, where)
    return f"{where}: {message[0].lower()}{message[1:200]}" + ("" if value is None else f" ({value})")


def _at(data: Any, where: str) -> str | None:
    """The value at a JSON path, in a few characters; None where the path does not lead to one."""
    if "..." in where or not isinstance(data, dict | list):
        return None
    try:
        for key, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", where):
            data = data[key] if key else data[int(index)]
    except (KeyError, IndexError, TypeError):
        return None
    text = repr(data) if not isinstance(data, Mapping | list) else ""
    return text[:57] + "..." if len(text) > 60 else text or None
