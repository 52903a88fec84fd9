"""Named architectures of the papers, and the short syntax in which an architecture is written on a command line."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path

from blockprune.decode import Object, read_json
from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph

MAX_NAMES = 1_000_000
COMPONENTS = (".attn1", ".attn2", ".ff")
_BASE = (
    "down_blocks.{0,1,2}.{resnets,attentions}.1",
    "down_blocks.3.resnets.1",
    "up_blocks.0.resnets.1",
    "up_blocks.{1,2,3}.{resnets,attentions}.1",
)
_INNERMOST = ("down_blocks.2.downsamplers.0", "down_blocks.3", "up_blocks.0")
_XL_MID = ("mid_block.attentions.0", "mid_block.resnets.1")
_XL_PAIRS = (
    "down_blocks.0.resnets.1",
    "down_blocks.{1,2}.{resnets,attentions}.1",
    "up_blocks.{0,1}.{resnets,attentions}.1",
    "up_blocks.2.resnets.1",
)


def _layers(attention: str, kept: int, depth: int) -> str:
    """Every transformer layer of an attention of that depth but the first `kept`."""
    return f"{attention}.transformer_blocks.{{{','.join(map(str, range(kept, depth)))}}}"


PRESETS: dict[str, tuple[str, ...]] = {
    "full": (),
    "mid-removed": ("mid_block",),
    # BK-SDM (arXiv 2305.15798), for the U-Nets of SD v1 and v2
    "bk-sdm-base": _BASE,
    "bk-sdm-small": (*_BASE, "mid_block"),
    "bk-sdm-tiny": (*_BASE, "mid_block", *_INNERMOST),
    # Segmind (arXiv 2401.02677), for SDXL
    "ssd-1b": (
        *_XL_MID,
        _layers("down_blocks.2.attentions.{0,1}", 4, 10),
        _layers("up_blocks.0.attentions.{0,1}", 4, 10),
        _layers("up_blocks.1.attentions.{1,2}", 1, 2),
    ),
    "vega": (
        *_XL_MID,
        _layers("down_blocks.1.attentions.{0,1}", 1, 2),
        _layers("down_blocks.2.attentions.{0,1}", 2, 10),
        _layers("up_blocks.0.attentions.{0,1,2}", 2, 10),
        _layers("up_blocks.1.attentions.{0,1,2}", 1, 2),
    ),
    # KOALA (arXiv 2312.04005), for SDXL
    "koala-1b": (
        *_XL_PAIRS,
        _layers("down_blocks.2.attentions.0", 6, 10),
        _layers("mid_block.attentions.0", 6, 10),
        _layers("up_blocks.0.attentions.{0,2}", 6, 10),
    ),
    "koala-700m": (
        *_XL_PAIRS,
        "mid_block",
        _layers("down_blocks.2.attentions.0", 5, 10),
        _layers("up_blocks.0.attentions.{0,2}", 5, 10),
    ),
}


def expand(pattern: str) -> Iterator[str]:
    """The names that a pattern with {a,b} alternatives stands for; UserError for more than MAX_NAMES."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    if (n := prod(map(len, choices))) > MAX_NAMES:
        raise UserError(f"the pattern {pattern[:80]!r} stands for {n:,} names: at most {MAX_NAMES:,} are taken")
    return ("".join(choice) for choice in product(*choices))


def preset(name: str) -> Architecture:
    """The architecture of that name; UserError lists those there are."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}, or give a JSON file")
    return Architecture(frozenset(n for pattern in PRESETS[name] for n in expand(pattern)))


def near_presets(name: str) -> list[str]:
    """The presets whose names are nearly this one."""
    return difflib.get_close_matches(name.lower(), PRESETS, n=2, cutoff=0.7)


def fitting(graph: BlockGraph) -> dict[str, Architecture]:
    """The presets that this U-Net has all the blocks for, the full model left out."""
    found = {}
    for name in PRESETS:
        arch = preset(name)
        if arch and all(n in graph and graph[n].removable for n in arch):
            found[name] = arch
    return found


def parse(text: str, graph: BlockGraph) -> Architecture:
    """The architecture that `text` says, checked against `graph`.

    `text` is a JSON file, or terms separated by commas: a preset; a block name to remove, with or without a leading "-";
    "+" and a block name to put it back. {a,b} and * stand for several blocks. "~channel" or "~linear" behind a term fits a map in
    place of each of its blocks for which that can be done.

    Raises UserError for unknown, fixed or unmatched blocks, and for a removal that removes nothing though it says something.
    """
    if text.endswith(".json"):
        return graph.check(_read(Path(text)))
    try:
        return _of_terms(text, graph)
    except UserError:
        if not os.path.isfile(text):
            raise
        return graph.check(_read(Path(text)))


def label_of(text: str) -> str:
    """What an architecture that was given as this text is called: a JSON file by its name."""
    return Path(text).stem if text.endswith(".json") else text


def named(texts: Iterable[str], graph: BlockGraph, known: Mapping[str, Architecture] | None = None) -> dict[str, Architecture]:
    """Label => architecture: those that are `known` and what `texts` say. Raises UserError as `parse`, and for one label of two."""
    chosen = dict(known or {})
    for text in texts:
        label, arch = label_of(text), parse(text, graph)
        if chosen.setdefault(label, arch) != arch:
            raise UserError(f"two architectures are called {label!r}: rename one file")
    return chosen


def _of_terms(text: str, graph: BlockGraph) -> Architecture:
    arch = Architecture()
    for term in re.split(r",(?![^{}]*\})", text):
        arch = _apply(arch, term.strip(), graph)
    if not arch and text != "full":
        raise UserError(f"the architecture {text!r} removes nothing: name a block, a preset, or 'full' for the teacher itself")
    return graph.check(arch)


def _read(path: Path) -> Architecture:
    remedy = "give a JSON file of an architecture, a preset or block names"
    missing = f"no architecture file {str(path)!r}: give a JSON file, a preset or block names"
    return Architecture.from_json(read_json(path, Object, remedy, missing), repr(str(path)))


def _apply(arch: Architecture, term: str, graph: BlockGraph) -> Architecture:
    term, _, kind = term.partition("~")
    if term in PRESETS:
        return arch | _fitted(_checked_preset(term, graph), kind, graph)
    sign, name = (term[0], term[1:]) if term[:1] in ("-", "+") else ("-", term)
    if not name:
        raise UserError("an architecture has an empty term: write presets and block names with single commas between")
    if "." not in name and name not in graph and (near := near_presets(name)):
        raise UserError(f"no preset or block {name[:60]!r}: did you mean {' or '.join(near)}?")
    named = Architecture(frozenset(_match(name, graph)))
    return arch | _fitted(named, kind, graph) if sign == "-" else arch - named


def _fitted(arch: Architecture, kind: str, graph: BlockGraph) -> Architecture:
    """`arch` with what "~kind" says fitted in place of each of its blocks, of a preset only where that can be."""
    if not kind:
        return arch
    fitted = graph.fitted(arch, kind)
    return fitted if fitted.fits or kind == "none" else Architecture(arch.removed, frozenset((name, kind) for name in arch))


def _checked_preset(name: str, graph: BlockGraph) -> Architecture:
    arch = preset(name)
    if missing := [n for n in arch if n not in graph]:
        raise UserError(f"preset {name!r} is for another U-Net: this one has no {missing[0]!r}")
    return arch


def _match(pattern: str, graph: BlockGraph) -> Iterator[str]:
    for name in expand(pattern):
        if "*" not in name:
            yield graph[name].name
            continue
        kinds = "C" if name.endswith(COMPONENTS) else "T" if "transformer_blocks" in name else "RAM"
        found = [b.name for b in graph if b.removable and b.kind in kinds and fnmatch.fnmatchcase(b.name, name)]
        if not found:
            raise UserError(f"no removable block matches {name!r}: see `blockprune graph`")
        yield from found
