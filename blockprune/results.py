"""What the library's calls return: small values over a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from blockprune.errors import UserError
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.progress import FILES, Listener, Silent
from blockprune.runs import AnyRun
from blockprune.runs.atomic import writing
from blockprune.runs.memory import MemoryRun
from blockprune.runs.records import Evaluation, TrainState

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from matplotlib.figure import Figure

    from blockprune.reports.model_view import ModelView
    from blockprune.reports.search_view import SearchView
    from blockprune.reports.svg import Svg
    from blockprune.reports.view import ScanView
    from blockprune.stages.personalise.run import Personalised
    from blockprune.stages.train.run import Distilled

F = TypeVar("F")


@dataclass(frozen=True)
class ScanResult:
    """A scan: a row for each measure of the teacher and of each removal.

    >>> import blockprune as bp
    >>> found = bp.scan(unit="stage", measures=["params"], progress=bp.Silent())
    >>> found.view.removals[:2]
    ['down_blocks.0', 'down_blocks.1']
    """

    run: AnyRun
    n_files: ClassVar[int] = 10  # that `save` writes at most, for progress

    @property
    def rows(self) -> list[Score]:
        return [Score.from_json(row) for row in self.run.rows()]

    @property
    def view(self) -> ScanView:
        """Every architecture with its scores, for ranking and drawing."""
        from blockprune.reports.scans import scan_view

        return scan_view(self.run)

    def to_pandas(self) -> Any:
        """The ranking as a pandas DataFrame, a row for each architecture, the teacher first."""
        from blockprune.reports.view import ranking

        return _pandas().DataFrame(ranking(self.view))

    def figure(self, name: str = "unet") -> Figure | Svg:
        """A figure of the report: unet, sensitivity, tradeoff, grid or correlation. UserError for one there is no data for."""
        from blockprune.reports.figures import figures

        return _chosen(name, figures(self.view))

    def save(self, folder: str | Path, progress: Listener | None = None) -> None:
        """Writes tables, figures and report.md to a folder."""
        from blockprune.reports.scans import report_files

        _write(Path(folder), report_files(self.view), progress)


@dataclass(frozen=True)
class EvaluateResult:
    """An evaluation: a row for each setting, with every measure of it.

    >>> import blockprune as bp
    >>> def brightness(images, prompts):
    ...     "Mean brightness."
    ...     return images.float().mean(dim=(1, 2, 3)) / 255
    >>> result = bp.evaluate(n_images=2, steps=1, measures=[brightness], progress=bp.Silent())
    >>> 0 < result.rows[0]["brightness"] < 1
    True
    """

    run: AnyRun
    n_files: ClassVar[int] = 2  # that `save` writes at most, for progress

    @property
    def view(self) -> ModelView:
        """The model with its settings, scores and pictures."""
        from blockprune.reports.evaluations import evaluation_view

        return evaluation_view(self.run)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each setting: what it is, then each measure with its interval and count."""
        from blockprune.reports.evaluations import flat_rows

        return flat_rows(self.view)

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame."""
        return _pandas().DataFrame(self.rows)

    def figure(self, name: str = "images") -> Figure | Svg:
        """A figure: images, or guidance. UserError for one there is no data for."""
        from blockprune.reports.model_figures import evaluation_figures

        return _chosen(name, evaluation_figures(self.view))

    def save(self, folder: str | Path, progress: Listener | None = None) -> None:
        """Writes evaluate.json and evaluate.csv to a folder, and the images that were kept in memory."""
        from blockprune.reports.evaluations import report_files

        with self.run.alone():  # of processes that share the run each saves when it ends
            _write(Path(folder), report_files(self.view), progress)
            if isinstance(self.run, MemoryRun):
                images = ((name, data) for name, data in self.run.files.items() if name.startswith(("images/", "drawn/")))
                _write(Path(folder), images)


@dataclass(frozen=True)
class TrainResult:
    """A distillation: its rows, one for each update, and the student.

    `leads` is False in a process of `accelerate launch` that only helped, and has nothing to save.

    >>> import blockprune as bp
    >>> trained = bp.distill(arch="mid-removed", steps=1, train_batch_size=2, n_images=2, denoising_steps=1, progress=bp.Silent())
    >>> trained.pipeline.unet is trained.student
    True
    """

    n_files: ClassVar[int] = 4  # that `save` writes at most, the pipeline as one, for progress

    distilled: Distilled

    @property
    def run(self) -> AnyRun:
        return self.distilled.run

    @property
    def leads(self) -> bool:
        return self.distilled.leads

    @property
    def rows(self) -> list[TrainState]:
        return [TrainState.from_json(row) for row in self.run.rows() if row["kind"] == "train"]

    @property
    def validations(self) -> list[tuple[int, Score]]:
        """(update, score) of each validation."""
        return [(row["step"], Score.from_json(row["score"])) for row in self.run.rows() if row["kind"] == "validation"]

    @property
    def student(self) -> UNet2DConditionModel:
        """The trained network, in float32 and for inference."""
        return self.distilled.student

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The teacher's pipeline with the student in it, in the pipeline's precision and on its device."""
        return self.distilled.pipeline

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each update: every term of the loss, images and seconds."""
        rows = [{"step": r.step, **r.losses, "n_images": r.n_images, "seconds": r.seconds} for r in self.rows]
        return _pandas().DataFrame(rows)

    def figure(self, name: str = "losses") -> Svg:
        """A figure of the report: losses or validation. UserError for one there is no data for."""
        from blockprune.reports.curves import curves

        return _chosen(name, curves(self.run.rows()))

    def save(self, folder: str | Path, progress: Listener | None = None) -> str:
        """Writes curves, card.json and, unless it is there already, the pipeline to a folder; returns what loads the pipeline."""
        from blockprune.reports.trainings import card_of, report_files

        _write(Path(folder), report_files(self.run), progress, to_follow=1)
        exported = self.distilled.export(Path(folder) / "pipeline", card_of(self.run))
        (progress or Silent()).tick(FILES, 1)
        return exported


@dataclass(frozen=True)
class PersonaliseResult:
    """A personalisation: a row for each update, and scores of what the model draws of its subject; of a benchmark only the scores.

    See `blockprune.personalise` for an example.
    """

    n_files: ClassVar[int] = 5  # that `save` writes at most, what was taught as one, for progress

    run: AnyRun
    personalised: Personalised | None = None

    @property
    def leads(self) -> bool:
        """False in a process that only helped, whose rows are its own and whose run is not written."""
        return self.personalised is None or self.personalised.leads

    @property
    def rows(self) -> list[TrainState]:
        return [TrainState.from_json(row) for row in self.run.rows() if row["kind"] == "train"]

    @property
    def validations(self) -> list[tuple[int, Score]]:
        """(update, score) for each measure of each validation."""
        return [(row["step"], Score.from_json(row["score"])) for row in self.run.rows() if row["kind"] == "validation"]

    @property
    def scores(self) -> dict[str, Score]:
        """The scores after the last update by measure, and what the training took; of a benchmark over its subjects."""
        from blockprune.reports.personalisations import last_scores

        return last_scores(self.run)

    @property
    def subjects(self) -> dict[str, dict[str, Score]]:
        """The scores of each subject of a benchmark by measure."""
        from blockprune.reports.personalisations import by_subject

        return by_subject(self.run)

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline that has learnt the subject, on the device and in the precision of the one that was given.

        UserError for a benchmark, which keeps none.
        """
        if self.personalised is None:
            raise UserError("a benchmark keeps no pipeline: personalise with the one subject whose pipeline is wanted")
        return self.personalised.model.pipe

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each update: every term of the loss, images and seconds."""
        rows = [{"step": r.step, **r.losses, "n_images": r.n_images, "seconds": r.seconds} for r in self.rows]
        return _pandas().DataFrame(rows)

    def figure(self, name: str = "losses") -> Svg:
        """A figure: losses. UserError for one there is no data for."""
        from blockprune.reports.curves import curves

        return _chosen(name, curves(self.run.rows()))

    def save(self, folder: str | Path, progress: Listener | None = None) -> str:
        """Writes curves, scores and, unless it is there already, pipeline/ or lora/ to a folder; returns what loads that."""
        from blockprune.reports.personalisations import report_files

        _write(Path(folder), report_files(self.run), progress, to_follow=1 if self.personalised else 0)
        if self.personalised is None:
            return f"the scores are in {folder}"
        exported = self.personalised.export(Path(folder))
        (progress or Silent()).tick(FILES, 1)
        return exported


@dataclass(frozen=True)
class SearchResult:
    """A search: an evaluation for each architecture that was scored, and the finalists.

    >>> import blockprune as bp
    >>> quick = dict(unit="stage", eps_samples=4, n_images=2, steps=2, final_factor=1, finalists=1, progress=bp.Silent())
    >>> bp.search(budget="75%params", trials=14, **quick).best.removed <= frozenset(b.name for b in bp.graph("tiny-digits"))
    True
    """

    run: AnyRun
    n_files: ClassVar[int] = 9  # that `save` writes at most, for progress

    @property
    def rows(self) -> list[Evaluation]:
        return [Evaluation.from_json(row) for row in self.run.rows() if row["kind"] == "search"]

    @property
    def view(self) -> SearchView:
        """The search, its finalists and what is known of them."""
        from blockprune.reports.searches import search_view

        return search_view(self.run)

    @property
    def best(self) -> Architecture:
        """The winner of the finals. UserError when no finalist holds the budgets, and for a front without any."""
        return self.view.best.candidate.arch

    def to_pandas(self) -> Any:
        """The evaluations as a pandas DataFrame."""
        cells = (
            {"label": e.score.label, "removed": e.candidate.arch.terms, **e.candidate.costs, **e.score.to_json()} for e in self.rows
        )
        return _pandas().DataFrame(list(cells))

    def figure(self, name: str = "history") -> Figure | Svg:
        """A figure of the report: history, front, grid, unet-best …. UserError for one there is no data for."""
        from blockprune.reports.search_figures import search_figures

        return _chosen(name, search_figures(self.view))

    def save(self, folder: str | Path, progress: Listener | None = None) -> None:
        """Writes best.json, finalists.csv, report.md and figures to a folder."""
        from blockprune.reports.searches import report_files

        _write(Path(folder), report_files(self.view), progress)


@dataclass(frozen=True)
class ReportResult:
    """A report: its page, the files with its results beside it, and what it lacks, a sentence each."""

    page: Path
    missing: Sequence[str]

    @property
    def files(self) -> list[Path]:
        return [self.page.with_suffix(suffix) for suffix in (".csv", ".json", ".tex")]


def _write(folder: Path, files: Iterator[tuple[str, bytes]], progress: Listener | None = None, to_follow: int = 0) -> None:
    """Writes each file as it is made. Where there are fewer than were announced, those `to_follow` alone are left in the end."""
    heard = progress or Silent()
    for name, content in files:
        with writing(folder / name) as temporary:
            temporary.write_bytes(content)
        heard.tick(FILES, 1)
    heard.plan({FILES: to_follow}, FILES)


def _chosen(name: str, figures: Iterator[tuple[str, F]]) -> F:
    drawn = {Path(file).stem: figure for file, figure in figures}
    if name not in drawn:
        raise UserError(f"no figure {name!r} here: choose from {', '.join(drawn)}")
    return drawn[name]


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError("to_pandas() needs the pandas package: pip install pandas") from None
    return pandas
