"""A value: which blocks of a U-Net are removed, and what stands in for them. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from blockprune.decode import checked
from blockprune.errors import UserError

FITS = ("channel", "linear")


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _pair(term: object) -> tuple[str, str]:
    """(name, kind of fit or "") of a term; UserError for what is no term of an architecture."""
    name, _, kind = term.partition("~") if isinstance(term, str) else ("", "", "")
    if not all(part.isidentifier() or (part.isascii() and part.isdigit()) for part in name.split(".")):
        raise UserError(f"a removed block is a module path such as 'mid_block': got {term!r}")
    if str(term) != name and kind not in FITS:
        raise UserError(f"{term!r}: what is fitted in place of a block is one of {', '.join(FITS)}; got {kind!r}")
    return name, kind


def _choices(name: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    return sorted(f"{n}~{kind}" if kind else n for n, kind in pairs if n == name)


def _around(name: str) -> Iterator[str]:
    """The modules around a module, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@dataclass(frozen=True)
class Architecture:
    """A student: the teacher module paths that are removed, none lying inside another, and what stands in for each.

    Nothing stands in for a plain name. Of "mid_block~linear" a linear map does, of "mid_block~channel" a scale and a shift for each
    channel; both are fitted to what the block did (see `blockprune.model.fit`). `fits` holds these as (name, kind) pairs.

    >>> import blockprune as bp
    >>> list(bp.Architecture({"mid_block", "mid_block.attentions.0"}))
    ['mid_block']
    >>> bp.Architecture({"mid_block~linear"}).terms
    ['mid_block~linear']
    """

    removed: frozenset[str] = frozenset()
    fits: frozenset[tuple[str, str]] = frozenset()

    def __post_init__(self) -> None:
        terms = [*self.removed, *(f"{name}~{kind}" for name, kind in self.fits)]
        pairs = {_pair(term) for term in terms} - {(name, "") for name, _ in self.fits}
        names = {name for name, _ in pairs}
        if len(names) < len(pairs):
            twice = next(name for name in sorted(names) if sum(n == name for n, _ in pairs) > 1)
            raise UserError(f"two things cannot stand in for {twice!r}: choose one of {', '.join(_choices(twice, pairs))}")
        outermost = frozenset(n for n in names if not any(outer in names for outer in _around(n)))
        object.__setattr__(self, "removed", outermost)
        object.__setattr__(self, "fits", frozenset((n, kind) for n, kind in pairs if kind and n in outermost))

    def __or__(self, other: Architecture) -> Architecture:
        """Both removals; where both remove a block, what `other` puts in its place."""
        return Architecture(self.removed | other.removed, other.fits | {fit for fit in self.fits if fit[0] not in other.removed})

    def __sub__(self, other: Architecture) -> Architecture:
        """The architecture with the blocks of `other` put back."""
        for name in other.removed:
            if any(name != outer and _inside(name, outer) for outer in self.removed):
                raise UserError(f"cannot put back {name!r} alone: the block around it is removed; put that back first")
        left = frozenset(n for n in self.removed if not any(_inside(n, o) for o in other.removed))
        return Architecture(left, frozenset(fit for fit in self.fits if fit[0] in left))

    @property
    def plain(self) -> Architecture:
        """The same removals with nothing fitted in their place."""
        return Architecture(self.removed)

    @property
    def terms(self) -> list[str]:
        """What is removed, as text: a name, or name~kind where something is fitted in its place; `Architecture(terms)` reads it."""
        kinds = dict(self.fits)
        return [f"{name}~{kinds[name]}" if name in kinds else name for name in self]

    def __le__(self, other: Architecture) -> bool:
        """True when `other` removes everything that this removes, whatever stands in."""
        return all(any(_inside(n, o) for o in other.removed) for n in self.removed)

    def __contains__(self, name: str) -> bool:
        """True when the module `name` is removed, alone or with a block around it."""
        return any(_inside(name, outer) for outer in self.removed)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.removed))

    def __len__(self) -> int:
        return len(self.removed)

    @property
    def key(self) -> str:
        """A 12-digit content hash: directory name and cache key."""
        return hashlib.sha256("\n".join(self.terms).encode()).hexdigest()[:12]

    def describe(self) -> str:
        return "full" if not self.removed else "without " + ", ".join(self.terms)

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, "removed": self.terms}

    @classmethod
    def from_json(cls, data: object, what: str = "the architecture") -> Architecture:
        """The architecture of `to_json`, or of a larger record that holds one under "architecture".

        Raises UserError, which calls it `what`, on any other shape.
        """
        if isinstance(data, Mapping) and "architecture" in data:
            data = data["architecture"]
        record = checked(data, ArchitectureRecord, what, 'give JSON like {"format": 1, "removed": ["mid_block"]}')
        return cls(frozenset(record.removed))

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=2) + "\n"


class ArchitectureRecord(msgspec.Struct):
    """An Architecture in JSON."""

    format: Literal[1]
    removed: list[str]
