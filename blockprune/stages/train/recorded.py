"""A training in a run: a row for each update, checkpoints and validations on the way, and where it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator

from blockprune.errors import UserError
from blockprune.measures.runner import Images
from blockprune.measures.score import Score
from blockprune.model.sampling import NotFinite
from blockprune.progress import Listener
from blockprune.runs.directory import Run
from blockprune.runs.memory import MemoryRun
from blockprune.runs.parts import strip_png
from blockprune.runs.records import TrainState
from blockprune.stages.train.checkpoints import Snapshot, drop_oldest, read_snapshot, write_snapshot
from blockprune.stages.train.request import Stepping
from blockprune.stages.train.trainer import Trainer

Look = Callable[[str], tuple[Images, list[Score]]]  # label => images that are shown, and scores; raises NotFinite


@dataclass(frozen=True)
class Recorded:
    """One process's part of a training of `n_steps` updates; `run` is in memory, and `progress` silent, in those that only help."""

    request: Stepping
    n_steps: int
    accelerator: Accelerator
    run: Run | MemoryRun
    out: Path | None
    progress: Listener

    def start(self) -> Snapshot | None:
        """The newest sound checkpoint, whose later rows go; those beyond the limit, left by a killed process, go where all are
        sound."""
        start, wrong = (None, []) if self.out is None else read_snapshot(self.out / "checkpoints")
        for line in wrong:
            self.progress.say(line, "red")
        if self.out is not None and not wrong and self.accelerator.is_main_process:
            drop_oldest(self.out / "checkpoints", self.request.checkpoints_total_limit)
        done = start.step if start else 0
        self.run.keep(lambda row: row["step"] <= done)
        self.progress.plan({"updates": self.n_steps - done}, "updates")
        self.accelerator.init_trackers("blockprune")
        return start

    def announce_validations(self, n_images: int, done: int) -> None:
        """Says how many images are still to be drawn on the way and at the end, so many each time."""
        every, last = self.request.validation_steps or self.n_steps, self.n_steps - 1
        times = 1 + last // every - min(done, last) // every
        self.progress.plan({"validation": times * n_images})

    def train(self, trainer: Trainer, last: int, validate: Callable[[int], None]) -> None:
        """Trains up to update `last`; `validate(step)` looks on the way. UserError when the loss is not finite."""
        try:
            for state in trainer.run(last - trainer.offset):
                self._log(state)
                every = self.request.validation_steps
                if every and state.step % every == 0 and state.step < self.n_steps:
                    # before the checkpoint: a run goes on behind its last one, and would never come back to this validation
                    validate(state.step)
                if state.step % self.request.checkpointing_steps == 0 or state.step == last:
                    self._checkpoint(trainer, state.step)
                self.accelerator.wait_for_everyone()
        except FloatingPointError as err:
            raise UserError(
                f"{err}: {self._last_good()}; lower --learning-rate or use --mixed-precision no, in another --out"
            ) from None

    def validate(self, look: Look, step: int) -> None:
        """A picture and a row for each measure, made by the main process alone."""
        if not self.accelerator.is_main_process:
            return
        try:
            pictures, scores = look(f"step {step}")
        except NotFinite as err:
            self.progress.say(f"validation at step {step}: {err}", "red")
            return
        self.run.write(f"images/step-{step:07d}.png", strip_png(pictures))
        for score in scores:
            self.run.append({"kind": "validation", "step": step, "score": score.to_json()})

    def validate_last(self, look: Look) -> None:
        """`validate` at the end; rows of an attempt that was killed there go first."""
        self.run.keep(lambda row: row["kind"] != "validation" or row["step"] < self.n_steps)
        self.validate(look, self.n_steps)

    def _log(self, state: TrainState) -> None:
        self.run.append({"kind": "train", **state.to_json()})
        main = {name: value for name, value in state.losses.items() if not name.startswith("feature/")}
        self.accelerator.log(main, step=state.step)
        self.progress.tick("updates", 1)
        if state.step % max(1, self.n_steps // 20) == 0:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in main.items())
            self.progress.say(f"step {state.step}/{self.n_steps}: {terms}; {state.n_images / state.seconds:.3g} images/s")

    def _checkpoint(self, trainer: Trainer, step: int) -> None:
        if self.out is None:
            return
        parts = trainer.parts()  # every process must ask
        if self.accelerator.is_main_process:
            write_snapshot(self.out / "checkpoints", step, parts, self.request.checkpoints_total_limit)

    def _last_good(self) -> str:
        kept = read_snapshot(self.out / "checkpoints")[0] if self.out else None
        return f"the last good checkpoint is {str(kept.path)!r}" if kept else "there is no checkpoint yet"


def check_tracker(tracker: str | None, out: Path | None) -> None:
    """Raises UserError for a tracker without a run directory, or without its package."""
    if tracker and out is None:
        raise UserError(f"--report-to {tracker} writes to the run directory: give --out")
    if tracker and find_spec(tracker) is None:
        raise UserError(f"--report-to {tracker} needs its package: pip install {tracker}")
