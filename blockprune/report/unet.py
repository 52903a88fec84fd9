"""The U-Net drawn as a U: one cell per block, coloured by what its removal costs, hatched where an architecture removes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from blockprune.arch import UNITS, Architecture, Block, BlockGraph
from blockprune.records import MEASURES
from blockprune.report.canvas import (
    FAINT,
    INK,
    MUTED,
    UNSCORED,
    axis_title,
    colour_of,
    ink_on,
    loss_scale,
    new_figure,
    title,
    write,
)
from blockprune.report.text import number
from blockprune.report.view import TEACHER, ScanView

WIDTH, HEIGHT, GAP = 1.12, 0.46, 0.07
PITCH, STAGE_GAP, INDENT, THROAT, PILL = HEIGHT + 0.09, 0.3, 0.52, 1.5, 0.27
INCH = 0.78
HATCH, TIMES = "/////", "\N{MULTIPLICATION SIGN}"
UNIT_NAMES = {"block": "block", "pair": "ResNet-attention pair", "stage": "stage", "layer": "transformer layer"}


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


def unet_figure(view: ScanView, removed: Architecture | None = None) -> Figure:
    """The U-Net coloured by the scan's main measure; blocks of `removed` are hatched."""
    main = view.main_measure
    losses = {view.archs[n]: v for n in view.removals if main and (v := view.value(n, main)) is not None}
    teacher = view.value(TEACHER, main) if main else None
    model = str(view.protocol.get("model", "U-Net")).rstrip("/").rsplit("/", 1)[-1][:40]
    if main is None:
        return draw_unet(view.graph, {}, None, None, removed, f"{model}: no quality measure was scored")
    name, unit = MEASURES[main].title, _unit_of(view)
    return draw_unet(view.graph, losses, main, teacher, removed, f"{model}: {name} when a {unit} is removed")


def _unit_of(view: ScanView) -> str:
    """What kind of unit most of the scan's removals are, in words."""
    scanned = {view.archs[label] for label in view.removals}
    return UNIT_NAMES[max(UNIT_NAMES, key=lambda unit: len(scanned & set(view.graph.units(unit).values())))]


def draw_unet(
    graph: BlockGraph,
    losses: Mapping[Architecture, float],
    measure: str | None = None,
    teacher: float | None = None,
    removed: Architecture | None = None,
    heading: str = "U-Net",
) -> Figure:
    """The U-Net of `graph`, each block in the colour of the finest scored unit that contains it, grey when none does.

    `losses` may hold architectures that are not units; those colour nothing. `teacher` is marked on the colour bar.
    """
    units = scored_units(graph, losses)
    scale = loss_scale([u.value for u in units.values()], measure) if measure and units else None
    inner, gone = set(graph.innermost), removed or Architecture()
    cells = layout(graph, with_innermost=bool(inner) and (inner <= gone.removed or any(inner == a.removed for a in losses)))
    right, top = max(c.x + c.w for c in cells.values()), max(c.y + c.h for c in cells.values())
    margin, bar = 1.35, 1.5 if scale else 0.2
    width, height = (right + 2 * margin + bar) * INCH, (top + 0.35) * INCH + 1.05
    figure = new_figure(width, height)
    title(figure, heading, _explanation(removed, units))
    ax = figure.add_axes((0, 0.35 / height, (right + 2 * margin) * INCH / width, (top + 0.35) * INCH / height))
    ax.set(xlim=(-margin, right + margin), ylim=(-0.2, top + 0.15))
    ax.axis("off")
    _skips(ax, graph, cells)
    _flow(ax, cells)
    painter = _Painter(ax, graph, units, scale, gone)
    for cell in cells.values():
        painter.cell(cell)
    _stage_names(ax, graph, cells)
    if scale and measure:
        _colour_bar(figure, scale, measure, teacher)
    _legend(figure, bool(gone), any(c.name not in units and c.name in graph and not c.fixed for c in cells.values()))
    return figure


class Unit(NamedTuple):
    """A scored unit of removal."""

    arch: Architecture
    value: float


def scored_units(graph: BlockGraph, losses: Mapping[Architecture, float]) -> dict[str, Unit]:
    """Block name => the smallest scored unit of removal that contains it; blocks in none are left out."""
    units = {arch for unit in UNITS for arch in graph.units(unit).values()}
    scored = sorted((a for a in losses if a in units), key=lambda a: graph.total.params - graph.cost(a).params)
    found = {b.name: next((a for a in scored if b.name in a), None) for b in graph}
    return {name: Unit(arch, losses[arch]) for name, arch in found.items() if arch is not None}


def _explanation(removed: Architecture | None, units: Mapping[str, Unit]) -> str:
    text = "Down path left, up path right; R = ResNet block, A = attention; grey lines = skip connections."
    if any(len(u.arch) > 1 for u in units.values()):
        text += " Blocks removed together share a colour."
    elif any("transformer_blocks" in name for u in units.values() for name in u.arch):
        text += " Strips: the transformer layers of an attention."
    return f"{text} Hatched: {len(removed)} removed." if removed else text


def _index(name: str) -> int:
    return int(name.rsplit(".", 1)[1])


def _pairs(graph: BlockGraph, stage: str) -> dict[int, dict[str, Block]]:
    """Pair number => {"R": …, "A": …} of one stage."""
    rows: dict[int, dict[str, Block]] = {}
    for block in graph:
        if block.stage == stage and block.kind in "RA" and block.name.startswith(stage):
            rows.setdefault(_index(block.name), {})[block.kind] = block
    return rows


def layout(graph: BlockGraph, with_innermost: bool = False) -> dict[str, Cell]:
    """Where each block is drawn, by name. A skip connection comes out level: a down pair lies beside the up pair that takes it.

    `with_innermost` adds a cell for the innermost down and up stages taken together.
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
    cells += [c for c in _mid(graph, right / 2, y + PILL + STAGE_GAP - HEIGHT + 0.1) if with_innermost or c.name != "innermost"]
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


class _Painter:
    """Draws cells with the values, the colour scale and the hatching of one figure."""

    def __init__(
        self, ax: Axes, graph: BlockGraph, units: Mapping[str, Unit], scale: ScalarMappable | None, removed: Architecture
    ) -> None:
        self.ax, self.graph, self.units, self.scale, self.removed = ax, graph, units, scale, removed
        first: dict[Architecture, str] = {}
        for block in graph:
            if block.name in units and block.kind in "RAM":
                first.setdefault(units[block.name].arch, block.name)
        self.shows_value = set(first.values()) | {"innermost"}

    def colour(self, name: str) -> tuple[float, ...]:
        return colour_of(self.scale, self.units[name].value) if self.scale and name in self.units else to_rgba(UNSCORED)

    def cell(self, cell: Cell) -> None:
        """Colour, hatch, label and value; an attention whose transformer layers differ becomes strips beside its label."""
        name = min(self.graph.innermost) if cell.name == "innermost" else cell.name
        gone = self.graph.innermost <= self.removed.removed if cell.name == "innermost" else name in self.removed
        layers = [b.name for b in self.graph if b.kind == "T" and b.name.startswith(name + ".")] if name != "mid_block" else []
        single = {(self.units.get(n), n in self.removed) for n in layers}
        if len(single) > 1 or (layers and name not in self.units and single != {(None, gone)}):
            self._strips(cell, layers)
            return
        face = to_rgba("#f4f5f6") if cell.fixed else self.colour(name)
        self.ax.add_patch(_box(cell, face, FAINT if cell.fixed else "none"))
        if gone:
            self.ax.add_patch(_box(cell, "none", (*to_rgba(ink_on(face))[:3], 0.55), hatch=HATCH))
        value = self.units[name].value if name in self.units and not cell.fixed and cell.name in self.shows_value else None
        self._label(cell, face, value, gone)

    def _label(self, cell: Cell, face: tuple[float, ...], value: float | None, gone: bool) -> None:
        patch = {"bbox": {"facecolor": face, "edgecolor": "none", "pad": 1.2}} if gone else {}
        style: dict[str, Any] = {"va": "center", "color": MUTED if cell.fixed else ink_on(face), **patch}
        middle = cell.y + cell.h / 2 - 0.01
        if cell.fixed:
            write(self.ax, cell.x + cell.w / 2, middle, cell.label, ha="center", fontsize=6.5, **style)
            return
        write(self.ax, cell.x + 0.1, middle, cell.label, ha="left", fontsize=8.5, weight="bold", **style)
        if value is not None:
            write(self.ax, cell.x + cell.w - 0.08, middle, number(value), ha="right", fontsize=7.5, **style)

    def _strips(self, cell: Cell, layers: Sequence[str]) -> None:
        write(self.ax, cell.x + 0.02, cell.y + cell.h / 2 - 0.01, cell.label, fontsize=8.5, weight="bold", va="center")
        start, width = cell.x + 0.36, (cell.w - 0.36) / len(layers)
        for i, name in enumerate(layers):
            face, corner = self.colour(name), (start + i * width, cell.y)
            self.ax.add_patch(Rectangle(corner, width, cell.h, facecolor=face, edgecolor="white", lw=0.6))
            if name in self.removed:
                ink = (*to_rgba(ink_on(face))[:3], 0.55)
                self.ax.add_patch(Rectangle(corner, width, cell.h, fill=False, hatch=HATCH, edgecolor=ink, lw=0.6))


def _box(cell: Cell, face: Any, edge: Any, hatch: str | None = None) -> FancyBboxPatch:
    shape = "round,pad=0,rounding_size=0.07"
    return FancyBboxPatch((cell.x, cell.y), cell.w, cell.h, boxstyle=shape, facecolor=face, edgecolor=edge, lw=0.7, hatch=hatch)


def _skips(ax: Axes, graph: BlockGraph, cells: Mapping[str, Cell]) -> None:
    for source, target in graph.skip_edges:
        if source in cells and target in cells:
            a, b = cells[source], cells[target]
            ax.plot([a.x + a.w, b.x], [a.y + a.h / 2, b.y + b.h / 2], color=FAINT, lw=1.1, zorder=0)
            ax.plot([b.x - 0.06], [b.y + b.h / 2], marker=">", ms=3, color="#aab3ba", zorder=0)


def _flow(ax: Axes, cells: Mapping[str, Cell]) -> None:
    """The bend of the U: from the last of the down path into the mid stage, and from there up."""
    mid = [c for n, c in cells.items() if n.startswith("mid_block.")] or [c for n, c in cells.items() if n == "mid_block"]
    left = [c for n, c in cells.items() if n.startswith("down_blocks")]
    right = [c for n, c in cells.items() if n.startswith("up_blocks") and not c.fixed]
    if not (mid and left and right):
        return
    a, b, top = min(left, key=lambda c: c.y), min(right, key=lambda c: c.y), mid[0].y + mid[0].h
    ends = mid[0].x + 0.2, mid[-1].x + mid[-1].w - 0.2
    x_in, x_out = max(a.x + a.w / 2, ends[0]), min(b.x + b.w / 2, ends[1])
    for start, end in (((x_in, a.y), (x_in, top)), ((x_out, top), (x_out, b.y))):
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="#aab3ba", lw=1.1, shrinkA=2, shrinkB=2))


def _stage_names(ax: Axes, graph: BlockGraph, cells: Mapping[str, Cell]) -> None:
    """Stage, resolution and channels beside each stage, on the outer side."""
    for path, side in (("down_blocks", -1), ("up_blocks", 1)):
        for stage in sorted({b.stage for b in graph if b.stage.startswith(path)}):
            rows = [c for n, c in cells.items() if n.startswith(stage + ".") and not c.fixed]
            edge = min(c.x for c in rows) - 0.14 if side < 0 else max(c.x + c.w for c in rows) + 0.14
            middle = (min(c.y for c in rows) + max(c.y + c.h for c in rows)) / 2
            _stage_name(ax, edge, middle, f"{path.split('_')[0]} {_index(stage)}", graph[rows[0].name], side)
    if "mid_block" in cells:
        mid = cells["mid_block"]
        _stage_name(ax, mid.x - 0.14, mid.y + PITCH - 0.05, "mid", graph["mid_block"], -1)


def _stage_name(ax: Axes, x: float, y: float, name: str, block: Block, side: int) -> None:
    channels, height, width = block.shape_out
    align: dict[str, Any] = {"va": "center", "ha": "right" if side < 0 else "left"}
    write(ax, x, y + 0.13, name, weight="bold", fontsize=9, **align)
    write(ax, x, y - 0.13, f"{height}{TIMES}{width} · {channels}", fontsize=7, color=MUTED, **align)


def _colour_bar(figure: Figure, scale: ScalarMappable, measure: str, teacher: float | None) -> None:
    width, height = figure.get_size_inches()
    ax = figure.add_axes((1 - 1.0 / width, 0.9 / height, 0.18 / width, 1 - 2.2 / height))
    bar = figure.colorbar(scale, cax=ax)
    bar.outline.set_visible(False)
    ax.tick_params(labelsize=7.5, colors=MUTED, length=2, which="both")
    ax.set_ylabel(axis_title(measure), fontsize=8, color=INK, labelpad=6)
    ax.yaxis.set_label_position("left")
    low, high = scale.get_clim()
    if teacher is not None and low is not None and high is not None and low <= teacher <= high:
        ax.axhline(teacher, color=INK, lw=1.2)
        write(ax, -0.25, teacher, "teacher", transform=ax.get_yaxis_transform(), fontsize=7, ha="right", va="center")


def _legend(figure: Figure, hatched: bool, unscored: bool) -> None:
    keys = [Patch(facecolor="white", edgecolor=INK, hatch=HATCH, label="removed")] if hatched else []
    keys += [Patch(facecolor=UNSCORED, label="not scored")] if unscored else []
    if keys:
        figure.legend(handles=keys, loc="lower left", ncols=2, fontsize=8, frameon=False, bbox_to_anchor=(0.01, 0.0))
