"""A table as a value, how its numbers read, and what writes it: Markdown, LaTeX; flat rows as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from blockprune.measures.score import Score
from blockprune.reports.view import short

Kind = Literal["text", "code", "block", "note", "score", "plain", "count", "size", "quantity", "share", "percent", "ratio"]


def number(value: float | None) -> str:
    """Three significant digits, two where the number needs an exponent; "-" for None."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    return f"{value:#.3g}".rstrip(".") if size >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def brief(value: float) -> str:
    """At most six characters where the size allows it: two significant digits."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.2g}" if abs(value) < 100 else number(value)


def count(value: int) -> str:
    """A count with an SI suffix: 859520964 => "860 M"."""
    for size, suffix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {suffix}"
    return str(value)


def quantity(value: int) -> str:
    """A count in four digits with an SI suffix: 859520964 => "859.5 M"; one below 10,000 as it is."""
    if abs(value) < 10_000:
        return f"{value:,}"
    suffix, size = next(((s, n) for s, n in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if abs(value) >= 0.99995 * n), ("k", 1e3))
    return f"{value / size:#,.4g}".rstrip(".") + f" {suffix}"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def prefix_of(values: Iterable[float]) -> tuple[str, float]:
    """The SI prefix and size in which counts read best side by side."""
    most = max(values, default=0)
    return next(((prefix, size) for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if most >= size), ("", 1.0))


def _four_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")


# how values of a kind read; a block is shown by its short name where there is room for the full one beside it
FORMATS: Mapping[Kind, Callable[[Any], str]] = {
    **dict.fromkeys(("text", "code", "note"), str),
    "block": short,
    "score": number,
    "plain": lambda value: f"{value:,}",
    "count": count,
    "quantity": quantity,
    "size": _four_digits,
    "share": lambda value: f"{value:.1%}",
    "percent": lambda value: f"{value:.0%}",
    "ratio": lambda value: f"{value:.3f}",
}


@dataclass(frozen=True)
class Cell:
    """A value, None where it is not known, with its 95 % interval or a remark beside it; `best` stands out."""

    value: Any = None
    interval: tuple[float, float] | None = None
    remark: str = ""
    best: bool = False

    @classmethod
    def of(cls, score: Score | None, best: bool = False) -> Cell:
        """The number of a score; without one where it was not measured, failed, or is not finite."""
        return cls() if score is None or score.finite is None else cls(score.finite, score.interval, best=best)


@dataclass(frozen=True)
class Column:
    """A heading and how the values under it read; `unit` is what these are divided by."""

    title: str
    kind: Kind = "score"
    unit: float = 1.0

    @property
    def numeric(self) -> bool:
        return self.kind not in ("text", "code", "block", "note")

    def text(self, cell: Cell) -> str:
        """The value; "-" for a number that is not known."""
        if cell.value is None:
            return "-" if self.numeric else ""
        return self._format(cell.value)

    def beside(self, cell: Cell) -> str:
        """What stands smaller beside or under the value."""
        if cell.interval:
            return f"[{', '.join(map(self._format, cell.interval))}]"
        return str(cell.value) if self.kind == "block" and self.text(cell) != cell.value else cell.remark

    def line(self, cell: Cell) -> str:
        """The value with what stands beside it, for a terminal or a line of Markdown."""
        if self.kind == "block":
            return str(cell.value)
        beside = self.beside(cell) if cell.interval or not cell.remark else f"({cell.remark})"
        return f"{self.text(cell)} {beside}".strip()

    def _format(self, value: Any) -> str:
        return FORMATS[self.kind](value if self.unit == 1 else value / self.unit)


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; `note` stands below."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    kind: str = field(default="table", init=False)

    @classmethod
    def of_columns(cls, title: str, columns: Sequence[tuple[Column, Sequence[Cell]]], note: str = "") -> Table:
        """The table of columns with their cells, but for those in which nothing is known."""
        known = [(column, cells) for column, cells in columns if any(cell.value is not None for cell in cells)]
        return cls(title, [column for column, _ in known], list(zip(*(cells for _, cells in known), strict=True)), note)

    @property
    def marks(self) -> str:
        """What brackets and shading mean, where there are any."""
        cells = [cell for row in self.rows for cell in row]
        meanings = {
            "In brackets: 95 % intervals.": any(c.interval for c in cells),
            "Shaded: the best student.": any(c.best for c in cells),
        }
        return " ".join(text for text, there in meanings.items() if there)

    def paired(self) -> Iterator[list[tuple[Column, Cell]]]:
        """Each row, its cells with their columns."""
        return (list(zip(self.columns, row, strict=True)) for row in self.rows)


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Names and what they are."""
    return Table(
        "",
        [Column("", "text"), Column("", "text")],
        [[Cell(name), Cell("-" if value is None else value)] for name, value in facts.items()],
    )


STEP_LATENCY = Column("step latency, × teacher", "ratio")


def step_latency(seconds: float | None, ratio: float | None, interval: tuple[float, float] | None = None) -> Cell:
    """What a U-Net step takes: the teacher is 1, with its milliseconds; all else the ratio to a teacher timed in turn with it."""
    if ratio is not None:
        return Cell(ratio, interval)
    return Cell() if seconds is None else Cell(1.0, remark=f"{1000 * seconds:.3g} ms")


def share_of(part: float | None, whole: float | None, remark: str = "") -> Cell:
    """A share of something; without a value for nothing of it."""
    return Cell(part / whole, remark=remark) if part and whole else Cell()


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Flat rows, a line each; the entries of lists separated by spaces, what is missing left empty. "" without a row."""
    if not rows:
        return ""
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: " ".join(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows)
    return out.getvalue()


def escaped(value: object) -> str:
    """`value` on one line, with everything that Markdown or HTML would interpret made harmless."""
    if isinstance(value, Mapping):
        return ", ".join(f"{escaped(k)}: {escaped(v)}" for k, v in value.items())
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(escaped, value))
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|!~$])", r"\\\1", line)


def to_markdown(table: Table) -> str:
    """The table with its note, without its title."""
    lines = [[c.title for c in table.columns], ["---"] * len(table.columns)]
    lines += [[_in_markdown(column, cell) for column, cell in row] for row in table.paired()]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\n{table.note}" if table.note else text


def _in_markdown(column: Column, cell: Cell) -> str:
    if column.kind in ("code", "block"):
        return f"`{column.line(cell).replace('`', ' ').replace('|', ' ')}`"
    if column.kind in ("text", "note"):
        return "" if cell.value is None else escaped(cell.value)
    return column.line(replace(cell, remark=escaped(cell.remark) if cell.remark else ""))


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "×": r"$\times$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def latex(text: object) -> str:
    """`text` on one line, with everything that LaTeX would interpret made harmless."""
    return "".join(LATEX.get(c, c) for c in " ".join(str(text).split()))


def to_latex(table: Table, label: str) -> str:
    """The values in a booktabs table under its title; intervals, remarks and columns of notes are left out."""
    columns = [c for c in table.columns if c.kind != "note"]
    rows = [[c.text(cell) for c, cell in row if c.kind != "note"] for row in table.paired()]
    lines = [f"{' & '.join(map(latex, cells))} \\\\" for cells in ([c.title for c in columns], *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    head = [r"  \centering", f"  \\caption{{{latex(f'{table.title}. {table.note}')}}}", f"  \\label{{{label}}}"]
    tabular = f"  \\begin{{tabular}}{{{''.join('r' if c.numeric else 'l' for c in columns)}}}"
    inner = [f"    {line}" for line in body]
    return "\n".join([r"\begin{table}[t]", *head, tabular, *inner, r"  \end{tabular}", r"\end{table}"])
