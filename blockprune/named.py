"""TOML files by name: those that come along with the package, or a user's own."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from blockprune.decode import Object, checked, read_toml
from blockprune.errors import UserError

T = TypeVar("T")


def read_named(kind: str, folder: Path, text: str, form: type[T]) -> T:
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
