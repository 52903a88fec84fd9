"""`blockprune search`: the best removal set under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockprune.cli import options
from blockprune.errors import UserError
from blockprune.runs.directory import read_run
from blockprune.stages.search.budget import amount

OBJECTIVES = ("eps_mse", "guided_mse", "fid", "kid", "feature_distance", "clip_score")
SAMPLERS = ("tpe", "gp", "nsga2", "random")
PARETO = ("params", "macs", "latency")
SCOPES = ("pipeline", "unet")


def search(
    model: options.Model = "tiny-digits",
    budget: Annotated[
        list[str] | None,
        typer.Option(help="0.66B, 480M (parameters), 220GMACs, 70ms, 65%params, 65%macs, 65%latency; repeatable, all must hold"),
    ] = None,
    scope: Annotated[str, typer.Option(help="what parameters are counted: pipeline, as the papers do, or unet")] = "pipeline",
    macs: options.Macs = "thop",
    unit: Annotated[str, typer.Option(help="what may go: stage, pair, block, layer, or several as in block,layer")] = "block",
    keep: Annotated[str | None, typer.Option(help="blocks that must stay, comma-separated; * and {a,b} stand for several")] = None,
    objective: Annotated[str, typer.Option(help=f"what is made best: {', '.join(OBJECTIVES)}")] = "guided_mse",
    trials: Annotated[int, typer.Option(help="architectures to score, the removals of single units among them")] = 200,
    sampler: Annotated[str, typer.Option(help=f"Optuna's sampler after the exact solution: {', '.join(SAMPLERS)}")] = "tpe",
    finalists: Annotated[int, typer.Option(help="how many are scored again on fresh seeds, presets besides")] = 4,
    final_factor: Annotated[int, typer.Option(help="how many times more samples the finalists get")] = 4,
    random: Annotated[int, typer.Option(help="random sets to score as well, for comparison in the report")] = 0,
    recover: Annotated[int, typer.Option(help="updates of distillation for every finalist before the choice; 0 for none")] = 0,
    recover_batch_size: Annotated[int, typer.Option(help="images of each such update")] = 8,
    train_data: Annotated[str | None, typer.Option(help="training pairs for --recover: see `blockprune distill --data`")] = None,
    pareto: Annotated[str | None, typer.Option(help=f"a front over a sweep of sizes: {', '.join(PARETO)}")] = None,
    solve_only: Annotated[
        bool, typer.Option("--solve-only", help="no forward pass: solve exactly on the scores of --from-scan")
    ] = False,
    from_scan: Annotated[Path | None, typer.Option(help="run directory of a scan or search whose scores are taken over")] = None,
    workers: Annotated[int, typer.Option(help="processes on this machine")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL, such as postgresql://…, shared by hosts; default: in --out")
    ] = None,
    study_name: Annotated[str | None, typer.Option(help="name of the study in the storage; default: the name of --out")] = None,
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
    out: Annotated[
        Path | None, typer.Option(help="run directory; the same command again goes on; --solve-only writes only where it is given")
    ] = None,
) -> None:
    """Find the removal set that loses least within a budget, and write it to best.json; or a front, to pareto.json."""
    opts = _checked(dict(locals()))
    from blockprune.cli import searching

    folder = out or options.default_out("search", Path(model).name)
    opts["study_name"] = study_name or folder.name
    if solve_only:
        searching.solve_only(opts)
    else:
        searching.run(opts, folder)


def _checked(opts: dict[str, Any]) -> dict[str, Any]:
    """The options, where nothing in them is wrong by itself."""
    if opts["from_scan"]:
        read_run(opts["from_scan"])
    opts |= {"budget": opts["budget"] or [], "from_scan": opts["from_scan"] and str(opts["from_scan"])}
    for name, known in {"objective": OBJECTIVES, "sampler": SAMPLERS, "pareto": PARETO, "scope": SCOPES}.items():
        if opts[name] is not None and opts[name] not in known:
            raise UserError(f"unknown {name} {opts[name]!r}: choose from {', '.join(known)}")
    options.convention(opts["macs"])
    for text in opts["budget"]:
        amount(text)
    if not opts["budget"] and not opts["pareto"]:
        raise UserError("no budget: give --budget, such as 65%params or 0.66B, or --pareto for a front")
    if opts["workers"] > 1 and str(opts["storage"] or "").startswith("sqlite"):
        raise UserError(
            "SQLite lets two workers take one trial: with --workers leave --storage out or give a PostgreSQL URL, or use one worker"
        )
    return opts
