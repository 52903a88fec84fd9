"""The U-Net drawn as a U, in SVG: one cell per block, coloured by what its removal costs, hatched where an architecture removes it.

The same drawing stands in a page, in a file of its own and in a notebook; every block says what is known of it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, tostring

from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_hex

from blockprune.measures.measure import MEASURES, quality
from blockprune.measures.score import TEACHER
from blockprune.model.architecture import FITS, Architecture
from blockprune.model.graph import KINDS, Block, BlockGraph
from blockprune.reports.canvas import INK, LOSS, axis_title, colour_of, ink_on, is_wide, loss_scale
from blockprune.reports.layout import (
    TIMES,
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
from blockprune.reports.search_view import SearchView
from blockprune.reports.svg import Svg, add, file, sound, write
from blockprune.reports.table import brief, count, number, with_interval
from blockprune.reports.view import ScanView
from blockprune.runs.records import Evaluation

PX_X, PX_Y, MARGIN = 62, 50, 1.2  # of a cell unit, and beside the U
LEAST_WIDTH, LINE, EDGE = 720, 16, 16  # of a file, in pixels
BAR_WIDTH, LEGEND_WIDTH, LEGEND_HEIGHT = 240, 480, 50
EVERY_HATCHING = Architecture(frozenset({"removed", "fitted~linear"}))
UNIT_NAMES = {
    "block": "block",
    "pair": "ResNet-attention pair",
    "stage": "stage",
    "layer": "transformer layer",
    "component": "component of a transformer layer",
}


@dataclass(frozen=True)
class Sensitivity:
    """What single removals cost: `losses` colour the drawing by `measure`; `scan` adds what else it has measured."""

    losses: Mapping[Architecture, float]
    measure: str
    scan: ScanView | None = None

    @classmethod
    def of_scan(cls, view: ScanView) -> Sensitivity | None:
        """By the scan's main measure; None when it has none."""
        if (main := view.main_measure) is None:
            return None
        return cls({view.archs[n]: v for n in view.removals if (v := view.value(n, main)) is not None}, main, view)

    @classmethod
    def of_search(cls, view: SearchView) -> Sensitivity | None:
        """By what the search scored unit by unit; None when it scored none."""
        return cls(view.losses(), view.measure) if view.losses() else None


def scan_svg(view: ScanView, removed: Architecture | None = None) -> Svg:
    """The U-Net coloured by the scan's main measure; blocks of `removed` are hatched."""
    model = str(view.protocol.get("model", "U-Net")).rstrip("/").rsplit("/", 1)[-1][:40]
    scored = Sensitivity.of_scan(view)
    if scored is None:
        return unet_svg(view.graph, f"{model}: no quality measure was scored", removed)
    scanned = {view.archs[label] for label in view.removals}
    unit = UNIT_NAMES[max(UNIT_NAMES, key=lambda unit: len(scanned & set(view.graph.units(unit).values())))]
    return unet_svg(view.graph, f"{model}: {MEASURES[scored.measure].title} when a {unit} is removed", removed, scored)


def search_svg(view: SearchView, e: Evaluation, what: str) -> Svg:
    """The U-Net of one evaluation of a search, coloured by what the search scored unit by unit."""
    shares = f"{view.share(e, 'params'):.1%} of parameters, {view.share(e, 'macs'):.1%} of MACs"
    return unet_svg(view.graph, f"{what}: {e.score.label}, {shares}", e.candidate.arch, Sensitivity.of_search(view))


def unet_svg(graph: BlockGraph, heading: str, removed: Architecture | None = None, scored: Sensitivity | None = None) -> Svg:
    """A file of its own: heading, explanation, the U, and what its colours mean."""
    gone, units = removed or Architecture(), scored_units(graph, scored.losses if scored else {})
    drawn, width, height = _drawing(graph, gone, scored, "thop", numbers=True)
    width = max(width, LEAST_WIDTH)
    texts = {"heading": (heading, 9.3), "small": (_explanation(gone, units), 5.6)}  # with the width of a letter
    lines = [(line, kind) for kind, (text, px) in texts.items() for line in textwrap.wrap(text, round((width - 2 * EDGE) / px))]
    top = LINE + LINE * len(lines)
    words = Element("g")
    for i, (line, kind) in enumerate(lines):
        write(words, EDGE, LINE * (1.2 + i), line, kind)
    drawn.set("transform", f"translate(0 {top})")
    legend = _legend(graph, scored, gone, any(b.kind in "RAM" and b.name not in units for b in graph))
    legend.set("transform", f"translate({EDGE} {top + height:g})")
    return file("u", heading, width, top + height + LEGEND_HEIGHT + LINE, _defs(), words, drawn, legend)


def page_svg(graph: BlockGraph, removed: Architecture, scored: Sensitivity | None, convention: str, heading: str) -> str:
    """The U alone, to stand in a page that has `style` and `page_defs`; a student does not repeat the teacher's numbers."""
    drawn, width, height = _drawing(graph, removed, scored, convention, numbers=not removed)
    words = f"{len(removed)} blocks removed" if removed else "nothing removed"
    alt = sound(f"U-Net of {heading}: {words}. Arrow keys move between blocks.")
    root = Element("svg", {"class": "u", "viewBox": f"0 0 {width:g} {height:g}", "role": "group", "aria-label": alt})
    root.append(drawn)
    return tostring(root, encoding="unicode")


def page_legend(graph: BlockGraph, scored: Sensitivity | None) -> str:
    """What colours and hatching mean, for several drawings in a page."""
    size = {"width": f"{LEGEND_WIDTH}", "height": f"{LEGEND_HEIGHT}"}
    root = Element("svg", {"class": "u", "viewBox": f"0 0 {' '.join(size.values())}", **size})
    root.append(_legend(graph, scored, EVERY_HATCHING, True))
    return tostring(root, encoding="unicode")


def page_defs() -> str:
    """What the drawings of a page refer to, once."""
    root = Element("svg", {"width": "0", "height": "0", "aria-hidden": "true", "style": "position: absolute"})
    root.append(_defs())
    return tostring(root, encoding="unicode")


def _defs() -> Element:
    """Hatching and dots for each ink, the head of an arrow, and the colour bars of measures where less, or more, is better."""
    defs = Element("defs", {"class": "u-defs"})
    for ink in ("dark", "light", "plain"):
        turned = {"patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
        pattern = add(defs, "pattern", id=f"hatch-{ink}", width=7, height=7, **turned)
        add(pattern, "line", class_=ink, x1=1.5, y1=0, x2=1.5, y2=7)
        dots = add(defs, "pattern", id=f"fit-{ink}", width=7, height=7, **turned)
        add(dots, "circle", class_=ink, cx=3.5, cy=3.5, r=0.8)
    head = {"viewBox": "0 0 8 8", "refX": 7, "refY": 4, "markerWidth": 7, "markerHeight": 7}
    add(add(defs, "marker", id="arrow", orient="auto", **head), "path", d="M0 0 L8 4 L0 8 z")
    for direction, colours in (("down", LOSS), ("up", LOSS[::-1])):
        bar = add(defs, "linearGradient", id=f"loss-{direction}")
        for i, colour in enumerate(colours):
            add(bar, "stop", offset=round(i / (len(colours) - 1), 3), stop_color=colour)
    return defs


def _drawing(
    graph: BlockGraph, removed: Architecture, scored: Sensitivity | None, convention: str, numbers: bool
) -> tuple[Element, float, float]:
    """The U with its width and height, each block in the colour of the finest scored unit that contains it."""
    losses = scored.losses if scored else {}
    units = scored_units(graph, losses)
    scale = loss_scale([u.value for u in units.values()], scored.measure) if scored and units else None
    cells = layout(graph, with_innermost(graph, losses, removed))
    right, top = max(c.x + c.w for c in cells.values()), max(c.y + c.h for c in cells.values())

    def at(x: float, y: float) -> tuple[float, float]:
        return round((x + MARGIN) * PX_X, 1), round((top + 0.15 - y) * PX_Y, 1)

    group = Element("g")
    for kind, lines in (("skip", skips(graph, cells)), ("bend", bend(cells))):
        for start, end in lines:
            (x1, y1), (x2, y2) = at(*start), at(*end)
            add(group, "line", class_=kind, x1=x1, y1=y1, x2=x2, y2=y2, **({"marker_end": "url(#arrow)"} if kind == "bend" else {}))
    for s in stage_names(graph, cells):
        (x, y), anchor = at(s.x, s.y), "end" if s.side < 0 else "start"
        write(group, x, y, s.name, "stage", anchor)
        write(group, x, y + 13, s.size, "small", anchor)
    for cell in strip_cells(graph, cells, units, removed):
        write(group, *at(cell.x + 0.02, cell.y + cell.h / 2), cell.label, "label")
    order = {b.name: i for i, b in enumerate(graph)}
    for tile in sorted(tiles(graph, cells, units, removed), key=lambda t: order.get(t.name, -1)):
        block = _block(tile, at(tile.x, tile.y + tile.h), scale, numbers)
        add(block, "title", _tooltip(graph, scored, convention, tile))
        group.append(block)
    return group, (right + 2 * MARGIN) * PX_X, (top + 0.35) * PX_Y


def _block(tile: Tile, corner: tuple[float, float], scale: ScalarMappable | None, numbers: bool) -> Element:
    """Colour, hatch, label and value of one block, or of one strip where the tile has no label."""
    colour = colour_of(scale, tile.unit.value) if scale and tile.unit and not tile.fixed else None
    ink = ("dark" if ink_on(colour) == INK else "light") if colour else ""
    states = {"gone": tile.gone, "fixed": tile.fixed, "unscored": colour is None, ink: ink}
    group = Element(
        "g", {"class": " ".join(["block", *(name for name, holds in states.items() if holds)]), "role": "img", "tabindex": "-1"}
    )
    (x, y), w, h = corner, round(tile.w * PX_X, 1), round(tile.h * PX_Y, 1)
    box = {"x": x, "y": y, "width": w, "height": h, "rx": 4 if tile.label else 0}
    add(group, "rect", class_="cell" if tile.label else "cell strip", **box, **({"fill": to_hex(colour)} if colour else {}))
    if tile.gone:
        add(group, "rect", class_="hatch", **box, fill=f"url(#{'fit' if tile.fit else 'hatch'}-{ink or 'plain'})")
    if tile.label:
        write(group, x + (w / 2 if tile.fixed else 5), y + h / 2, tile.label, "label")
    if tile.value is not None and numbers:
        write(group, x + w - 4, y + h / 2, brief(tile.value), "value")
    return group


def _legend(graph: BlockGraph, scored: Sensitivity | None, removed: Architecture, unscored: bool) -> Element:
    """The colour bar with its ends, the teacher's own value, and what hatching and grey mean."""
    group = Element("g")
    values = [u.value for u in scored_units(graph, scored.losses).values()] if scored else []
    if scored and values:
        scale = loss_scale(values, scored.measure)
        title = axis_title(scored.measure) + (", logarithmic" if is_wide(values) else "")
        teacher = scored.scan.value(TEACHER, scored.measure) if scored.scan else None
        write(group, 0, 8, title + (f"; teacher: {number(teacher)}" if teacher is not None else ""))
        add(group, "rect", x=0, y=18, width=BAR_WIDTH, height=14, rx=3, fill=f"url(#loss-{MEASURES[scored.measure].direction})")
        for text, x, anchor in zip(map(number, scale.get_clim()), (0, BAR_WIDTH), ("start", "end"), strict=True):
            write(group, x, 41, text, "small", anchor)
    x = BAR_WIDTH + 24 if values else 0
    plain, fitted = len(removed) > len(removed.fits), bool(removed.fits)
    for name, pattern in [("removed", "hatch")] * plain + [("fitted map", "fit")] * fitted + [("not scored", "")] * unscored:
        key = add(group, "g", class_="unscored")
        add(key, "rect", class_="cell", x=x, y=18, width=26, height=14, rx=3)
        if pattern:
            add(key, "rect", class_="hatch", x=x, y=18, width=26, height=14, rx=3, fill=f"url(#{pattern}-plain)")
        write(group, x + 32, 25, name)
        x += 100
    return group


def _explanation(removed: Architecture, units: Mapping[str, Unit]) -> str:
    text = "Down path left, up path right; R: ResNet block, A: attention; grey lines: skip connections."
    if any(len(u.arch) > 1 for u in units.values()):
        text += " Blocks removed together share a colour."
    elif any("transformer_blocks" in name for u in units.values() for name in u.arch):
        text += " Strips: the transformer layers of an attention."
    fitted = f" Dotted: {len(removed.fits)} of them with a map fitted in their place." if removed.fits else ""
    return f"{text} Hatched: {len(removed)} removed.{fitted}" if removed else text


def _tooltip(graph: BlockGraph, scored: Sensitivity | None, convention: str, tile: Tile) -> str:
    """What is known of a block, a line each."""
    whole = tile.label == "innermost stages"
    lines = ["innermost stages, down and up" if whole else tile.name]
    if not whole and tile.name in graph:
        lines += _facts(graph[tile.name], graph, convention)
    if tile.unit is not None and scored is not None and not tile.fixed:
        arch = tile.unit.arch
        lines.append("without it:" if set(arch) == {tile.name} else f"without its unit ({', '.join(arch)}):")
        lines += _scores(scored, arch)
    gone = f"a {'linear map' if tile.fit == 'linear' else 'scale and shift'} stands in" if tile.fit else "removed"
    return "\n".join([*lines, f"{gone} in this student"] if tile.gone else lines)


def _facts(block: Block, graph: BlockGraph, convention: str) -> Sequence[str]:
    """Shapes, costs, and why it stays."""
    (c, h, w), (c_out, h_out, w_out) = block.shape_in, block.shape_out
    total, macs = graph.total, block.cost.macs(convention)
    lines = [f"{KINDS[block.kind]}, {c}{TIMES}{h}{TIMES}{w} to {c_out}{TIMES}{h_out}{TIMES}{w_out}"]
    lines += [f"parameters: {count(block.cost.params)} ({block.cost.params / total.params:.1%} of the U-Net)"]
    lines += [f"MACs of a step: {count(macs)} ({macs / total.macs(convention):.1%}), {convention}"]
    return lines if block.removable or block.kind == "F" else [*lines, f"stays: {block.why_fixed}"]


def _scores(scored: Sensitivity, arch: Architecture) -> Sequence[str]:
    """What the removal of `arch` costs, by every measure."""
    scan = scored.scan
    label = next((n for n in scan.removals if scan.archs[n] == arch), None) if scan else None
    if scan is None or label is None:
        return [f"{MEASURES[scored.measure].title}: {number(scored.losses[arch])}"]
    values = {m: scan.value(label, m) for m in quality()}
    scores = {m: with_interval(v, *(scan.interval(label, m) or (None, None))) for m, v in values.items() if v is not None}
    fits = {
        kind: next((n for n, a in scan.archs.items() if a.plain == arch and {k for _, k in a.fits} == {kind}), "") for kind in FITS
    }
    ratio = scan.value(label, "latency_ratio")
    return [
        *(f"{MEASURES[m].title}: {s}" for m, s in scores.items()),
        *([f"step latency: {ratio:.3g} of the teacher's"] if ratio else []),
        *(f"{scored.measure} with a {kind} fit: {number(v)}" for kind, n in fits.items() if (v := scan.value(n, scored.measure))),
    ]
