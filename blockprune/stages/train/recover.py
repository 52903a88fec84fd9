"""A short distillation of candidates, so that a search can choose what is best after training."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from diffusers import UNet2DConditionModel

from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.fit import Fits, no_fits
from blockprune.model.model import Model
from blockprune.stages.train.checkpoints import Snapshot, read_snapshot, write_snapshot
from blockprune.stages.train.distill import Distiller, student_of
from blockprune.stages.train.launch import accelerated
from blockprune.stages.train.recipe import Recipe, read_recipe
from blockprune.stages.train.samples import Sampler, data_of, provider_of, samples_of
from blockprune.stages.train.trainer import Settings

LEARNING_RATE = 5e-4  # higher than the papers': a recovery is short
SAVED_EVERY = 200  # updates
TIMED = 3  # updates


@dataclass
class Recovery:
    """The same updates of `batch_size` images for every candidate, in one order, with one noise.

    Images and captions are encoded once for all. A training goes on from its newest checkpoint in `folder`; without one it starts
    anew. The model stays as it was: what training changes of its network (layout, precision) it changes of a copy. `fits` gives the
    weights that candidates with fits start from, `recipe` how they are trained.
    """

    model: Model
    data: str | None
    batch_size: int
    seed: int
    folder: Path | None = None
    fits: Fits = no_fits
    recipe: Recipe = field(default_factory=lambda: replace(read_recipe("bk-sdm"), learning_rate=LEARNING_RATE))

    @cached_property
    def samples(self) -> Sampler:
        """The training pairs, encoded once."""
        data = data_of(self.model.name, self.model.defaults, self.data, "--train-data")
        return samples_of(self.model, provider_of(self.model, data), self.seed)

    @contextmanager
    def _training(self, arch: Architecture, start: Snapshot | None = None) -> Iterator[Distiller]:
        teacher = copy.deepcopy(self.model.network).float()
        student = student_of(teacher, arch, "teacher", 0, self.fits)
        with accelerated(str(self.model.device)) as accelerator:
            settings, of = Settings(self.batch_size, seed=self.seed, ema=True), (self.model.graph, arch, self.samples, self.recipe)
            run = Distiller(accelerator, teacher, student, *of, settings, start=start)
            try:
                yield run
            finally:
                run.close()

    def student(self, arch: Architecture, updates: int) -> UNet2DConditionModel:
        """The student after so many updates: its weights' moving averages, in float32 and for inference.

        Raises FloatingPointError when the loss is not finite.
        """
        folder = None if self.folder is None else self.folder / arch.key
        start, _ = (None, []) if folder is None else read_snapshot(folder)
        with self._training(arch, start if start and start.step <= updates else None) as run:
            for state in run.run(updates):
                if folder is not None and (state.step % SAVED_EVERY == 0 or state.step == updates):
                    write_snapshot(folder, state.step, run.parts(), limit=1)
            weights = run.weights(averaged=True)
        student = surgery.prune(self.model.network, arch).float()
        student.load_state_dict(weights)
        return student.eval().requires_grad_(False)

    def keep(self, archs: Collection[Architecture]) -> None:
        """Deletes the checkpoints of all other candidates."""
        kept = {arch.key for arch in archs}
        for path in self.folder.iterdir() if self.folder is not None and self.folder.is_dir() else ():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def seconds(self) -> float:
        """What an update takes here, measured on the teacher's own architecture; that of a smaller student takes less."""
        with self._training(Architecture()) as run:
            list(run.run(1))
            begun = time.perf_counter()
            list(run.run(1 + TIMED))
        return (time.perf_counter() - begun) / TIMED
