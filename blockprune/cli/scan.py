"""`blockprune scan`: score every removal without retraining."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockprune.cli import options
from blockprune.cli.measuring import plan_of, terms
from blockprune.errors import UserError
from blockprune.model.architecture import Architecture, BlockGraph
from blockprune.runs.records import Score, measure

if TYPE_CHECKING:
    from blockprune.cli.console import WorkProgress
    from blockprune.measures.examiner import Plan
    from blockprune.runs.directory import Run
    from blockprune.stages.inputs import Bench


def scan(
    model: options.Model = "tiny-digits",
    unit: Annotated[str | None, typer.Option(help="what to remove one by one: stage, pair, block (default) or layer")] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help="an architecture to score: preset, block names or JSON file; repeatable")
    ] = None,
    measures: Annotated[str | None, typer.Option(help="comma-separated; default: all that have what they need")] = None,
    n_images: options.NImages = None,
    steps: options.Steps = None,
    cfg_scale: options.CfgScale = None,
    scheduler: options.Scheduler = "",
    eps_samples: options.EpsSamples = None,
    data: options.Data = None,
    prompts: options.Prompts = None,
    reference: options.Reference = None,
    detector: options.Detector = None,
    inception_weights: options.InceptionWeights = None,
    clip: options.Clip = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    resolution: options.Resolution = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="run directory; the same command again resumes it")] = None,
) -> None:
    """Score the teacher and every single removal, without retraining."""
    opts = dict(locals()) | {"out": out or options.default_out("scan", Path(model).name)}
    from blockprune.stages import inputs

    if opts["measures"]:
        opts["measures"] = [measure(name.strip()) and name.strip() for name in opts["measures"].split(",")]
    bench = inputs.load_bench(model, resolution, options.device_of(device), options.dtype_of(dtype))
    opts |= {name: value for name, value in bench.defaults.items() if opts.get(name) is None}
    archs = _archs(bench.graph, unit, arch or [])
    plan = plan_of(bench, opts, opts["measures"])
    with _open(bench, opts, plan, archs) as run:
        _run(run, bench, archs, plan)


def _archs(graph: BlockGraph, unit: str | None, texts: list[str]) -> dict[str, Architecture]:
    """The removals of `unit` and the architectures named on the command line; every block where neither is given."""
    from blockprune.model.presets import parse

    chosen = graph.units(unit or "block") if unit or not texts else {}
    if (unit or not texts) and not chosen:
        raise UserError(f"this U-Net has no removable unit {unit!r}: see `blockprune graph`")
    for text in texts:
        label = Path(text).stem if text.endswith(".json") else text
        if (known := chosen.get(label)) is not None and known != parse(text, graph):
            raise UserError(f"two architectures are called {label!r}: rename one file")
        chosen[label] = parse(text, graph)
    return {label: arch for label, arch in chosen.items() if arch}


def _open(bench: Bench, opts: Mapping[str, Any], plan: Plan, archs: Mapping[str, Architecture]) -> Run:
    """The run directory. Only what changes the numbers is compared when it is opened again."""
    from blockprune.runs.directory import Run
    from blockprune.stages import inputs

    asked = terms(bench, opts, plan) | {"measures": plan.measures}
    asked |= {"removals": inputs.fingerprint([f"{label}:{arch.key}" for label, arch in archs.items()])}
    note = {
        "made_with": inputs.made_with(bench.pipe.device),
        "archs": {label: list(arch) for label, arch in {"full": Architecture(), **archs}.items()},
        "graph": bench.graph.to_json(),
        "pictured_prompts": [plan.prompts[i % len(plan.prompts)] for i in range(plan.n_pictures)],
    }
    return Run(opts["out"], "scan", asked, note)


def _run(run: Run, bench: Bench, archs: Mapping[str, Architecture], plan: Plan) -> None:
    """Runs or resumes the scan, keeps every record as it comes, then writes and prints the reports."""
    from dataclasses import replace

    from blockprune.cli import console, outputs
    from blockprune.stages.scan.scan import Part, Picture, Scan

    done = {(row["label"], row["measure"]) for row in run.rows()}
    out, err = console.make_console(), console.make_console(stderr=True)
    with console.WorkProgress(err, _steps(plan, archs, done)) as progress:
        scan = Scan(
            bench.pipe, bench.graph, archs, replace(plan, tick=progress.tick), done, lambda n: outputs.recall_arrays(run.path, n)
        )
        for record in scan:
            if isinstance(record, Part):
                outputs.keep_arrays(run, record.name, record.arrays)
            elif isinstance(record, Picture):
                outputs.keep_picture(run, archs.get(record.label, Architecture()), record.images)
            else:
                run.append(record.to_json())
                _say(progress, record)
    console.print_ranking(outputs.write_reports(run), out)
    out.print(f"rows, tables, figures and report.md are in {run.path}")


def _steps(plan: Plan, archs: Mapping[str, Architecture], done: set[tuple[str, str]]) -> dict[str, int]:
    """What is left to do, in images or samples."""
    from blockprune.stages.scan.scan import speed_measures

    steps = {measure: plan.n_noisy * len(archs) for measure in plan.denoising_measures}
    if "latency" in plan.measures:
        steps["latency"] = sum((label, speed_measures(label)[0]) not in done for label in ("full", *archs))
    left = [label for label in ("full", *archs) if any((label, m) not in done for m in plan.image_measures)]
    return steps | dict.fromkeys(left, plan.protocol.n_images)


def _say(progress: WorkProgress, score: Score) -> None:
    """One line for each row that took work to get."""
    if score.error:
        progress.say(f"{score.label}: {score.measure} failed: {score.error}", "red")
    elif score.measure in ("eps_mse", "fid"):
        spread = f" ({score.low:.4g} to {score.high:.4g})" if score.low is not None and score.high is not None else ""
        progress.say(f"{score.label}: {score.measure} {score.value:.4g}{spread}")
