"""The U-Net drawn as a U in SVG: every block can be pointed at, or reached by keyboard, for what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_hex

from blockprune.measures.measure import MEASURES, quality
from blockprune.measures.score import TEACHER
from blockprune.model.architecture import KINDS, Architecture, Block, BlockGraph
from blockprune.reports.canvas import INK, axis_title, colour_of, ink_on, loss_scale
from blockprune.reports.layout import (
    TIMES,
    Cell,
    Tile,
    bend,
    layout,
    scored_units,
    skips,
    stage_names,
    strip_cells,
    tiles,
    with_innermost,
)
from blockprune.reports.text import count, number, with_interval
from blockprune.reports.view import ScanView

PX_X, PX_Y = 62, 50
MARGIN = 1.2
STOPS = 24
Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """One block as drawn, in pixels with y downwards. `fill` is "" without a score, `ink` reads on it; `told` is its tooltip."""

    x: float
    y: float
    w: float
    h: float
    label: str
    value: str
    fill: str
    ink: str
    gone: bool
    fixed: bool
    told: str


@dataclass(frozen=True)
class Caption:
    """Text beside the U, `anchor` start or end; `small` under it."""

    x: float
    y: float
    text: str
    small: str
    anchor: str


@dataclass(frozen=True)
class Drawing:
    """One U: its blocks in forward order, its lines as point pairs, its captions; `alt` says in words what it shows."""

    heading: str
    sub: str
    alt: str
    width: float
    height: float
    marks: Sequence[Mark]
    skips: Sequence[tuple[Point, Point]]
    bends: Sequence[tuple[Point, Point]]
    captions: Sequence[Caption]
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Legend:
    """The colour scale: hex colours from low to high, and what its ends and the teacher's own value say."""

    title: str
    colours: Sequence[str]
    low: str
    high: str
    logarithmic: bool


@dataclass(frozen=True)
class Drawings:
    """Us side by side under one colour scale."""

    items: Sequence[Drawing]
    legend: Legend | None
    note: str
    kind: str = field(default="drawings", init=False)


def brief(value: float) -> str:
    """At most six characters where the size allows it: two significant digits."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.2g}" if abs(value) < 100 else number(value)


@dataclass(frozen=True)
class Sensitivity:
    """What single removals cost: `losses` colour the drawing by `measure`; `scan` adds what else it has measured."""

    losses: Mapping[Architecture, float]
    measure: str
    scan: ScanView | None = None


def legend(scored: Sensitivity, graph: BlockGraph) -> Legend | None:
    """The scale that `draw` colours by; None when nothing drawn is scored."""
    values = [u.value for u in scored_units(graph, scored.losses).values()]
    if not values:
        return None
    scale = loss_scale(values, scored.measure)
    low, high = scale.get_clim()
    assert low is not None and high is not None
    wide = type(scale.norm).__name__ == "LogNorm"
    shares = [i / (STOPS - 1) for i in range(STOPS)]
    steps = [low * (high / low) ** share if wide else low + (high - low) * share for share in shares]
    colours = [to_hex(colour_of(scale, v)) for v in steps]
    return Legend(axis_title(scored.measure), colours, number(low), number(high), wide)


def draw(graph: BlockGraph, removed: Architecture, scored: Sensitivity | None, convention: str, heading: str, sub: str) -> Drawing:
    """The U-Net with the blocks of `removed` hatched, each block in the colour of the finest scored unit that contains it."""
    losses = scored.losses if scored else {}
    units = scored_units(graph, losses)
    scale = loss_scale([u.value for u in units.values()], scored.measure) if scored and units else None
    cells = layout(graph, with_innermost(graph, losses, removed))
    right, top = max(c.x + c.w for c in cells.values()), max(c.y + c.h for c in cells.values())
    frame = _Frame(top)
    order = {b.name: i for i, b in enumerate(graph)}
    drawn = sorted(tiles(graph, cells, units, removed), key=lambda t: order.get(t.name, -1))
    drawn = [replace(t, value=None) for t in drawn] if removed else drawn  # a student repeats the teacher's numbers
    told = _Teller(graph, removed, scored, convention)
    captions = [Caption(*frame.at(s.x, s.y), s.name, s.size, "end" if s.side < 0 else "start") for s in stage_names(graph, cells)]
    captions += [_strip_caption(cell, frame) for cell in strip_cells(graph, cells, units, removed)]
    words = f"{len(removed)} blocks removed" if removed else "nothing removed"
    return Drawing(
        heading,
        sub,
        f"U-Net of {heading}: {words}. Arrow keys move between blocks.",
        (right + 2 * MARGIN) * PX_X,
        (top + 0.3) * PX_Y,
        [frame.mark(tile, scale, told(tile)) for tile in drawn],
        [(frame.at(*a), frame.at(*b)) for a, b in skips(graph, cells)],
        [(frame.at(*a), frame.at(*b)) for a, b in bend(cells)],
        captions,
    )


@dataclass(frozen=True)
class _Frame:
    """From cell units with y upwards to pixels with y downwards."""

    top: float

    def at(self, x: float, y: float) -> Point:
        return round((x + MARGIN) * PX_X, 1), round((self.top + 0.15 - y) * PX_Y, 1)

    def mark(self, tile: Tile, scale: ScalarMappable | None, told: str) -> Mark:
        x, y = self.at(tile.x, tile.y + tile.h)
        colour = colour_of(scale, tile.unit.value) if scale and tile.unit and not tile.fixed else None
        ink = ("light" if ink_on(colour) != INK else "dark") if colour else ""
        value = brief(tile.value) if tile.value is not None else ""
        size = round(tile.w * PX_X, 1), round(tile.h * PX_Y, 1)
        return Mark(x, y, *size, tile.label, value, to_hex(colour) if colour else "", ink, tile.gone, tile.fixed, told)


def _strip_caption(cell: Cell, frame: _Frame) -> Caption:
    return Caption(*frame.at(cell.x + 0.02, cell.y + cell.h / 2 - 0.04), cell.label, "", "start")


@dataclass(frozen=True)
class _Teller:
    """What is known of a block, a line each."""

    graph: BlockGraph
    removed: Architecture
    scored: Sensitivity | None
    convention: str

    def __call__(self, tile: Tile) -> str:
        whole = tile.label == "innermost stages"
        lines = ["innermost stages, down and up" if whole else tile.name]
        if not whole and tile.name in self.graph:
            lines += self._block(self.graph[tile.name])
        if tile.unit is not None and self.scored is not None and not tile.fixed:
            lines += self._scores(tile.unit.arch, tile.name)
        if tile.gone:
            lines.append("removed in this student")
        return "\n".join(lines)

    def _block(self, block: Block) -> list[str]:
        (c, h, w), (c_out, h_out, w_out) = block.shape_in, block.shape_out
        total, macs = self.graph.total, block.cost.macs(self.convention)
        lines = [f"{KINDS[block.kind]}, {c}{TIMES}{h}{TIMES}{w} to {c_out}{TIMES}{h_out}{TIMES}{w_out}"]
        lines += [f"parameters: {count(block.cost.params)} ({block.cost.params / total.params:.1%} of the U-Net)"]
        lines += [f"MACs of a step: {count(macs)} ({macs / total.macs(self.convention):.1%}), {self.convention}"]
        return lines if block.removable or block.kind == "F" else [*lines, f"stays: {block.why_fixed}"]

    def _scores(self, arch: Architecture, name: str) -> list[str]:
        """What the removal of the unit that holds the block costs."""
        assert self.scored is not None
        scan = self.scored.scan
        alone = "without it:" if set(arch) == {name} else f"without its unit ({', '.join(arch)}):"
        label = next((n for n, a in scan.archs.items() if a == arch and n != TEACHER), None) if scan else None
        if scan is None or label is None:
            return [alone, f"{MEASURES[self.scored.measure].title}: {number(self.scored.losses[arch])}"]
        lines = [alone]
        for measure in quality():
            if (value := scan.value(label, measure)) is not None:
                lines.append(f"{MEASURES[measure].title}: {with_interval(value, *(scan.interval(label, measure) or (None, None)))}")
        if (ratio := scan.value(label, "latency_ratio")) is not None:
            lines.append(f"step latency: {ratio:.3g} of the teacher's")
        return lines
