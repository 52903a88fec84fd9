"""How a stage tells of its work: the contract, bars on a terminal or in a notebook, plain lines elsewhere, or nothing."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

NOT_A_TERMINAL_WIDTH = 160
LONGEST_STEP_S = 3600.0  # Rich knows no speed, so no time left, of what is done more seldom


class Listener(Protocol):
    """Hears of a stage's work as it is done. Steps have a name and a size in images, samples or trials."""

    def plan(self, steps: Mapping[str, int]) -> None:
        """The steps that are to come, with their sizes."""

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

    def plan(self, steps: Mapping[str, int]) -> None:
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


class Bars:
    """Progress over named steps of known size, counted in images.

    On a terminal: one bar for all steps and one for the
    current step, with images/s and the time left. Elsewhere: one plain line for each finished step. `clock` is in seconds.
    """

    def __init__(self, console: Console | None = None, unit: str = "images", clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.unit, self.clock = console or make_console(stderr=True), unit, clock
        self.steps: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.live = (self.console.is_terminal or self.console.is_jupyter) and not self.console.is_dumb_terminal
        self.start = clock()
        self._current = ""
        self._bars: Progress | None = None

    def __enter__(self) -> Bars:
        self.start = self.clock()
        if self.live:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
                _Rate(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(
                *columns,
                console=self.console,
                transient=not self.console.is_jupyter,
                get_time=self.clock,
                speed_estimate_period=LONGEST_STEP_S,
            )
            self._all = self._bars.add_task("", total=1, unit=self.unit, visible=False)
            self._now = self._bars.add_task("", total=1, unit=self.unit, visible=False)
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def plan(self, steps: Mapping[str, int]) -> None:
        self.steps |= steps
        self.done |= dict.fromkeys(steps, 0)
        if self._bars is not None:
            self._bars.update(self._all, total=sum(self.steps.values()), description=self._heading(), visible=True)

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
            self._bars.update(self._all, total=sum(self.steps.values()), visible=True)

    def _finished(self) -> int:
        return sum(self.done.get(step, 0) >= size for step, size in self.steps.items())

    def _heading(self) -> str:
        return f"step {min(self._finished() + 1, len(self.steps))}/{len(self.steps)}"

    def _line(self, step: str) -> str:
        """ "[3/40] mid_block: 64 images, 12.3 images/s, 0:03:20 left"; the rate is over all steps, as the time left is."""
        done, elapsed = sum(self.done.values()), max(self.clock() - self.start, 1e-9)
        left = max(sum(self.steps.values()) - done, 0) * elapsed / done
        rate = f"{self.done[step]} {self.unit}, {done / elapsed:.3g} {self.unit}/s, {duration(left)} left"
        return f"[{self._finished()}/{len(self.steps)}] {step}: {rate}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:03:20."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Rate(TextColumn):
    """Work per second of a task."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")
