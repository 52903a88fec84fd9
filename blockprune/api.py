"""The library: every stage as one call, with a model's name, a folder, or a pipeline that is loaded already.

import blockprune as bp
scan = bp.scan(pipe, unit="pair", measures=["eps_mse"])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from diffusers import DiffusionPipeline

from blockprune.errors import UserError
from blockprune.export.save import save_pipeline
from blockprune.measures.measure import Measure, chosen
from blockprune.model import presets, pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.defaults import defaults_of
from blockprune.model.device import device_of
from blockprune.model.families import family_of
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model, load_model, of_pipeline
from blockprune.model.trace import trace
from blockprune.progress import Bars, Listener, Silent
from blockprune.reports.report import write_report
from blockprune.reports.request import ReportRequest
from blockprune.results import EvaluateResult, PersonaliseResult, ReportResult, ScanResult, SearchResult, TrainResult
from blockprune.runs.directory import check_run_folder, read_run
from blockprune.runs.memory import MemoryRun
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.evaluate.run import evaluate as run_evaluate
from blockprune.stages.fields import OnModel
from blockprune.stages.fitting import fitted_weights
from blockprune.stages.outline import outlined, say_how_long
from blockprune.stages.personalise.benchmark import benchmark as run_benchmark
from blockprune.stages.personalise.request import PersonaliseRequest
from blockprune.stages.personalise.run import personalise as run_personalise
from blockprune.stages.scan.request import ScanRequest
from blockprune.stages.scan.run import scan as run_scan
from blockprune.stages.scan.work import work as scan_work
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.search.run import search as run_search
from blockprune.stages.search.work import work as search_work
from blockprune.stages.train.launch import helps
from blockprune.stages.train.request import TrainRequest
from blockprune.stages.train.run import distill as run_distill
from blockprune.stages.train.samples import data_of

AnyModel: TypeAlias = str | Path | DiffusionPipeline
AnyMeasure: TypeAlias = str | Measure | Callable[..., Any]
AnyArchitecture: TypeAlias = str | Path | Architecture
AnyRun: TypeAlias = str | Path | ScanResult | SearchResult | TrainResult | EvaluateResult
R = TypeVar("R", bound=OnModel)


def graph(model: AnyModel = "tiny-digits", *, resolution: str | None = None) -> BlockGraph:
    """The blocks of a model's denoising network: shapes, costs, skips, what can go. No weights are loaded.

    >>> import blockprune as bp
    >>> g = bp.graph("sd-v1-4")
    >>> g.total.params
    859520964
    >>> list(g.units("stage"))[-2:]
    ['up_blocks.2', 'up_blocks.3']
    """
    configs = pretrained.configs_of(model) if isinstance(model, DiffusionPipeline) else pretrained.configs(str(model))
    return trace(configs.unet, configs.latent(resolution), configs.n_tokens)


def scan(
    model: AnyModel | None = None,
    *,
    request: ScanRequest | None = None,
    measures: Sequence[AnyMeasure] = (),
    out: str | Path | None = None,
    progress: Listener | None = None,
    **fields: Any,
) -> ScanResult:
    """Scores the teacher and every removal without retraining.

    What is asked are the fields of `ScanRequest`, as keywords or as a `request`. With `out`, a run directory is written, the same
    call again resumes it, and several processes that are given the same one share the work; `workers` starts some.

    >>> import blockprune as bp
    >>> found = bp.scan(unit="stage", measures=["eps_mse"], eps_samples=4, progress=bp.Silent())
    >>> found.rows[0].measure
    'eps_mse'
    """
    asked = _asked(ScanRequest, request, model, fields | ({"measures": tuple(chosen(measures))} if measures else {}))
    folder = _run_folder(out)
    with progress or Bars() as listener:
        opened = _opened(model, asked)
        run = run_scan(
            opened, asked, folder, listener, begins=lambda: say_how_long(scan_work(asked, outlined(opened)), opened, listener)
        )
        return ScanResult(run)


def search(
    model: AnyModel | None = None,
    *,
    request: SearchRequest | None = None,
    budget: str | Sequence[str] = (),
    out: str | Path | None = None,
    progress: Listener | None = None,
    **fields: Any,
) -> SearchResult:
    """Searches the removal set that loses least within a budget, such as "65%params" or "0.66B".

    What is asked are the fields of `SearchRequest`, as keywords or as a `request`. `workers` need `out`.

    >>> import blockprune as bp
    >>> quick = dict(unit="stage", eps_samples=4, n_images=2, steps=2, final_factor=1, finalists=1, progress=bp.Silent())
    >>> found = bp.search(budget="75%params", trials=14, **quick)
    >>> bp.graph("tiny-digits").cost(found.best).params < 0.75 * 2_700_000
    True
    """
    if budget:
        fields["budget"] = (budget,) if isinstance(budget, str) else tuple(budget)
    asked = _asked(SearchRequest, request, model, fields)
    folder = _run_folder(out)
    if asked.from_scan:
        read_run(Path(asked.from_scan))
    if asked.recover and not isinstance(model, DiffusionPipeline):
        data_of(asked.model, defaults_of(asked.model), asked.train_data, "--train-data")
    with progress or Bars() as listener:
        opened = _opened(model, asked)
        run = run_search(
            opened, asked, folder, listener, begins=lambda: say_how_long(search_work(asked, outlined(opened)), opened, listener)
        )
        return SearchResult(run)


def evaluate(
    model: AnyModel | None = None,
    *,
    request: EvaluateRequest | None = None,
    measures: Sequence[AnyMeasure] = (),
    out: str | Path | None = None,
    progress: Listener | None = None,
    **fields: Any,
) -> EvaluateResult:
    """Scores a model's images under a protocol, for one setting or for every combination of several.

    What is asked are the fields of `EvaluateRequest`, as keywords or as a `request`. With `out`, a run directory is written, the
    same call again resumes it, and several processes that are given the same one share the work. A pipeline that `prune` made, or
    that was exported, is compared with its teacher where that is known.

    >>> import blockprune as bp
    >>> result = bp.evaluate(n_images=2, steps=[1, 2], measures=["clip_score"], progress=bp.Silent())
    >>> [row["setting"] for row in result.rows]
    ['CFG 3, 1 steps', 'CFG 3, 2 steps']
    """
    asked = _asked(EvaluateRequest, request, model, fields | ({"measures": tuple(chosen(measures))} if measures else {}))
    pipe = model if isinstance(model, DiffusionPipeline) else None
    folder = _run_folder(out)
    with progress or Bars() as listener:
        return EvaluateResult(run_evaluate(asked, folder, listener, pipe))


def report(runs: Sequence[AnyRun] = (), *, request: ReportRequest | None = None, **fields: Any) -> ReportResult:
    """Writes one page about a teacher and its students, from run directories and from what the other calls returned.

    What is asked are the fields of `ReportRequest`, as keywords or as a `request`; the page goes to `out`, its results beside it.

    >>> import tempfile, blockprune as bp
    >>> scanned = bp.scan(unit="stage", measures=["eps_mse"], eps_samples=4, progress=bp.Silent())
    >>> made = bp.report([scanned], out=f"{tempfile.mkdtemp()}/report.html")
    >>> [file.name for file in (made.page, *made.files)]
    ['report.html', 'report.csv', 'report.json', 'report.tex']
    """
    opened = [run if isinstance(run, str | Path) else run.run for run in runs]
    if runs:
        fields["runs"] = tuple(
            str(run.about["command"] if isinstance(run, MemoryRun) else getattr(run, "path", run)) for run in opened
        )
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    asked = replace(request, **fields) if request else ReportRequest.from_mapping(fields, "ReportRequest(...)")
    return ReportResult(Path(asked.out), write_report(asked, opened or asked.runs))


def prune(pipe: DiffusionPipeline, arch: AnyArchitecture, data: str | Path | None = None) -> DiffusionPipeline:
    """A copy of a pipeline whose network lacks some blocks; `pipe` stays as it is, and its other parts are shared.

    `arch` is an `Architecture`, or text as on the command line: a preset, block names, or a JSON file. The copy runs as any other;
    `save` is what writes it to disk. What an architecture says to be fitted ("mid_block~linear") is fitted on noisy samples of
    `data`, a folder of images; of the model's own data, or of images that it draws, where that is None.

    >>> import blockprune as bp
    >>> pipe = bp.load_pipeline("tiny-digits")
    >>> small = bp.prune(pipe, "mid_block")
    >>> small.unet.num_parameters() < pipe.unet.num_parameters()
    True
    """
    name = _network_of(pipe)
    student = copy.copy(pipe)
    wanted = _architecture(pipe, arch)
    setattr(student, name, surgery.prune(getattr(pipe, name), wanted, fitted_weights(of_pipeline(pipe), wanted, data)))
    return student


@contextmanager
def removed(pipe: DiffusionPipeline, arch: AnyArchitecture) -> Iterator[DiffusionPipeline]:
    """Within this context a pipeline runs without some blocks; nothing is copied, and they are back when it ends.

    >>> import blockprune as bp
    >>> pipe = bp.load_pipeline("tiny-digits")
    >>> with bp.removed(pipe, "mid_block"):
    ...     pipe.unet.num_parameters() < bp.graph(pipe).total.params
    True
    >>> pipe.unet.num_parameters() == bp.graph(pipe).total.params
    True
    """
    wanted = _architecture(pipe, arch)
    with surgery.removed(getattr(pipe, _network_of(pipe)), wanted, fitted_weights(of_pipeline(pipe), wanted)):
        yield pipe


def save(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Writes a pipeline, pruned or not, to a new folder that `load_pipeline` reads.

    Where a stock configuration can describe the pruned network, plain diffusers reads it, too. Raises UserError where the folder is
    there already, and leaves none behind when anything fails.

    >>> import tempfile, blockprune as bp
    >>> small = bp.prune(bp.load_pipeline("tiny-digits"), "mid_block")
    >>> folder = tempfile.mkdtemp()
    >>> bp.save(small, folder)
    >>> bp.load_pipeline(folder).unet.num_parameters() == small.unet.num_parameters()
    True
    """
    save_pipeline(pipe, Path(folder))


def _network_of(pipe: DiffusionPipeline) -> str:
    """What a pipeline calls its denoising network."""
    return family_of(pretrained.configs_of(pipe).unet).network


def _architecture(pipe: DiffusionPipeline, arch: AnyArchitecture) -> Architecture:
    blocks = graph(pipe)
    return blocks.check(arch) if isinstance(arch, Architecture) else presets.parse(str(arch), blocks)


def distill(
    model: AnyModel | None = None,
    arch: Architecture | str | Path | None = None,
    *,
    request: TrainRequest | None = None,
    data: Any = None,
    steps: int | None = None,
    out: str | Path | None = None,
    progress: Listener | None = None,
    **fields: Any,
) -> TrainResult:
    """Trains the student of an architecture against its teacher, by knowledge distillation.

    `arch` is an Architecture, a preset, block names or a JSON file; `steps` are updates, `max_train_steps` of `TrainRequest`, whose
    other fields are keywords, too, or come as a `request`. `data` is a folder, .tar shards, a `blockprune cache` folder, or any
    dataset with a length whose items are (image, caption): PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W); None
    means the model's own. A pipeline that is given stays as it was. With `out`, a run directory with checkpoints is written, and
    the same call again goes on.

    >>> import blockprune as bp
    >>> trained = bp.distill(arch="mid-removed", steps=2, train_batch_size=2, n_images=2, denoising_steps=1, progress=bp.Silent())
    >>> [row.step for row in trained.rows]
    [1, 2]
    """
    if arch is not None:
        fields["arch"] = (",".join(arch.terms) or "full") if isinstance(arch, Architecture) else str(arch)
    if steps is not None:
        fields["max_train_steps"] = steps
    if isinstance(data, str | Path):
        fields["data"], data = str(data), None
    if model is not None:
        if "teacher" in fields:
            raise UserError("two teachers: give the model, or teacher=(...) for several in succession")
        fields["teacher"] = (_name(model),)
    asked = replace(request, **fields) if request else TrainRequest.from_mapping(fields, "TrainRequest(...)")
    given = of_pipeline(model, asked.resolution) if isinstance(model, DiffusionPipeline) else None
    folder = _run_folder(out)
    with progress or (Silent() if helps() else Bars()) as listener:
        return TrainResult(run_distill(given, asked, folder, listener, data))


def personalise(
    model: AnyModel | None = None,
    instance_data_dir: str | Path | None = None,
    instance_prompt: str | None = None,
    *,
    request: PersonaliseRequest | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    progress: Listener | None = None,
    **fields: Any,
) -> PersonaliseResult:
    """Teaches a model a subject from a few images (DreamBooth): all of its weights, or with a `rank` a LoRA.

    With a `protocol` it learns every subject of a dataset, each anew.

    `steps` are updates, `max_train_steps` of `PersonaliseRequest`, whose other fields are keywords, too, or come as a `request`.
    A pipeline that is given, pruned or not, stays as it was. With `out`, a run directory with checkpoints is written, and the same
    call again goes on.

    >>> import tempfile, blockprune as bp
    >>> from PIL import Image
    >>> folder = tempfile.mkdtemp()
    >>> for i in range(3):
    ...     Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(f"{folder}/{i}.png")
    >>> quick = dict(steps=2, n_images=2, denoising_steps=1, progress=bp.Silent())
    >>> found = bp.personalise("tiny-digits", folder, "bold upright: sks top left", rank=2, **quick)
    >>> [row.step for row in found.rows], sorted(found.scores)
    ([1, 2], ['clip_i', 'clip_t', 'dino', 'train_memory', 'train_time'])
    """
    given = {"instance_data_dir": instance_data_dir, "instance_prompt": instance_prompt, "max_train_steps": steps}
    given |= {"model": None if model is None else _name(model)}
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    fields |= {name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value is not None}
    asked = replace(request, **fields) if request else PersonaliseRequest.from_mapping(fields, "PersonaliseRequest(...)")
    opened = of_pipeline(model, asked.resolution) if isinstance(model, DiffusionPipeline) else None
    folder = _run_folder(out)
    with progress or (Silent() if helps() else Bars()) as listener:
        if asked.protocol:
            return PersonaliseResult(run_benchmark(opened, asked, folder, listener).run)
        learnt = run_personalise(opened, asked, folder, listener)
        return PersonaliseResult(learnt.run, learnt)


def _run_folder(out: str | Path | None) -> Path | None:
    """The run directory, of which nothing is known that forbids writing there; None for a run in memory."""
    if out is not None:
        check_run_folder(Path(out))
    return None if out is None else Path(out)


def _name(model: AnyModel) -> str:
    if isinstance(model, DiffusionPipeline):
        return str(model.config.get("_name_or_path") or type(model).__name__)
    return str(model)


def _asked(kind: type[R], request: R | None, model: AnyModel | None, fields: dict[str, Any]) -> R:
    """The request that is given, or the one of these fields."""
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    if request is not None:
        return replace(request, **fields)
    if model is not None:
        fields["model"] = _name(model)
    return kind.from_mapping(fields, f"{kind.__name__}(...)")


def _opened(model: AnyModel | None, asked: OnModel) -> Model:
    if isinstance(model, DiffusionPipeline):
        return of_pipeline(model, asked.resolution)
    return load_model(asked.model, asked.resolution, device_of(asked.device), getattr(torch, asked.dtype))
