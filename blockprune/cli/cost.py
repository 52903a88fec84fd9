"""`blockprune cost`: parameters, multiply-adds and, on demand, measured latency and memory of teacher and student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockprune.cli import options
from blockprune.cli.command import command
from blockprune.errors import UserError
from blockprune.export.runtimes import RUNTIMES, TORCH
from blockprune.model.defaults import MOST_BATCH, MOST_STEPS
from blockprune.request import Bounds, option
from blockprune.stages.fields import MEASURES, REMOVE, SAMPLING, SCALE, OnModel

if TYPE_CHECKING:
    from rich.console import Console

    from blockprune.model.architecture import Architecture
    from blockprune.model.graph import BlockGraph, Cost
    from blockprune.model.pretrained import Configs

MOST_ROUNDS = 10**5


@dataclass(frozen=True, kw_only=True)
class CostRequest(OnModel):
    """What is priced, and whether it is timed as well."""

    arch: tuple[str, ...] = option(
        ("full",), "what is removed: a preset, block names, or a JSON file; repeat to compare several", REMOVE
    )
    steps: int = option(25, "denoising steps of one image", SAMPLING, least=1, most=MOST_STEPS)
    verify: bool = option(False, "check the counts with the thop and fvcore packages", MEASURES)
    components: bool = option(False, "with --latency, time each part; with --json, a row for each part and architecture", MEASURES)
    latency: bool = option(False, "measure a U-Net step, with random weights", MEASURES)
    rounds: int = option(20, "measured steps of each, teacher and student in turn", MEASURES, least=1, most=MOST_ROUNDS)
    batch_size: int = option(1, "rows of the measured U-Net step; guidance takes two per image", SCALE, least=1, most=MOST_BATCH)

    runtime: tuple[str, ...] = option(
        (TORCH,),
        "what runs the measured step, several with commas between",
        MEASURES,
        choices=RUNTIMES,
        commas=True,
    )

    def check(self) -> None:
        if self.runtime != (TORCH,) and (not self.latency or self.components):
            raise UserError("--runtime says what runs the step that --latency measures: add --latency, without --components")
        if self.runtime != (TORCH,) and (self.device not in (None, "cpu") or self.dtype != "float32"):
            raise UserError("--runtime measures on the CPU in float32: leave out --device and --dtype")
        if len(self.arch) > 1 and not self.components and (self.latency or self.verify):
            raise UserError("several --arch are timed part by part, and checked one by one: add --components, or give one")
        if self.components and (self.verify or self.batch_size != 1):
            raise UserError("--components goes without --verify and --batch-size: leave them out")
        if self.latency:
            Bounds(5, MOST_ROUNDS).check("--rounds", self.rounds)


def run(request: CostRequest, macs: options.Macs = "thop", as_json: options.AsJson = False) -> None:
    from blockprune.model.presets import parse
    from blockprune.model.pretrained import configs
    from blockprune.model.trace import trace

    convention = options.convention(macs)
    if request.runtime != (TORCH,):
        from blockprune.export.runtimes.network import check_runtime

        for name in request.runtime:
            check_runtime(name)
    parts = configs(request.model)
    graph = trace(parts.unet, parts.latent(request.resolution), parts.n_tokens)
    students = {text: parse(text, graph) for text in request.arch}
    show = _components if request.components else _side_by_side
    show(request, parts, graph, students, convention, as_json)


def _place(request: CostRequest) -> tuple[Any, Any]:
    import torch

    from blockprune.model.device import device_of

    return device_of(request.device), getattr(torch, request.dtype)


def _components(
    request: CostRequest, parts: Configs, graph: BlockGraph, students: Mapping[str, Architecture], convention: str, as_json: bool
) -> None:
    from blockprune.cli.console import print_components
    from blockprune.cost.components import pipeline_costs, time_students
    from blockprune.cost.table import components

    latent = parts.latent(request.resolution)
    costs = {"teacher": graph.total} | {text: graph.cost(arch) for text, arch in students.items() if arch}
    timings = time_students(parts, students, latent, request.steps, request.rounds, *_place(request)) if request.latency else None
    rows = list(components(pipeline_costs(parts, latent), costs, request.steps, timings))
    if as_json:
        data = [{"kind": "component", **row.to_json()} for row in rows]
        options.print_json({"model": request.model, "steps": request.steps, "components": data})
    else:
        print_components(rows, options.console(), convention)


def _side_by_side(
    request: CostRequest, parts: Configs, graph: BlockGraph, students: Mapping[str, Architecture], convention: str, as_json: bool
) -> None:
    from blockprune.cli.console import print_components
    from blockprune.cost.components import pipeline_costs
    from blockprune.cost.table import components

    others = pipeline_costs(parts, parts.latent(request.resolution))
    priced = {text: _priced(request, graph, others, text, arch) for text, arch in students.items()}
    measured = _measured(request, parts, next(iter(students.values())))
    if as_json:
        one, *more = priced.values()
        options.print_json({"model": request.model, "students": [one, *more]} if more else one | measured)
        return
    console = options.console()
    costs = {"teacher": graph.total} | {text: graph.cost(arch) for text, arch in students.items() if arch}
    c, h, w = graph.latent
    console.print(f"{request.model}, {c}x{h}x{w} latent")
    print_components(list(components(others, costs, request.steps)), console, convention)
    _print_measured(console, measured)


def _priced(request: CostRequest, graph: BlockGraph, others: Mapping[str, Cost], text: str, arch: Architecture) -> dict[str, Any]:
    """What a student costs beside its teacher, part by part, exactly."""
    from blockprune.cost.table import component_costs, reductions

    full, kept = (component_costs(others, cost, request.steps) for cost in (graph.total, graph.cost(arch)))
    names = {"model": request.model, "label": text, "architecture": arch.to_json(), "steps": request.steps}
    data: dict[str, Any] = {**names, "latent": list(graph.latent), "n_tokens": graph.n_tokens, **_to_json(kept)}
    return data | {"teacher": _to_json(full), "reduction": reductions(full, kept)}


def _measured(request: CostRequest, parts: Configs, student: Architecture) -> dict[str, Any]:
    """What was asked to be checked or timed of a student."""
    from blockprune.cost.components import time_step, verify

    latent, data = parts.latent(request.resolution), dict[str, Any]()
    if request.verify:
        data["verify"] = verify(parts, student, latent)
    if request.latency and request.runtime != (TORCH,):
        from blockprune.export.runtimes.network import time_runtimes

        data["runtimes"] = time_runtimes(parts, student, latent, request.batch_size, request.runtime, request.rounds)
    elif request.latency:
        device, dtype = _place(request)
        timed = {"device": str(device), "dtype": request.dtype, "batch_size": request.batch_size}
        data["latency"] = timed | time_step(parts, student, latent, request.batch_size, request.rounds, device, dtype)
    return data


def _to_json(rows: Mapping[str, Cost]) -> dict[str, Any]:
    return {name: c.to_json() for name, c in rows.items()}


def _print_measured(console: Console, data: Mapping[str, Any]) -> None:
    for name, tools in data.get("verify", {}).items():
        console.print(
            f"verified {name}: thop {tools['thop']:,} and fvcore {tools['fvcore']:,} MACs (norms left out) agree with these counts"
        )
    if "latency" in data:
        _print_timings(console, data["latency"])
    if "runtimes" in data:
        _print_runtimes(console, data["runtimes"])


def _print_timings(console: Console, data: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        title=f"measured U-Net step: {data['device']}, {data['dtype']}, batch {data['batch_size']}, random weights",
        title_justify="left",
    )
    for name in ("", "median ms", "quartiles ms", "rounds", "peak MiB"):
        table.add_column(name, justify="right" if name else "left")
    for label in ("teacher", "student"):
        t = data[label]
        ms = [f"{1000 * t[k]:.2f}" for k in ("median_s", "q25_s", "q75_s")]
        table.add_row(label, ms[0], f"{ms[1]} to {ms[2]}", str(t["n"]), f"{t['mem_bytes'] / 2**20:.1f}")
    console.print(table)
    r = data["ratio"]
    console.print(f"student / teacher, paired by round: {r['value']:.3f} (95 % interval {r['low']:.3f} to {r['high']:.3f})")
    console.print("peak: the model's own weights plus the most one step had allocated in torch")


def _print_runtimes(console: Console, data: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="measured U-Net step, cpu, float32, random weights, all in turn", title_justify="left")
    for name in ("", "teacher ms", "student ms", "student / teacher", "95 % interval"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in data.items():
        ms, r = [f"{1000 * row[who]['median_s']:.2f}" for who in ("teacher", "student")], row["ratio"]
        table.add_row(name, *ms, f"{r['value']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}")
    console.print(table)


cost = command(
    CostRequest,
    run,
    """Show what the U-Net and the whole pipeline cost, teacher and student side by side.

    Whole: text encoders once, the U-Net per step, the VAE decoder once; one image, no doubling for guidance.""",
    "blockprune cost --model sd-v1-5 --arch bk-sdm-small",
    "blockprune cost --arch bk-sdm-base --arch bk-sdm-tiny",
    "blockprune cost --arch bk-sdm-base --components --latency",
    "blockprune cost --arch bk-sdm-small --latency --runtime torch,onnxruntime,openvino",
)
