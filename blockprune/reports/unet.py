"""The U-Net drawn as a U: one cell per block, coloured by what its removal costs, hatched where an architecture removes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from blockprune.measures.measure import MEASURES
from blockprune.measures.score import TEACHER
from blockprune.model.architecture import Architecture, BlockGraph
from blockprune.reports.canvas import (
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
from blockprune.reports.layout import (
    Cell,
    Tile,
    Unit,
    bend,
    layout,
    scored_units,
    skips,
    stage_names,
    strip_cells,
    tiles,
    with_innermost,
)
from blockprune.reports.text import number
from blockprune.reports.view import ScanView

INCH = 0.78
HATCH = "/////"
UNIT_NAMES = {"block": "block", "pair": "ResNet-attention pair", "stage": "stage", "layer": "transformer layer"}


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
    gone = removed or Architecture()
    cells = layout(graph, with_innermost(graph, losses, gone))
    right, top = max(c.x + c.w for c in cells.values()), max(c.y + c.h for c in cells.values())
    margin, bar = 1.35, 1.5 if scale else 0.2
    width, height = (right + 2 * margin + bar) * INCH, (top + 0.35) * INCH + 1.05
    figure = new_figure(width, height)
    title(figure, heading, _explanation(removed, units))
    ax = figure.add_axes((0, 0.35 / height, (right + 2 * margin) * INCH / width, (top + 0.35) * INCH / height))
    ax.set(xlim=(-margin, right + margin), ylim=(-0.2, top + 0.15))
    ax.axis("off")
    _skips(ax, graph, cells)
    _bend(ax, cells)
    for tile in tiles(graph, cells, units, gone):
        _tile(ax, tile, scale)
    for cell in strip_cells(graph, cells, units, gone):
        write(ax, cell.x + 0.02, cell.y + cell.h / 2 - 0.01, cell.label, fontsize=8.5, weight="bold", va="center")
    _stage_names(ax, graph, cells)
    if scale and measure:
        _colour_bar(figure, scale, measure, teacher)
    _legend(figure, bool(gone), any(c.name not in units and c.name in graph and not c.fixed for c in cells.values()))
    return figure


def _explanation(removed: Architecture | None, units: Mapping[str, Unit]) -> str:
    text = "Down path left, up path right; R = ResNet block, A = attention; grey lines = skip connections."
    if any(len(u.arch) > 1 for u in units.values()):
        text += " Blocks removed together share a colour."
    elif any("transformer_blocks" in name for u in units.values() for name in u.arch):
        text += " Strips: the transformer layers of an attention."
    return f"{text} Hatched: {len(removed)} removed." if removed else text


def _skips(ax: Axes, graph: BlockGraph, cells: Mapping[str, Cell]) -> None:
    for (x, y), (end, _) in skips(graph, cells):
        ax.plot([x, end], [y, y], color=FAINT, lw=1.1, zorder=0)
        ax.plot([end - 0.06], [y], marker=">", ms=3, color="#aab3ba", zorder=0)


def _bend(ax: Axes, cells: Mapping[str, Cell]) -> None:
    for start, end in bend(cells):
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="#aab3ba", lw=1.1, shrinkA=2, shrinkB=2))


def _tile(ax: Axes, tile: Tile, scale: ScalarMappable | None) -> None:
    """Colour, hatch, label and value of one block, or of one strip where the tile has no label."""
    face = to_rgba("#f4f5f6") if tile.fixed else colour_of(scale, tile.unit.value) if scale and tile.unit else to_rgba(UNSCORED)
    hatching = (*to_rgba(ink_on(face))[:3], 0.55)
    if not tile.label:
        ax.add_patch(Rectangle((tile.x, tile.y), tile.w, tile.h, facecolor=face, edgecolor="white", lw=0.6))
        if tile.gone:
            ax.add_patch(Rectangle((tile.x, tile.y), tile.w, tile.h, fill=False, hatch=HATCH, edgecolor=hatching, lw=0.6))
        return
    ax.add_patch(_box(tile, face, FAINT if tile.fixed else "none"))
    if tile.gone:
        ax.add_patch(_box(tile, "none", hatching, hatch=HATCH))
    patch = {"bbox": {"facecolor": face, "edgecolor": "none", "pad": 1.2}} if tile.gone else {}
    style: dict[str, Any] = {"va": "center", "color": MUTED if tile.fixed else ink_on(face), **patch}
    middle = tile.y + tile.h / 2 - 0.01
    if tile.fixed:
        write(ax, tile.x + tile.w / 2, middle, tile.label, ha="center", fontsize=6.5, **style)
        return
    write(ax, tile.x + 0.1, middle, tile.label, ha="left", fontsize=8.5, weight="bold", **style)
    if tile.value is not None:
        write(ax, tile.x + tile.w - 0.08, middle, number(tile.value), ha="right", fontsize=7.5, **style)


def _box(tile: Tile, face: Any, edge: Any, hatch: str | None = None) -> FancyBboxPatch:
    shape = "round,pad=0,rounding_size=0.07"
    return FancyBboxPatch((tile.x, tile.y), tile.w, tile.h, boxstyle=shape, facecolor=face, edgecolor=edge, lw=0.7, hatch=hatch)


def _stage_names(ax: Axes, graph: BlockGraph, cells: Mapping[str, Cell]) -> None:
    for s in stage_names(graph, cells):
        align: dict[str, Any] = {"va": "center", "ha": "right" if s.side < 0 else "left"}
        write(ax, s.x, s.y + 0.13, s.name, weight="bold", fontsize=9, **align)
        write(ax, s.x, s.y - 0.13, s.size, fontsize=7, color=MUTED, **align)


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
