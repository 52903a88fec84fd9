"""Where the U-Net's blocks are drawn as a U, and what each drawn block shows. Values only; figures and pages draw them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from blockprune.model.architecture import Architecture
from blockprune.model.graph import UNITS, Block, BlockGraph

WIDTH, HEIGHT, GAP = 1.12, 0.46, 0.07
PITCH, STAGE_GAP, INDENT, THROAT, PILL = HEIGHT + 0.09, 0.3, 0.52, 1.5, 0.27
NAME_WIDTH = 0.36
TIMES = "\N{MULTIPLICATION SIGN}"
Line = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """One drawn block: its lower left corner and size, in cell units with y upwards."""

    name: str
    x: float
    y: float
    label: str
    w: float = WIDTH
    h: float = HEIGHT
    fixed: bool = False


class Unit(NamedTuple):
    """A scored unit of removal."""

    arch: Architecture
    value: float


def scored_units(graph: BlockGraph, losses: Mapping[Architecture, float]) -> dict[str, Unit]:
    """Block name => the smallest scored unit of removal that contains it; blocks in none are left out."""
    units = {arch for unit in UNITS for arch in graph.units(unit).values()}
    scored = sorted((a for a in losses if a in units), key=lambda a: graph.total.params - graph.cost(a).params)
    finest = {b.name: next((a for a in scored if b.name in a), None) for b in graph}
    return {name: Unit(arch, losses[arch]) for name, arch in finest.items() if arch is not None}


@dataclass(frozen=True)
class Tile:
    """What one drawn rectangle shows: the block `name`, its finest scored unit, and whether it is removed.

    `label` is "" for the strips of an attention whose transformer layers, or their components, differ; `value` is what is written
    in it, once a unit.
    `fit` is the kind of map that is fitted in place of a removed block, "" for none.
    """

    name: str
    x: float
    y: float
    w: float
    h: float
    label: str = ""
    unit: Unit | None = None
    value: float | None = None
    gone: bool = False
    fixed: bool = False
    fit: str = ""


class StageName(NamedTuple):
    """A stage's name and size, at a point beside its blocks; `side` is -1 where the text ends there, 1 where it starts."""

    x: float
    y: float
    name: str
    size: str
    side: int


def _index(name: str) -> int:
    return int(name.rsplit(".", 1)[1])


def _pairs(graph: BlockGraph, stage: str) -> dict[int, dict[str, Block]]:
    """Pair number => {"R": …, "A": …} of one stage."""
    rows: dict[int, dict[str, Block]] = {}
    for block in graph:
        if block.stage == stage and block.kind in "RA" and block.name.startswith(stage):
            rows.setdefault(_index(block.name), {})[block.kind] = block
    return rows


def with_innermost(graph: BlockGraph, losses: Iterable[Architecture], removed: Architecture) -> bool:
    """True when the innermost stages as a whole are removed or scored, so that the drawing needs a cell for them."""
    inner = graph.innermost
    return bool(inner) and (inner <= removed.removed or any(inner == a.removed for a in losses))


def layout(graph: BlockGraph, innermost: bool = False) -> dict[str, Cell]:
    """Where each block is drawn, by name. A skip connection comes out level: a down pair lies beside the up pair that takes it.

    `innermost` adds a cell for the innermost down and up stages taken together.
    """
    downs, ups = (sorted({b.stage for b in graph if b.stage.startswith(path)}, key=_index) for path in ("down_blocks", "up_blocks"))
    n = max(len(downs), len(ups))
    right = 4 * WIDTH + 2 * GAP + THROAT + 2 * (n - 1) * INDENT
    cells: list[Cell] = []
    y = 0.0
    for depth, (down, up) in enumerate(zip(downs, reversed(ups), strict=True)):
        left, other = _pairs(graph, down), _pairs(graph, up)
        rows = max(len(left) + 1, len(other))
        x_left, x_right = depth * INDENT, right - depth * INDENT - 2 * WIDTH - GAP
        entry = "conv_in" if depth == 0 else f"{downs[depth - 1]}.downsamplers.0"
        leave = "conv_out" if depth == 0 else f"{up}.upsamplers.0"
        left_cells = list(_column(left, x_left, [y - (rows - len(left) + k) * PITCH for k in left], toward_middle=1))
        right_cells = list(_column(other, x_right, [y - (rows - 1 - k) * PITCH for k in other], toward_middle=0))
        cells += [_pill(name, left_cells, y + (HEIGHT - PILL) / 2) for name in (entry,) if name in graph]
        cells += [_pill(name, right_cells, y + PITCH) for name in (leave,) if name in graph]
        cells += left_cells + right_cells
        y -= rows * PITCH + STAGE_GAP + PILL
    cells += [c for c in _mid(graph, right / 2, y + PILL + STAGE_GAP - HEIGHT + 0.1) if innermost or c.name != "innermost"]
    floor = min(c.y for c in cells)
    return {c.name: replace(c, y=c.y - floor) for c in cells}


def _column(pairs: Mapping[int, Mapping[str, Block]], x: float, ys: Sequence[float], toward_middle: int) -> Iterator[Cell]:
    """The R and A of each pair side by side; an R without an A takes the place nearer to the middle."""
    for pair, y in zip(pairs.values(), ys, strict=True):
        for kind, block in pair.items():
            slot = toward_middle if len(pair) == 1 else "RA".index(kind)
            yield Cell(block.name, x + slot * (WIDTH + GAP), y, f"{kind}{_index(block.name)}")


def _pill(name: str, over: Sequence[Cell], y: float) -> Cell:
    """A block that always stays, as wide as the cells of its stage."""
    part = name.split(".")[2] if "." in name else name
    x, end = min(c.x for c in over), max(c.x + c.w for c in over)
    return Cell(name, x, y, {"downsamplers": "↓ downsample", "upsamplers": "↑ upsample"}.get(part, part), end - x, PILL, fixed=True)


def _mid(graph: BlockGraph, centre: float, y: float) -> Iterator[Cell]:
    """The parts of the mid stage in a row, the stage as a whole under them, and under that the innermost stages as a whole."""
    parts = [b for b in graph if b.stage == "mid_block" and b.kind in "RA"]
    x = centre - (len(parts) * (WIDTH + GAP) - GAP) / 2
    for i, block in enumerate(parts):
        yield Cell(block.name, x + i * (WIDTH + GAP), y, f"{block.kind}{_index(block.name)}")
    wide = max(len(parts), 2) * (WIDTH + GAP) - GAP
    if "mid_block" in graph:
        yield Cell("mid_block", centre - wide / 2, y - PITCH, "whole mid stage", wide)
    if graph.innermost:
        yield Cell("innermost", centre - wide / 2, y - 2 * PITCH, "innermost stages", wide)


def tiles(graph: BlockGraph, cells: Mapping[str, Cell], units: Mapping[str, Unit], removed: Architecture) -> Iterator[Tile]:
    """What is drawn in each cell; an attention whose transformer layers differ becomes strips, its own label without a tile."""
    first: dict[Architecture, str] = {}
    kinds = dict(removed.fits)
    for block in graph:
        if block.name in units and block.kind in "RAM":
            first.setdefault(units[block.name].arch, block.name)
    for cell in cells.values():
        whole = cell.name == "innermost"
        name = min(graph.innermost) if whole else cell.name
        if layers := _differing(graph, name, units, removed):
            width = (cell.w - NAME_WIDTH) / len(layers)
            for i, layer in enumerate(layers):
                x = cell.x + NAME_WIDTH + i * width
                fit = kinds.get(layer, "")
                yield Tile(layer, x, cell.y, width, cell.h, unit=units.get(layer), gone=layer in removed, fit=fit)
            continue
        gone, unit = graph.innermost <= removed.removed if whole else name in removed, units.get(name)
        shows = unit is not None and not cell.fixed and (whole or name in first.values())
        value = unit.value if unit and shows else None
        fit = next((kinds[n] for n in (graph.innermost if whole else (name,)) if n in kinds), "")
        yield Tile(name, cell.x, cell.y, cell.w, cell.h, cell.label, unit, value, gone, cell.fixed, fit)


def strip_cells(graph: BlockGraph, cells: Mapping[str, Cell], units: Mapping[str, Unit], removed: Architecture) -> list[Cell]:
    """The cells that `tiles` draws as strips: their labels stand beside the strips."""
    return [c for c in cells.values() if c.name in graph and _differing(graph, c.name, units, removed)]


def _differing(graph: BlockGraph, name: str, units: Mapping[str, Unit], removed: Architecture) -> list[str]:
    """The transformer layers of an attention, or their components, where they differ in score or removal; none where one colour
    says all."""
    within = [b for b in graph if b.name.startswith(name + ".")] if name != "mid_block" else []
    for kind in "CT":
        parts = [b.name for b in within if b.kind == kind]
        above = {n: n.rpartition(".")[0] if kind == "C" else name for n in parts}
        alone = len(parts) == 1 and name in units and (parts[0] in removed) == (name in removed)
        if not alone and any((units.get(n), n in removed) != (units.get(above[n]), above[n] in removed) for n in parts):
            return parts
    return []


def skips(graph: BlockGraph, cells: Mapping[str, Cell]) -> Iterator[Line]:
    """From the right edge of each producer to the left edge of the block that takes its skip connection."""
    for source, target in graph.skip_edges:
        if source in cells and target in cells:
            a, b = cells[source], cells[target]
            yield (a.x + a.w, a.y + a.h / 2), (b.x, b.y + b.h / 2)


def bend(cells: Mapping[str, Cell]) -> Iterator[Line]:
    """The bend of the U: from the last of the down path into the mid stage, and from there up."""
    mid = [c for n, c in cells.items() if n.startswith("mid_block.")] or [c for n, c in cells.items() if n == "mid_block"]
    left = [c for n, c in cells.items() if n.startswith("down_blocks")]
    right = [c for n, c in cells.items() if n.startswith("up_blocks") and not c.fixed]
    if not (mid and left and right):
        return
    a, b, top = min(left, key=lambda c: c.y), min(right, key=lambda c: c.y), mid[0].y + mid[0].h
    ends = mid[0].x + 0.2, mid[-1].x + mid[-1].w - 0.2
    x_in, x_out = max(a.x + a.w / 2, ends[0]), min(b.x + b.w / 2, ends[1])
    yield (x_in, a.y), (x_in, top)
    yield (x_out, top), (x_out, b.y)


def stage_names(graph: BlockGraph, cells: Mapping[str, Cell]) -> Iterator[StageName]:
    """Stage, resolution and channels beside each stage, on the outer side."""
    for path, side in (("down_blocks", -1), ("up_blocks", 1)):
        for stage in sorted({b.stage for b in graph if b.stage.startswith(path)}):
            rows = [c for n, c in cells.items() if n.startswith(stage + ".") and not c.fixed]
            edge = min(c.x for c in rows) - 0.14 if side < 0 else max(c.x + c.w for c in rows) + 0.14
            middle = (min(c.y for c in rows) + max(c.y + c.h for c in rows)) / 2
            yield StageName(edge, middle, f"{path.split('_')[0]} {_index(stage)}", _size(graph[rows[0].name]), side)
    if "mid_block" in cells:
        mid = cells["mid_block"]
        yield StageName(mid.x - 0.14, mid.y + PITCH - 0.05, "mid", _size(graph["mid_block"]), -1)


def _size(block: Block) -> str:
    channels, height, width = block.shape_out
    return f"{height}{TIMES}{width} · {channels}"
