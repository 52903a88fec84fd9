"""Charts as values, and the SVG that draws them: one by one in a page, whose colours they take, or as a sheet in a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from xml.etree.ElementTree import Element, tostring

from blockprune.reports.svg import Svg, add, file, sound, write
from blockprune.reports.table import brief

WIDTH, HEIGHT = 380, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 44, 40  # round the axes, in pixels
LETTER, LINE = 5.9, 13  # of a label
MANY_NAMES = 24  # letters of a label at the end of a line
SERIES = 8  # colours in plot.css; then the same again with dashes
SHAPES = ("dot", "square", "diamond", "triangle")
Band = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, on a logarithmic scale where asked; `rows` names places 0, 1, … from the top instead of numbers."""

    title: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    rows: Sequence[str] = ()

    @classmethod
    def over(cls, title: str, values: Iterable[float | None], log: bool = False) -> Axis:
        """Room for these values, and a little more."""
        known = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if log:
            low, high = (low, high) if high > low else (low / 2, high * 2)
            return cls(title, low / (high / low) ** 0.05, high * (high / low) ** 0.05, True)
        room = 0.06 * (high - low) or abs(high) / 10 or 1.0
        return cls(title, low - room if low < 0 or low > room else 0.0, high + room)

    def at(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.rows:
            return 1 - (value + 0.5) / len(self.rows)
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """(place from 0 to 1, text)."""
        if self.rows:
            return [(self.at(i), name) for i, name in enumerate(self.rows)]
        if self.log and self.high > 10 * self.low:
            return [(self.at(v), brief(v)) for v in self._round() if self.low <= v <= self.high]
        step = self._step()
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        values = [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        return [(self.at(v), f"{v:,.{digits}f}" if digits < 6 else f"{v:.3g}") for v in values]

    def _step(self) -> float:
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        return next(size * m for m in (1, 2, 5, 10) if size * m >= 0.9 * rough)

    def _round(self) -> list[float]:
        """Powers of ten; with 2 and 5 between them where these are few, and every second where they are many."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        if len(decades) <= 3:
            return [m * 10.0**d for d in decades for m in (1, 2, 5)]
        return [10.0**d for d in decades if d % (1 + len(decades) // 7) == 0]


@dataclass(frozen=True)
class Mark:
    """A point; `look` is its class in plot.css, `text` what it says when it is pointed at, `label` what stands beside it.

    A page's script knows it by its `name`, and may show it where it is not `shown` yet.
    """

    x: float
    y: float
    look: str
    text: str
    shape: str = "dot"
    label: str = ""
    band: Band | None = None
    x_band: Band | None = None
    name: str = ""
    shown: bool = True


@dataclass(frozen=True)
class Line:
    """A curve through points, with its name at its end; `step` goes on level and then up or down."""

    points: Sequence[tuple[float, float]]
    look: str
    label: str = ""
    step: bool = False


@dataclass(frozen=True)
class Rule:
    """A dotted line across the whole chart at a value of an axis, with what it means, and a band around it."""

    axis: str
    at: float
    label: str = ""
    band: Band | None = None
    look: str = "rule"


@dataclass(frozen=True)
class Bar:
    """A bar in a row of the vertical axis, as long as its value, with its interval; `value` None says that there is none."""

    row: int
    value: float | None
    colour: str
    text: str
    band: Band | None = None


def series(i: int) -> str:
    """The class of the i-th of many curves: another colour or other dashes for each."""
    return f"s{i % SERIES}" + (f" dash{i // SERIES % 3}" if i >= SERIES else "")


@dataclass(frozen=True)
class Plot:
    """One chart. `keys` are a look and what it means, a legend under the title."""

    title: str
    x: Axis
    y: Axis
    marks: Sequence[Mark] = ()
    lines: Sequence[Line] = ()
    rules: Sequence[Rule] = ()
    bars: Sequence[Bar] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    alt: str = ""
    width: float = WIDTH
    height: float = HEIGHT

    @cached_property
    def box(self) -> Box:
        """Left, top, right and bottom of the axes, in pixels."""
        rows = max((len(_short(name)) for name in self.y.rows), default=0)
        right = max((len(_short(line.label)) for line in self.lines), default=0)
        left = max(LEFT, rows * LETTER + 12)
        rows_over = len(self._key_rows()) + max((row + 1 for _, row in self.over()), default=0) + bool(self.y.title)
        top = TOP - LINE + LINE * rows_over
        return left, top, self.width - RIGHT - LETTER * right - (6 if right else 0), self.height - BOTTOM

    def over(self) -> list[tuple[str, int]]:
        """(anchor, row) of the label over each upright rule that has one, in rows so that none covers another."""
        ends, places = list[float](), list[tuple[str, int]]()
        for rule in (rule for rule in self.rules if rule.axis == "x" and rule.label):
            wide, x = LETTER * len(rule.label) + 8, self.width * (0.15 + 0.8 * self.x.at(rule.at))
            anchor = "end" if x + wide > self.width else "start"
            low = x - wide if anchor == "end" else x
            row = next((i for i, end in enumerate(ends) if end < low), len(ends))
            ends[row : row + 1] = [low + wide]
            places.append((anchor, row))
        return places

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The pixels of a point, at most a little outside the axes."""
        x0, y0, x1, y1 = self.box
        across, up = (min(max(axis.at(v), -0.02), 1.02) for axis, v in ((self.x, x), (self.y, y)))
        return round(x0 + across * (x1 - x0), 1), round(y1 - up * (y1 - y0), 1)

    def labels(self) -> dict[int, tuple[float, float, str]]:
        """Number of a mark => where its label goes: x, y and anchor, in the nearest place that covers no other and few marks."""
        dots = [self.place(m.x, m.y) for m in self.marks]
        taken, places = list[Box](), dict[int, tuple[float, float, str]]()
        for i, mark in enumerate(self.marks):
            if mark.label and mark.shown:
                wide = LETTER * len(mark.label)
                boxes = [(_box(*spot, wide), spot) for spot in _around(*dots[i])]
                costs = [self._covered(box, taken, dots) + 0.3 * k + (k > 1) for k, (box, _) in enumerate(boxes)]
                box, places[i] = boxes[costs.index(min(costs))]
                taken.append(box)
        return places

    def _covered(self, box: Box, taken: Sequence[Box], dots: Sequence[tuple[float, float]]) -> float:
        """How bad a label at `box` is: other labels count most, then the frame, then marks."""
        x0, y0, x1, y1 = box
        left, top, right, bottom = self.box
        overlaps = sum(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in taken)
        outside = x0 < left - 4 or x1 > right + RIGHT or y0 < top - 4 or y1 > bottom
        under = (m for m, (x, y) in zip(self.marks, dots, strict=True) if m.shown and x0 - 5 < x < x1 + 5 and y0 - 4 < y < y1 + 4)
        return 100 * overlaps + 50 * outside + sum(0.4 if m.shape == "small" else 2.0 for m in under)

    def _key_rows(self) -> list[list[tuple[str, str]]]:
        rows, wide = list[list[tuple[str, str]]](), math.inf
        for look, text in self.keys.items():
            if wide + 24 + LETTER * len(text) > self.width - 20:
                rows.append([])
                wide = 0.0
            rows[-1].append((look, text))
            wide += 24 + LETTER * len(text)
        return rows

    def page_svg(self) -> str:
        """The chart in a page that has plot.css."""
        label = " ".join(filter(None, (self.title, self.alt, "Arrow keys move between points." if self.marks or self.bars else "")))
        size = {
            "viewBox": f"0 0 {self.width:g} {self.height:g}",
            "style": f"min-width: {min(0.8 * self.width, self.width - 60):g}px; max-width: {1.25 * self.width:g}px",
        }
        root = Element("svg", {"class": "p", "role": "group", "aria-label": sound(label.replace("`", "")), **size})
        root.append(self.drawn())
        return tostring(root, encoding="unicode")

    def drawn(self) -> Element:
        """Everything, in a group."""
        group = Element("g")
        write(group, 8, 14, self.title, "heading")
        for row, keys in enumerate(self._key_rows()):
            x = 8.0
            for look, text in keys:
                _shape(add(group, "g", class_=look), look.split()[-1], x + 5, 30 + LINE * row)
                write(group, x + 14, 30 + LINE * row, text, "small")
                x += 24 + LETTER * len(text)
        self._axes(group)
        self._rules(group)
        for bar in self.bars:
            self._bar(group, bar)
        for line in self.lines:
            add(group, "path", class_=f"line {line.look}", d=self._path(line))
        for name, y, look in self._ends():
            write(group, self.box[2] + 6, y, _short(name), f"label {look}")
        labels = self.labels()
        for i, mark in enumerate(self.marks):
            self._mark(group, mark, labels.get(i))
        return group

    def _axes(self, group: Element) -> None:
        x0, y0, x1, y1 = self.box
        ticks = add(group, "g", class_="ticks")
        for share, text in self.x.ticks():
            x = round(x0 + share * (x1 - x0), 1)
            add(ticks, "line", x1=x, x2=x, y1=y0, y2=y1)
            write(ticks, x, y1 + 10, text, anchor="middle")
        for share, text in self.y.ticks():
            y = round(y1 - share * (y1 - y0), 1)
            if not self.y.rows:
                add(ticks, "line", x1=x0, x2=x1, y1=y, y2=y)
            write(ticks, x0 - 5, y, _short(text), anchor="end")
        write(group, (x0 + x1) / 2, self.height - 10, self.x.title, "axis x", "middle")
        if self.y.title:
            write(group, 8, 30 + LINE * len(self._key_rows()), self.y.title, "axis y")

    def _rules(self, group: Element) -> None:
        x0, y0, x1, y1 = self.box
        ruled = add(group, "g", class_="rules")
        over = iter(self.over())
        for rule in self.rules:
            x, y = self.place(rule.at, rule.at)
            if rule.band:
                (xa, ya), (xb, yb) = (self.place(end, end) for end in rule.band)
                area = (xa, y0, xb - xa, y1 - y0) if rule.axis == "x" else (x0, yb, x1 - x0, ya - yb)
                add(
                    ruled,
                    "rect",
                    class_="band",
                    **dict(zip(("x", "y", "width", "height"), (round(v, 1) for v in area), strict=True)),
                )
            anchor, row = next(over) if rule.axis == "x" and rule.label else ("end", -1)
            top = y0 - LINE * (row + 1)
            ends = {"x1": x, "x2": x, "y1": top, "y2": y1} if rule.axis == "x" else {"x1": x0, "x2": x1, "y1": y, "y2": y}
            add(ruled, "line", class_=rule.look, **ends)
            if rule.label:
                at = (x + (4 if anchor == "start" else -4), top + 6) if rule.axis == "x" else (x1 - 3, y - 7)
                write(ruled, *at, rule.label, "small", anchor)

    def _bar(self, group: Element, bar: Bar) -> None:
        x0, y0, _, y1 = self.box
        middle, high = self.place(self.x.low, bar.row)[1], 0.72 * (y1 - y0) / max(len(self.y.rows), 1)
        shown = add(group, "g", class_="mark", role="img", tabindex="-1")
        add(shown, "title", bar.text)
        if bar.value is None:
            write(shown, x0 + 4, middle, "not measured", "small")
            return
        end = self.place(bar.value, bar.row)[0]
        add(
            shown,
            "rect",
            x=min(x0, end),
            y=round(middle - high / 2, 1),
            width=round(abs(end - x0), 1),
            height=round(high, 1),
            fill=bar.colour,
        )
        if bar.band:
            low, top = (self.place(v, bar.row)[0] for v in bar.band)
            add(shown, "line", class_="interval", x1=low, x2=top, y1=middle, y2=middle)

    def _path(self, line: Line) -> str:
        points = [self.place(*point) for point in line.points]
        if line.step:
            points = [p for a, b in zip(points, [*points[1:], points[-1]], strict=True) for p in (a, (b[0], a[1]))]
        return "M" + " L".join(f"{x:g} {y:g}" for x, y in points)

    def _ends(self) -> Iterator[tuple[str, float, str]]:
        """Names of curves at their ends, from the top down, none over another."""
        ends = sorted((self.place(*line.points[-1])[1], line.label, line.look) for line in self.lines if line.label)
        floor, room = self.box[1] - LINE, self.box[3]
        for i, (y, name, look) in enumerate(ends):
            floor = min(max(y, floor + LINE), room - LINE * (len(ends) - 1 - i))
            yield name, floor, look

    def _mark(self, group: Element, mark: Mark, label: tuple[float, float, str] | None) -> None:
        x, y = self.place(mark.x, mark.y)
        state = ({"data_name": mark.name} if mark.name else {}) | ({} if mark.shown else {"hidden": ""})
        shown = add(group, "g", class_=f"mark {mark.look}", role="img", tabindex="-1", **state)
        add(shown, "title", mark.text)
        low, high = mark.band or (mark.y, mark.y)
        add(shown, "line", class_="interval", x1=x, x2=x, y1=self.place(mark.x, low)[1], y2=self.place(mark.x, high)[1])
        if mark.x_band:
            ends = [self.place(end, mark.y)[0] for end in mark.x_band]
            add(shown, "line", class_="interval", x1=ends[0], x2=ends[1], y1=y, y2=y)
        _shape(shown, mark.shape, x, y)
        if mark.label:
            x, y, anchor = label or (x, y, "start")
            write(shown, x, y, mark.label, "label", anchor)


def _short(name: str) -> str:
    half = MANY_NAMES // 2
    return name if len(name) <= MANY_NAMES else f"{name[:half]}…{name[1 - half :]}"


def _around(x: float, y: float) -> list[tuple[float, float, str]]:
    """Places for a label, the best first."""
    rows = (0, -LINE, LINE, -2 * LINE, 2 * LINE)
    return [(x + side * 8, y + row, "start" if side > 0 else "end") for row in rows for side in (1, -1)]


def _box(x: float, y: float, anchor: str, wide: float) -> Box:
    left = x if anchor == "start" else x - wide
    return left, y - LINE / 2, left + wide, y + LINE / 2


OUTLINES = {
    "dot": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "small": "M-2 0a2 2 0 1 0 4 0a2 2 0 1 0 -4 0z",
    "square": "M-4 -4h8v8h-8z",
    "diamond": "M0 -6L6 0L0 6L-6 0z",
    "triangle": "M0 -5.5L5.5 4.5H-5.5z",
    "star": "M0 -8L2.1 -2.6L7.6 -2.5L3.3 1.1L4.7 6.5L0 3.4L-4.7 6.5L-3.3 1.1L-7.6 -2.5L-2.1 -2.6z",
}


def _shape(parent: Element, shape: str, x: float, y: float) -> None:
    add(parent, "path", class_="shape", d=OUTLINES.get(shape, OUTLINES["dot"]), transform=f"translate({x:g} {y:g})")


@dataclass(frozen=True)
class Sheet:
    """Charts that belong together under a heading; as a file they stand side by side."""

    heading: str
    note: str
    plots: Sequence[Plot]

    def file(self, columns: int = 3) -> Svg:
        """One SVG that needs nothing else."""
        content, y = Element("g"), 56.0
        write(content, 12, 20, self.heading, "title")
        write(content, 12, 40, self.note, "small")
        width = max(400.0, LETTER * len(self.note) + 24)
        for row in (self.plots[i : i + columns] for i in range(0, len(self.plots), columns)):
            x = 0.0
            for plot in row:
                shown = plot.drawn()
                shown.set("transform", f"translate({x:g} {y:g})")
                content.append(shown)
                x += plot.width
            width, y = max(width, x), y + max(plot.height for plot in row) + 8
        return file("p", self.heading, width, y, content)
