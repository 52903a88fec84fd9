"""One process's share of a scan: what is missing and nobody else is at is claimed, done and kept; others may do the rest."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from blockprune.measures.images import failed, statistic_of
from blockprune.measures.intervals import Statistic
from blockprune.measures.measure import names
from blockprune.measures.runner import FULL, Arrays
from blockprune.measures.score import Score
from blockprune.model.sampling import NotFinite, teacher_fails
from blockprune.progress import Listener
from blockprune.runs import AnyRun, parts
from blockprune.runs.series import Series, keep_seen
from blockprune.stages.scan.racing import Race, rounds_of
from blockprune.stages.scan.scan import Batches, Scan, timings

POLL_S = 0.3
TIMESTEPS = "timesteps"  # the part that says at which timestep each noisy sample is


@dataclass
class Share:
    """A batch of noisy samples, or of the images of one removal, is a claim. A killed process's claims are free at once.

    With `racing`, a measure, images go to the removals whose rank by it is open. Scores are for one process alone: who finds all of
    something seen scores it, and whoever comes next finds the row.
    """

    scan: Scan
    run: AnyRun
    progress: Listener
    racing: str | None = None
    _series: dict[str, Series] = field(default_factory=dict)

    def __post_init__(self) -> None:
        protocol = self.scan.plan.protocol
        rounds = rounds_of(protocol.n_images) if self.racing else [protocol.n_images]
        self.race = Race(self.scan.removals, rounds, protocol.seed)

    def work(self, by_timestep: bool = False) -> None:
        """Ends when everything has its row, by this process or another.

        Costs come first; then the teacher, the denoising errors of all, and the images of each; at last what is timed undisturbed.
        """
        if not self._left(by_timestep):
            return
        self._keep(self.scan.costs())
        teacher = self._teacher() if self.scan.needs_teacher else {}
        self.scan = self.scan.fitted(teacher)
        for measure in self.scan.plan.denoising_measures:
            self._denoising(measure, teacher)
        if by_timestep and self.scan.plan.denoising_measures:
            with self.run.alone():
                if parts.recall_arrays(self.run, TIMESTEPS) is None:
                    parts.keep_arrays(self.run, TIMESTEPS, self.scan.timesteps(teacher))
        while left := self._missing(names("images")):
            if not any(self._step(label, teacher) for label in left) and not self._end_round(teacher):
                time.sleep(POLL_S)
        with self.run.alone():
            self._keep(timings(self.scan.model, self.scan.removals, self.scan.plan, self._done()))

    def _left(self, by_timestep: bool) -> bool:
        """True while anything is to be done."""
        plan = self.scan.plan
        timesteps = by_timestep and plan.denoising_measures and parts.recall_arrays(self.run, TIMESTEPS) is None
        return bool(timesteps or self._missing(plan.measures))

    def _done(self) -> set[tuple[str, str]]:
        return {(row["label"], row["measure"]) for row in self.run.rows()}

    def _missing(self, measures: Collection[str]) -> dict[str, list[str]]:
        """label => those of the measures that are asked for and have no row yet."""
        done, of = self._done(), self.scan.measures_of
        missing = {label: [m for m in of(label) if m in measures and (label, m) not in done] for label in self.scan.archs}
        return {label: left for label, left in missing.items() if left}

    def _keep(self, scores: Iterable[Score]) -> None:
        """Makes rows of the scores that are asked for and have none."""
        with self.run.alone():
            done = self._done()
            for score in scores:
                if score.measure in self.scan.plan.measures and (score.label, score.measure) not in done:
                    self.run.append(score.to_json())
                    say(self.progress, score)

    def images_of(self, label: str) -> Series:
        """The images of an architecture, the teacher's under "full"."""
        key, n_images = self.scan.archs[label].key, self.scan.plan.protocol.n_images
        return self._series.setdefault(key, Series(self.run, key, n_images))

    def _share(self, series: Series, look: Callable[[Batches], Iterator[Arrays]], n: int | None = None) -> bool:
        """Looks at those of the first `n` samples that are missing and nobody else is at; False when that is nothing."""
        n, size = series.n if n is None else n, self.scan.plan.batch_size
        with self.run.claims(series.claims) as claims:
            batches = iter(lambda: claims.take(size, lambda: [i for i in series.missing() if i < n]), [])
            if (first := next(batches, None)) is None:
                return False
            for seen in look(itertools.chain([first], batches)):
                keep_seen(self.run, series, seen)
        return True

    def _drawn(self, label: str, batches: Batches) -> Iterator[Arrays]:
        """What is seen of the images of an architecture; the first images are kept as files."""
        series = self.images_of(label)
        for seen, images in self.scan.images(label, batches):
            for i, image in zip(seen["index"].tolist(), images, strict=True):
                if i < self.scan.plan.n_pictures:
                    self.run.write(series.path(i), parts.strip_png(image[None]))
            yield seen

    def _teacher(self) -> Arrays:
        """What was seen of the teacher's images, when all are drawn, by this process or another."""
        series, plan = self.images_of(FULL), self.scan.plan
        try:
            while series.missing():
                if not self._share(series, partial(self._drawn, FULL)):
                    time.sleep(POLL_S)
        except NotFinite as err:
            raise teacher_fails(err) from None
        self._picture(FULL)
        return parts.check_kept(f"parts/{series.slug}", series.seen(), plan.observed, series.n)

    def _picture(self, label: str) -> None:
        """Keeps the first images of an architecture side by side."""
        name = f"images/{self.scan.archs[label].key}.png"
        with self.run.alone():
            if self.run.read(name) is None:
                self.run.write(name, self.images_of(label).strip(self.scan.plan.n_pictures))

    def _denoising(self, measure: str, teacher: Arrays) -> None:
        if not self._missing([measure]):
            return
        series = self._series.setdefault(measure, Series(self.run, measure, self.scan.plan.n_noisy))
        while series.missing():
            if not self._share(series, partial(self.scan.errors, measure, teacher)):
                time.sleep(POLL_S)
        shape = {"errors": (len(self.scan.removals),)}
        seen = parts.check_kept(f"parts/{series.slug}", series.seen(), shape, series.n)
        with self.run.alone():
            if self._missing([measure]):
                self._keep(self.scan.error_scores(measure, seen["errors"]))

    def _wanted(self, label: str) -> int:
        """How many images an architecture gets, as far as that is known."""
        return self.race.wanted.get(label, self.scan.plan.protocol.n_images)

    def _step(self, label: str, teacher: Arrays) -> bool:
        """Draws what there is to draw of an architecture, or scores it; False when there is nothing to do now."""
        n, series = self._wanted(label), self.images_of(label)
        try:
            if self._share(series, partial(self._drawn, label), n):
                return True
        except NotFinite as err:
            plan, key = self.scan.plan, self.scan.archs[label].key
            self._keep(failed(key, label, plan.image_measures, plan.protocol.n_images, plan.protocol.seed, str(err)))
            return True
        if label in self.race.open or min(series.missing(), default=n) < n:
            return False
        with self.run.alone():
            measures = self._missing(names("images")).get(label, [])
            self._keep(self.scan.image_scores(label, measures, self._seen(label), first(teacher, n)))
            self._picture(label)
        return True

    def _seen(self, label: str) -> Arrays:
        """What was seen of the images that an architecture has got."""
        n, series, plan = self._wanted(label), self.images_of(label), self.scan.plan
        wanted = {name: shape for name, shape in plan.observed.items() if label == FULL or name != "latents"}
        return parts.check_kept(f"parts/{series.slug}", first(series.seen(), n), wanted, n)

    def _end_round(self, teacher: Arrays) -> bool:
        """Ends a round of the race when everybody in it has its images; False while somebody lacks some, and when it is over."""
        race, wanted = self.race, self.race.wanted
        drawn = [label for label in wanted if min(self.images_of(label).missing(), default=wanted[label]) >= wanted[label]]
        left = self._missing(names("images"))
        if not race.open or any(label in left for label in race.open.difference(drawn)):
            return False
        race.end_round({label: self._statistic(label, teacher) for label in drawn})
        return True

    def _statistic(self, label: str, teacher: Arrays) -> Statistic:
        """The measure that the race goes by, of the images that a removal has got."""
        return statistic_of(self.racing or "", self._seen(label), first(teacher, self._wanted(label)), self.scan.plan.judges)


def first(seen: Arrays, n: int) -> Arrays:
    """What was seen of the first `n` samples."""
    return {name: values[:n] for name, values in seen.items()}


def say(progress: Listener, score: Score) -> None:
    """One line for each row that took work to get."""
    if score.error:
        progress.say(f"{score.label}: {score.measure} failed: {score.error}", "red")
    elif score.measure in ("eps_mse", "fid"):
        spread = f" ({score.low:.4g} to {score.high:.4g})" if score.low is not None and score.high is not None else ""
        progress.say(f"{score.label}: {score.measure} {score.value:.4g}{spread}")
