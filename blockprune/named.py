"""TOML files by name: those that come along with the package, or a user's own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from blockprune.errors import UserError


def read_named(kind: str, folder: Path, text: str) -> tuple[Path, dict[str, Any]]:
    """(path, contents) of the file of that name in `folder`, or of a .toml file; `kind` is what errors call it."""
    path = folder / f"{text}.toml" if not text.endswith(".toml") else Path(text)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise UserError(f"no {kind} {text!r}: choose from {known}, or give a .toml file (copy one of {str(folder)!r})")
    try:
        return path, tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as err:
        raise UserError(f"cannot read the {kind} {str(path)!r}: {err}") from None
