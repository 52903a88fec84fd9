"""What the commands print for people: tables, and what must be known beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from blockprune.cost.table import Component
from blockprune.cost.work import Passes
from blockprune.measures.measure import MEASURES
from blockprune.model.graph import Cost
from blockprune.progress import FILES, Bars, Listener, Silent, duration
from blockprune.progress import make_console as make_console
from blockprune.reports.captions import warning
from blockprune.reports.model_view import ModelView
from blockprune.reports.search_text import against, finalists_table
from blockprune.reports.search_view import SearchView
from blockprune.reports.table import Cell, Column, Table, share_of
from blockprune.reports.text import agreement, correlation_text, ranking_table
from blockprune.reports.view import ScanView, places_of
from blockprune.runs.parts import paired_label
from blockprune.runs.records import Candidate

if TYPE_CHECKING:
    from blockprune.cost.estimate import Estimate


@contextmanager
def progress(n_files: int, silent: bool = False) -> Iterator[Listener]:
    """Progress over a stage and the files, at most so many, that are written when it has ended."""
    with Silent() if silent else Bars() as bars:
        bars.plan({FILES: n_files}, FILES)
        yield bars


def print_table(table: Table, console: Console, style_of: Callable[[int], str] = lambda row: "") -> None:
    """Prints the columns that the terminal has room for, intervals and remarks where it has room for all of them.

    What columns of notes say comes below, a line each.
    """
    whole = [i for i, column in enumerate(table.columns) if column.kind != "note"]
    wide = sum(_width(table, i, table.rows, console.width) for i in whole) <= console.width
    rows = table.rows if wide else [[replace(cell, interval=None, remark="") for cell in row] for row in table.rows]
    shown = whole if wide else _that_fit(whole, [_width(table, i, rows, console.width) for i in whole], table, console.width)
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i in shown:
        numeric = table.columns[i].numeric
        grid.add_column(table.columns[i].title, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for k, row in enumerate(rows):
        grid.add_row(*(Text(table.columns[i].line(row[i])) for i in shown), style=style_of(k))
    console.print(grid)
    if left_out := [table.columns[i].title for i in whole if i not in shown]:
        console.print(Text(f"no room at {console.width} columns for: {', '.join(left_out)}"))
    name = next(i for i, column in enumerate(table.columns) if not column.numeric)
    for row in table.rows:
        for column, cell in zip(table.columns, row, strict=True):
            if column.kind == "note" and cell.value is not None:
                console.print(Text(f"{row[name].value}: {cell.value}", style="red"))


def _width(table: Table, i: int, rows: Sequence[Sequence[Cell]], room: int) -> int:
    """The characters that a column takes with the gap beside it; names that are longer than half the room are folded."""
    column = table.columns[i]
    width = 3 + max([len(column.title), *(len(column.line(row[i])) for row in rows)])
    return width if column.numeric else min(width, room // 2)


def _that_fit(columns: Sequence[int], widths: Sequence[int], table: Table, room: int) -> list[int]:
    """The columns of names, and of the others as many as fit, from the left, but at least one."""
    names = [i for i in columns if not table.columns[i].numeric]
    left = room - sum(width for i, width in zip(columns, widths, strict=True) if i in names)
    shown = list[int]()
    for i, width in zip(columns, widths, strict=True):
        if i not in names and (width <= left or not shown):
            shown.append(i)
            left -= width
    return [i for i in columns if i in names or i in shown]


def print_ranking(view: ScanView, console: Console) -> None:
    """Prints every architecture from the least to the most quality lost."""
    errors = [view.error(label) for _, label in places_of(view)]
    print_table(ranking_table(view), console, lambda row: "bold" if row == 0 else "red" if errors[row] else "")
    if {"eps_mse", "fid"} <= set(view.measures):
        for line in (correlation_text(view), agreement(view)):
            console.print(Text(line.replace("`", "")), end="\n" if line else "")


def print_evaluation(view: ModelView, console: Console) -> None:
    """Prints every setting with its scores and intervals, above it those of the teacher's images that its own are paired with; then
    what tells settings apart besides, and the component table where there is one."""
    scores = [view.scores.get(setting.label, {}) for setting in view.settings]
    there = list(dict.fromkeys(m for by in scores for m in by))
    quality = [m for m in there if MEASURES[m].of_quality]
    others = [m for m in there if m not in quality and (len(scores) == 1 or len({view.value(s, m) for s in view.settings}) > 1)]
    for measures in filter(None, (quality, others)):
        columns = [Column(view.label, "text"), *(Column(MEASURES[m].heading) for m in measures)]
        rows = [[Cell(s.label), *(Cell.of(by.get(m)) for m in measures)] for s, by in zip(view.settings, scores, strict=True)]
        print_table(Table("", columns, [*_teacher_rows(view, measures), *rows]), console)
    for setting in view.settings:
        if errors := {s.error for s in view.scores.get(setting.label, {}).values() if s.error}:
            console.print(Text(f"{setting.label}: {', '.join(sorted(errors))}", style="red"), soft_wrap=True)
    protocol = view.protocol
    detail = f"n = {protocol['n_images']:,} images; in brackets 95 % bootstrap intervals; "
    console.print(Text(f"{detail}protocol {protocol['name']} {protocol['hash']}"), soft_wrap=True)
    if view.components:
        print_components(view.components, console)


def _teacher_rows(view: ModelView, measures: Sequence[str]) -> list[list[Cell]]:
    """The teacher's numbers, without intervals of their own, a row for each way in which it drew that is a setting here."""
    plain = [s for s in view.settings if not s.quantize and s.checkpoint is None]
    values = {paired_label(s.label): [view.teacher_value(s, m) for m in measures] for s in plain}
    return [[Cell(label), *map(Cell, row)] for label, row in values.items() if any(value is not None for value in row)]


def print_components(rows: Sequence[Component], console: Console, convention: str = "thop") -> None:
    """Prints parameters and MACs of each part, the models side by side with their share of the teacher's; latencies, where there
    are any, as paired ratios."""
    by = {(row.name, row.who): row for row in rows}
    names, (full, *students) = (list(dict.fromkeys(keys)) for keys in zip(*by, strict=True))

    def side_by_side(title: str, value: Callable[[Component], int]) -> None:
        columns = [(Column(title, "text"), [Cell(name) for name in names])]
        for who in (full, *students):
            pairs = [(value(by[name, who]), value(by[name, full])) for name in names]
            cells = [Cell(part, remark=f"{part / whole:.0%}" if who != full and whole else "") for part, whole in pairs]
            columns.append((Column(who, "quantity"), cells))
        print_table(Table.of_columns("", columns), console)

    side_by_side("parameters", lambda row: row.params)
    side_by_side(f"MACs ({convention})", lambda row: row.macs[convention])
    if by[names[0], full].latency_s is not None:
        columns = [(Column("latency, × teacher", "text"), [Cell(name) for name in names])]
        columns += [(Column(f"{full}, ms", "size", 1e-3), [Cell(by[name, full].latency_s) for name in names])]
        columns += [(Column(who, "ratio"), [Cell(by[n, who].ratio, by[n, who].interval) for n in names]) for who in students]
        print_table(Table.of_columns("", columns), console)
        console.print("latency: the median of ratios of rounds in which all took turns, and its 95 % interval", soft_wrap=True)
    console.print("one image, no doubling for guidance; 1 MAC = one multiply-add", soft_wrap=True)


def print_finalists(view: SearchView, console: Console) -> None:
    """Prints what must be known first, then the finalists, the winner or the front first, and what became of the known designs."""
    if line := warning(view):
        console.print(Text(line, style="bold yellow"), soft_wrap=True)
    bold = ["", *("bold" if e in view.chosen else "" for e in view.order)]
    print_table(finalists_table(view, ["clip_score"]), console, lambda row: bold[row])
    for line in against(view):
        console.print(Text(line.replace("`", "")), soft_wrap=True)


def print_solutions(solutions: Sequence[tuple[Candidate, float]], measure: str, total: Cost, console: Console) -> None:
    """Prints the exact solutions on known scores, best first, with the sums that predict what they lose."""
    numbers = [
        Column("#", "plain"),
        Column(f"predicted {measure}"),
        Column("U-Net parameters", "share"),
        Column("MACs (thop)", "share"),
    ]
    rows = [
        [
            Cell(rank),
            Cell(predicted),
            share_of(c.costs["params"], total.params),
            share_of(c.costs["macs_thop"], total.thop),
            Cell(", ".join(c.arch.terms)),
        ]
        for rank, (c, predicted) in enumerate(solutions, 1)
    ]
    print_table(Table("", [*numbers, Column("removed", "text")], rows), console)
    console.print("sums of single removals are predictions: score a solution with `blockprune scan --arch`", soft_wrap=True)


def print_estimate(estimate: Estimate, console: Console) -> None:
    """Prints what a run will do: its passes step by step, with their time, then all of it in one line."""
    rows: dict[str, list[Passes]] = {step: [] for step in estimate.seconds}
    for passes in estimate.work.passes:
        rows[passes.step].append(passes)
    columns = [
        (Column("step", "text"), [Cell(step) for step in rows]),
        (Column("passes", "plain"), [Cell(sum(p.n for p in of_step) or None) for of_step in rows.values()]),
        (Column("rows of each", "plain"), [Cell(max((p.rows for p in of_step), default=None)) for of_step in rows.values()]),
        (Column("time", "text"), [Cell(duration(seconds)) for seconds in estimate.seconds.values()]),
    ]
    print_table(Table.of_columns("", columns), console)
    console.print(Text(f"nothing was run or written; {estimate.line}"), soft_wrap=True)
    console.print(Text("not counted: loading, judges, statistics, data on its way from the disk"), soft_wrap=True)
