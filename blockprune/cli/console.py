"""What the commands print for people: a ranked table, and progress that is bars on a terminal and plain lines elsewhere."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from blockprune.model.architecture import Cost
from blockprune.reports import ScanView, ranking
from blockprune.reports.captions import caption_title, warning
from blockprune.reports.search_text import against, in_answer
from blockprune.reports.search_view import SearchView
from blockprune.reports.text import agreement, correlation_text, count, number, scan_step_time, step_time, with_interval
from blockprune.reports.view import QUALITY
from blockprune.runs.records import MEASURES, Candidate, Evaluation

NOT_A_TERMINAL_WIDTH = 160


class PlainConsole(Console):
    """Rich's console, where a reader that stops early is an error like any other instead of a silent end."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def make_console(stderr: bool = False) -> Console:
    """A console that guesses no markup or colours in what it prints, keeps NO_COLOR, and does not fold tables in a pipe."""
    console = PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = NOT_A_TERMINAL_WIDTH
    return console


def print_ranking(view: ScanView, console: Console) -> None:
    """Prints every architecture from the least to the most quality lost, with intervals where the width allows them."""
    rows = ranking(view)
    measures = [m for m in view.measures if m in QUALITY]
    wide = console.width >= 60 + 28 * len(measures)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("removed", overflow="fold")
    for m in measures:
        table.add_column(f"{m} {'↓' if MEASURES[m].direction == 'down' else '↑'}", justify="right", no_wrap=True)
    for name in ("params saved", "MACs saved", "latency, x teacher"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, measures, view, wide), style="bold" if row["rank"] == 0 else "red" if row["error"] else "")
    console.print(table)
    for row in rows:
        if row["error"]:
            console.print(Text(f"{row['label']}: {row['error']}", style="red"))
    if {"eps_mse", "fid"} <= set(measures):
        for line in (correlation_text(view), agreement(view)):
            console.print(Text(line.replace("`", "")), end="\n" if line else "")


def _cells(row: Mapping[str, Any], measures: list[str], view: ScanView, wide: bool) -> list[Text]:
    total = view.graph.total
    cells = ["-" if row["rank"] is None else str(row["rank"]), row["label"]]
    cells += [with_interval(row[m], row[f"{m}_low"], row[f"{m}_high"]) if wide else number(row[m]) for m in measures]
    cells += [_saved(row["params_saved"], total.params), _saved(row["macs_saved_thop"], total.thop)]
    return [Text(c) for c in [*cells, scan_step_time(view, row["label"])]]


def _saved(saved: int, total: int) -> str:
    return f"{count(saved)} {100 * saved / total:4.1f}%" if saved else "-"


def print_evaluation(view: Mapping[str, Any], console: Console) -> None:
    """Prints every setting with its scores and intervals, then the component table where there is one."""
    protocol = view["protocol"]
    there = list(dict.fromkeys(m for setting in view["settings"] for m in setting["scores"]))
    for measures in ([m for m in there if m in QUALITY], [m for m in there if m not in QUALITY]):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column(view["label"], no_wrap=True)
        for m in measures:
            table.add_column(f"{m} {'↓' if MEASURES[m].direction == 'down' else '↑'}", justify="right")
        for setting in view["settings"]:
            scores = [setting["scores"].get(m) for m in measures]
            cells = [with_interval(s["value"], s["low"], s["high"]) if s else "-" for s in scores]
            table.add_row(*(Text(c) for c in [setting["label"], *cells]))
        console.print(table)
    for setting in view["settings"]:
        if errors := {s["error"] for s in setting["scores"].values() if s["error"]}:
            console.print(Text(f"{setting['label']}: {', '.join(sorted(errors))}", style="red"), soft_wrap=True)
    detail = (
        f"n = {protocol['n_images']:,} images; in brackets 95 % bootstrap intervals; protocol {protocol['name']} {protocol['hash']}"
    )
    console.print(Text(detail), soft_wrap=True)
    if view["components"]:
        print_components(view["components"], console)


def print_components(rows: Sequence[Mapping[str, Any]], console: Console, convention: str = "thop") -> None:
    """Prints parameters, MACs and latency of each part, the models side by side.

    A row has name, who, params, macs by convention, and latency_s or None.
    """
    whos = list(dict.fromkeys(row["who"] for row in rows))
    timed = any(row["latency_s"] is not None for row in rows)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    for what in ("params", f"MACs ({convention})", *(["ms"] if timed else [])):
        for who in whos:
            table.add_column(f"{what}: {who}", justify="right")
    by = {(row["name"], row["who"]): row for row in rows}
    for name in dict.fromkeys(row["name"] for row in rows):
        if name == "whole":
            table.add_section()
        cells = [f"{by[name, who]['params']:,}" for who in whos] + [f"{by[name, who]['macs'][convention]:,}" for who in whos]
        if timed:
            seconds = [by[name, who]["latency_s"] for who in whos]
            cells += ["-" if s is None else f"{1000 * s:.4g}" for s in seconds]
        table.add_row(name, *cells)
    console.print(table)
    console.print("one image, no doubling for guidance; 1 MAC = one multiply-add", soft_wrap=True)


class WorkProgress:
    """Progress over named steps of known size, counted in images.

    `steps` maps each step that is still to do to its number of images. On a terminal: one bar for all steps and one for the
    current step, with images/s and the time left. Elsewhere: one plain line for each finished step. `clock` is in seconds.
    """

    def __init__(
        self, console: Console, steps: Mapping[str, int], unit: str = "images", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.steps, self.unit, self.clock = console, dict(steps), unit, clock
        self.done: dict[str, int] = dict.fromkeys(self.steps, 0)
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.start = clock()
        self._current = ""
        self._bars: Progress | None = None

    def __enter__(self) -> WorkProgress:
        self.start = self.clock()
        if self.live:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
                _Rate(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=self.console, transient=True, get_time=self.clock)
            self._all = self._bars.add_task(self._heading(), total=sum(self.steps.values()), unit=self.unit)
            self._now = self._bars.add_task("", total=1, unit=self.unit, visible=False)
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def tick(self, step: str, n: int) -> None:
        """`n` more images of `step` are done; a step that was not announced is added.

        Steps follow one another: one that was left before its end (a failed architecture) counts as ended.
        """
        if self.done.setdefault(step, 0) == 0:
            self._begin(step, n)
        self.done[step] += n
        if self._bars is not None:
            self._bars.update(self._now, advance=n)
            self._bars.update(self._all, advance=n, description=self._heading())
        elif self.done[step] >= self.steps[step]:
            self.console.print(Text(self._line(step)), soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """Prints one line, above the bars where there are any."""
        self.console.print(Text(" ".join(text.split()), style=style), soft_wrap=True)

    def _begin(self, step: str, n: int) -> None:
        if self._current:
            self.steps[self._current] = self.done[self._current]
        self.steps.setdefault(step, n)
        self._current = step
        if self._bars is not None:
            self._bars.reset(self._now, total=self.steps[step], description=f"  {step}", visible=True)
            self._bars.update(self._all, total=sum(self.steps.values()))

    def _finished(self) -> int:
        return sum(self.done.get(step, 0) >= size for step, size in self.steps.items())

    def _heading(self) -> str:
        return f"step {min(self._finished() + 1, len(self.steps))}/{len(self.steps)}"

    def _line(self, step: str) -> str:
        """ "[3/40] mid_block: 64 images, 12.3 images/s, 0:03:20 left"; the rate is over all steps, as the time left is."""
        done, elapsed = sum(self.done.values()), max(self.clock() - self.start, 1e-9)
        left = max(sum(self.steps.values()) - done, 0) * elapsed / done
        rate = f"{self.done[step]} {self.unit}, {done / elapsed:.3g} {self.unit}/s, {_duration(left)} left"
        return f"[{self._finished()}/{len(self.steps)}] {step}: {rate}"


def print_finalists(view: SearchView, console: Console) -> None:
    """Prints what must be known first, then the finalists, the winner or the front first, and what became of the known designs."""
    if line := warning(view):
        console.print(Text(line, style="bold yellow"), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    captions = [caption_title(view)] if view.caption(None) else []
    last = "on the front" if view.is_front else "within budget"
    objective = f"{view.measure}, fresh seeds"
    for name in ("#", "architecture", objective, *captions, "parameters", "MACs (thop)", "latency, x teacher", last):
        table.add_column(name, justify="left" if name == "architecture" else "right", no_wrap=True)
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
        table.add_row(str(rank), *shares, number(predicted), Text(", ".join(c.arch)))
    console.print(table)
    console.print("sums of single removals are predictions: score a solution with `blockprune scan --arch`", soft_wrap=True)


class SearchProgress:
    """Progress of a search: evaluations, best so far, proposals that were known, time left.

    A bar on a terminal; elsewhere a line for each new best, each finalist, and every tenth of the way. `cached` counts the
    proposals that were known already.
    """

    def __init__(self, console: Console, n_trials: int, cached: Callable[[], int]) -> None:
        self.console, self.n_trials, self.cached = console, n_trials, cached
        self.n = self.n_new = 0
        self.best: Evaluation | None = None
        self.start, self.start_time = time.monotonic(), time.time()
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("search", total=n_trials)

    def __enter__(self) -> SearchProgress:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def say(self, text: str, style: str = "") -> None:
        """Prints one line, above the bar where there is one."""
        self.console.print(Text(" ".join(text.split()), style=style), soft_wrap=True)

    def tell(self, kind: str, e: Evaluation) -> None:
        """One more architecture is scored: "search", or "final" on fresh seeds."""
        if kind in ("final", "recovered"):
            self.say(f"{'finalist' if kind == 'final' else 'recovered'} {e.score.label}: {_scored(e)}, n = {e.score.n}")
        if kind != "search":
            return
        self.n, self.n_new = self.n + 1, self.n_new + (e.ended >= self.start_time)
        is_best = e.candidate.fits and e.score.value is not None and (self.best is None or e.loss < self.best.loss)
        if is_best:
            self.best = e
        self.bar.update(self.task, completed=self.n, description=self._best())
        if e.score.error:
            self.say(f"[{self.n}/{self.n_trials}] {e.score.label} failed: {e.score.error}", "red")
        elif is_best or (not self.console.is_terminal and self.n % max(1, self.n_trials // 10) == 0):
            self.say(f"[{self.n}/{self.n_trials}] {self._best()}, {self.cached()} proposals known already, {self._left()}")

    def _best(self) -> str:
        return f"best {self.best.score.label}: {_scored(self.best)}" if self.best else "nothing fits yet"

    def _left(self) -> str:
        each = (time.monotonic() - self.start) / max(1, self.n_new)
        return f"{_duration(max(0, self.n_trials - self.n) * each)} left"


def _scored(e: Evaluation) -> str:
    return f"{e.score.measure} {with_interval(e.score.value, e.score.low, e.score.high)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Rate(TextColumn):
    """Work per second of a task."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")
