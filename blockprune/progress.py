"""How a stage tells of its work: the contract, bars on a terminal or in a notebook, plain lines elsewhere, or nothing."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

NOT_A_TERMINAL_WIDTH = 220
FILES = "files"  # the stage, and its unit, of tables and figures: written last, whenever it was announced
LONGEST_STEP_S = 3600.0  # Rich knows no speed, so no time left, of what is done more seldom


class Listener(Protocol):
    """Hears of a stage's work as it is done. Steps have a name and a size in images, samples, timings or updates."""

    def plan(self, steps: Mapping[str, int], unit: str = "images", stage: str = "") -> None:
        """The steps that are to come, with their sizes in that unit; steps of one `stage` take alike, else each is one of its own.
        A step that is planned again has that much left."""

    def tick(self, step: str, n: int) -> None:
        """`n` more of a step are done."""

    def say(self, text: str, style: str = "") -> None:
        """One line for the user."""

    def __enter__(self) -> Listener: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Silent:
    """Says nothing.

    >>> import blockprune as bp
    >>> found = bp.scan(unit="stage", measures=["params"], progress=bp.Silent())
    """

    def plan(self, steps: Mapping[str, int], unit: str = "images", stage: str = "") -> None:
        pass

    def tick(self, step: str, n: int) -> None:
        pass

    def say(self, text: str, style: str = "") -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


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


@dataclass
class Stage:
    """Steps of one kind: how much there is of them in a unit of their own, how much is done, and the seconds that this took."""

    unit: str
    size: int = 0
    done: int = 0
    spent_s: float = 0.0

    @property
    def left_s(self) -> float | None:
        """The time left, by this stage's own speed; None before that is known."""
        left = max(self.size - self.done, 0)
        return left * self.spent_s / self.done if self.done else None if left else 0.0


class Bars:
    """Progress over stages, each with its own unit and speed, and over the steps in them.

    On a terminal: one bar for each stage, with its speed and the time left of it. Elsewhere: one plain line for each finished step.
    `clock` is in seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console or make_console(stderr=True), clock
        self.stages: dict[str, Stage] = {}
        self.steps: dict[str, tuple[str, int]] = {}  # stage and size
        self.done: dict[str, int] = {}
        self.live = (self.console.is_terminal or self.console.is_jupyter) and not self.console.is_dumb_terminal
        self._last = clock()
        self._current = ""
        self._depth = 0
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        """What is inside may enter again: the bars are there until the outermost exit."""
        self._depth += 1
        self._last = self.clock()
        if self.live and self._depth == 1:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}", markup=False),
                _Rate(),
                TimeRemainingColumn(),
            )
            self._bars = _FilesLast(
                *columns,
                console=self.console,
                transient=not self.console.is_jupyter,
                get_time=self.clock,
                speed_estimate_period=LONGEST_STEP_S,
            )
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._bars is not None and self._depth == 0:
            self._bars.stop()

    def plan(self, steps: Mapping[str, int], unit: str = "images", stage: str = "") -> None:
        for step, size in steps.items():
            self._resize(step, size + self.done.get(step, 0), stage or step, unit)
        self._show()

    def tick(self, step: str, n: int) -> None:
        """`n` more of `step` are done; a step that was not announced is added.

        Steps of a stage follow one another: one that was left before its end (a failed architecture) counts as ended.
        """
        if self.done.get(step, 0) == 0:
            self._begin(step, n)
        stage, now = self.stages[self.steps[step][0]], self.clock()
        stage.spent_s, self._last = stage.spent_s + now - self._last, now
        self.done[step] += n
        stage.done += n
        self._show()
        if self._bars is None and self.done[step] >= self.steps[step][1]:
            self.console.print(Text(self._line(step)), soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """Prints one line, above the bars where there are any."""
        self.console.print(Text(" ".join(text.split()), style=style), soft_wrap=True)

    def _begin(self, step: str, n: int) -> None:
        if step not in self.steps:
            self._resize(step, n, step, "images")
        if self._current:
            stage, _ = self.steps[self._current]
            self._resize(self._current, self.done[self._current], stage, self.stages[stage].unit)
        self._current = step

    def _resize(self, step: str, size: int, stage: str, unit: str) -> None:
        before = self.steps.get(step, ("", 0))[1]
        of = self.stages.setdefault(stage, Stage(unit))
        of.size += size - before
        self.steps[step] = (stage, size)
        self.done.setdefault(step, 0)

    def _show(self) -> None:
        """The bars as things stand; a stage without anything to do has none."""
        for name, stage in self.stages.items() if self._bars is not None else ():
            assert self._bars is not None
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=1, unit=stage.unit, visible=False)
            here = self._current and self.steps[self._current][0] == name and self._current != name
            title = f"{name}: {self._current}" if here else name
            total, task = max(stage.size, 1), self._tasks[name]
            self._bars.update(task, description=title, total=total, completed=stage.done, visible=stage.size > 0)

    def _line(self, step: str) -> str:
        """ "[3/40] mid_block: 64 images, 12.3 images/s, 0:03:20 left, then 12 timings"; these have no speed that is known yet."""
        stage = self.stages[self.steps[step][0]]
        ended = sum(self.done[name] >= size for name, (_, size) in self.steps.items())
        known = [s.left_s for s in self.stages.values() if s.left_s is not None]
        later: dict[str, int] = {}
        for s in self.stages.values():
            if s.left_s is None:
                later[s.unit] = later.get(s.unit, 0) + s.size
        then = f", then {', '.join(f'{size:,} {unit}' for unit, size in later.items())}" if later else ""
        rate = f"{stage.done / max(stage.spent_s, 1e-9):.3g} {stage.unit}/s"
        return f"[{ended}/{len(self.steps)}] {step}: {self.done[step]:,} {stage.unit}, {rate}, {duration(sum(known))} left{then}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:03:20."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _FilesLast(Progress):
    """Bars in the order in which they were added, but `FILES` below them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(sorted(self.tasks, key=lambda task: task.fields["unit"] == FILES))


class _Rate(TextColumn):
    """Work per second of a task."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")
