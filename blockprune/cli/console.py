"""The tables that the commands print for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockprune.cost.table import Component
from blockprune.measures.measure import MEASURES
from blockprune.model.architecture import Cost
from blockprune.progress import make_console as make_console
from blockprune.reports import ScanView, ranking
from blockprune.reports.captions import caption_title, warning
from blockprune.reports.dossier import ModelView
from blockprune.reports.search_text import against, in_answer
from blockprune.reports.search_view import SearchView
from blockprune.reports.text import agreement, correlation_text, count, number, scan_step_time, step_time, with_interval
from blockprune.runs.records import Candidate


def print_ranking(view: ScanView, console: Console) -> None:
    """Prints every architecture from the least to the most quality lost, with intervals where the width allows them."""
    rows = ranking(view)
    measures = [m for m in view.measures if MEASURES[m].of_quality]
    heads = [f"{m} {'↓' if MEASURES[m].direction == 'down' else '↑'}" for m in measures]
    heads += ["params saved", "MACs saved", "latency, x teacher"]
    wide = console.width >= 60 + 28 * len(measures)
    shown = _shown(len(heads), len(measures), console.width)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("removed", overflow="fold")
    for i in shown:
        table.add_column(heads[i], justify="right", no_wrap=True)
    for row in rows:
        label, cells = _label(row), _cells(row, measures, view, wide)
        table.add_row(*label, *(cells[i] for i in shown), style="bold" if row["rank"] == 0 else "red" if row["error"] else "")
    console.print(table)
    if len(shown) < len(heads):
        left_out = ", ".join(head for i, head in enumerate(heads) if i not in shown)
        console.print(Text(f"left out at {console.width} columns, all in scan.csv: {left_out}"))
    for row in rows:
        if row["error"]:
            console.print(Text(f"{row['label']}: {row['error']}", style="red"))
    if {"eps_mse", "fid"} <= set(measures):
        for line in (correlation_text(view), agreement(view)):
            console.print(Text(line.replace("`", "")), end="\n" if line else "")


def _shown(n: int, n_measures: int, width: int) -> list[int]:
    """Which of the columns a terminal has room for beside the names: the first measure, parameters saved, then from the left."""
    first = [0, n_measures, n - 1] if n_measures else list(range(n))
    order = [*first, *(i for i in range(n) if i not in first)]
    return sorted(order[: max(2, (width - 36) // 16)])


def _label(row: Mapping[str, Any]) -> list[Text]:
    return [Text("-" if row["rank"] is None else str(row["rank"])), Text(row["label"])]


def _cells(row: Mapping[str, Any], measures: list[str], view: ScanView, wide: bool) -> list[Text]:
    total = view.graph.total
    cells = [with_interval(row[m], row[f"{m}_low"], row[f"{m}_high"]) if wide else number(row[m]) for m in measures]
    cells += [_saved(row["params_saved"], total.params), _saved(row["macs_saved_thop"], total.thop)]
    ratio = scan_step_time(view, row["label"])
    return [Text(c) for c in [*cells, ratio if wide else ratio.partition(" [")[0]]]


def _saved(saved: int, total: int) -> str:
    return f"{count(saved)} {100 * saved / total:4.1f}%" if saved else "-"


def print_evaluation(view: ModelView, console: Console) -> None:
    """Prints every setting with its scores and intervals, then the component table where there is one."""
    there = list(dict.fromkeys(m for setting in view.settings for m in view.scores.get(setting.label, {})))
    for measures in ([m for m in there if MEASURES[m].of_quality], [m for m in there if not MEASURES[m].of_quality]):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column(view.label, no_wrap=True)
        for m in measures:
            table.add_column(MEASURES[m].heading, justify="right")
        for setting in view.settings:
            scores = [view.scores.get(setting.label, {}).get(m) for m in measures]
            cells = [with_interval(s.value, s.low, s.high) if s else "-" for s in scores]
            table.add_row(*(Text(c) for c in [setting.label, *cells]))
        console.print(table)
    for setting in view.settings:
        if errors := {s.error for s in view.scores.get(setting.label, {}).values() if s.error}:
            console.print(Text(f"{setting.label}: {', '.join(sorted(errors))}", style="red"), soft_wrap=True)
    protocol = view.protocol
    detail = f"n = {protocol['n_images']:,} images; in brackets 95 % bootstrap intervals; "
    console.print(Text(f"{detail}protocol {protocol['name']} {protocol['hash']}"), soft_wrap=True)
    if view.components:
        print_components(view.components, console)


def print_components(rows: Sequence[Component], console: Console, convention: str = "thop") -> None:
    """Prints parameters, MACs and latency of each part, the models side by side."""
    whos = list(dict.fromkeys(row.who for row in rows))
    timed = any(row.latency_s is not None for row in rows)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    for what in ("params", f"MACs ({convention})", *(["ms"] if timed else [])):
        for who in whos:
            table.add_column(f"{what}: {who}", justify="right")
    by = {(row.name, row.who): row for row in rows}
    for name in dict.fromkeys(row.name for row in rows):
        if name == "whole":
            table.add_section()
        line = [by[name, who] for who in whos]
        cells = [f"{row.params:,}" for row in line] + [f"{row.macs[convention]:,}" for row in line]
        if timed:
            cells += ["-" if row.latency_s is None else f"{1000 * row.latency_s:.4g}" for row in line]
        table.add_row(name, *cells)
    console.print(table)
    console.print("one image, no doubling for guidance; 1 MAC = one multiply-add", soft_wrap=True)


def print_finalists(view: SearchView, console: Console) -> None:
    """Prints what must be known first, then the finalists, the winner or the front first, and what became of the known designs."""
    if line := warning(view):
        console.print(Text(line, style="bold yellow"), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    captions = [caption_title(view)] if view.caption(None) else []
    last = "on the front" if view.is_front else "within budget"
    objective = f"{view.measure}, fresh seeds"
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("architecture", no_wrap=True)
    for name in (objective, *captions, "parameters", "MACs (thop)", "latency, x teacher", last):
        table.add_column(name, justify="right", overflow="fold")
    total = view.graph.total
    if (teacher := view.caption(None)) is not None:
        table.add_row("-", "teacher", "-", with_interval(teacher.value, teacher.low, teacher.high), "100.0%", "100.0%", "-", "-")
    for rank, e in enumerate(view.order, 1):
        cost, ratio = view.cost(e), view.latency_ratio(e)
        cells = [str(rank), e.score.label, with_interval(e.score.value, e.score.low, e.score.high)]
        caption = view.caption(e)
        cells += [with_interval(caption.value, caption.low, caption.high) if caption else "-" for _ in captions]
        cells += [f"{cost.params / total.params:.1%}", f"{cost.thop / total.thop:.1%}", step_time(None, ratio)]
        bold = "bold" if e in view.chosen else ""
        table.add_row(*(Text(c) for c in [*cells, "yes" if in_answer(view, e) else "no"]), style=bold)
    console.print(table)
    for line in against(view):
        console.print(Text(line.replace("`", "")), soft_wrap=True)


def print_solutions(solutions: Sequence[tuple[Candidate, float]], measure: str, total: Cost, console: Console) -> None:
    """Prints the exact solutions on known scores, best first, with the sums that predict what they lose."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("#", "parameters", "MACs (thop)", f"sum of {measure}", "removed"):
        table.add_column(name, justify="left" if name == "removed" else "right", overflow="fold")
    for rank, (c, predicted) in enumerate(solutions, 1):
        shares = (f"{c.costs['params'] / total.params:.1%}", f"{c.costs['macs_thop'] / total.thop:.1%}")
        table.add_row(str(rank), *shares, number(predicted), Text(", ".join(c.arch.terms)))
    console.print(table)
    console.print("sums of single removals are predictions: score a solution with `blockprune scan --arch`", soft_wrap=True)
