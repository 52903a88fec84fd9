"""`blockprune cost`: parameters, multiply-adds and, on demand, measured latency and memory of teacher and student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockprune.cli import options
from blockprune.errors import UserError
from blockprune.model.architecture import CONVENTIONS, Architecture, BlockGraph, Cost

if TYPE_CHECKING:
    from rich.console import Console

    from blockprune.cost.latency import Timing
    from blockprune.model.pretrained import Configs


def cost(
    model: options.Model = "tiny-digits",
    arch: Annotated[
        list[str] | None, typer.Option(help="What is removed: a preset, block names, or a JSON file; repeat to compare several.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of one image.")] = 25,
    resolution: options.Resolution = None,
    macs: options.Macs = "thop",
    as_json: options.AsJson = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the counts with the thop and fvcore packages.")] = False,
    components: Annotated[
        bool, typer.Option("--components", help="Each part for all architectures side by side; with --latency, time each.")
    ] = False,
    latency: Annotated[bool, typer.Option("--latency", help="Measure a U-Net step, with random weights.")] = False,
    rounds: Annotated[int, typer.Option(help="Measured steps of each, teacher and student in turn.")] = 20,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    batch_size: Annotated[int, typer.Option(help="Rows of the measured U-Net step; guidance takes two per image.")] = 1,
) -> None:
    """Show what the U-Net and the whole pipeline cost, teacher and student side by side.

    Whole: text encoders once, the U-Net per step, the VAE decoder once; one image, no doubling for guidance.
    """
    from blockprune.cost.components import component_costs, pipeline_costs, unet_inputs
    from blockprune.cost.components import verify as verified
    from blockprune.model.presets import parse
    from blockprune.model.pretrained import configs
    from blockprune.model.trace import trace

    convention, archs = options.convention(macs), arch or ["full"]
    if len(archs) > 1 and not components:
        raise UserError("several --arch are compared part by part: add --components, or give one")
    if components and (verify or batch_size != 1):
        raise UserError("--components goes without --verify and --batch-size: leave them out")
    if latency:
        options.at_least("--rounds", rounds, 5)
        where, precision = options.device_of(device), options.dtype_of(dtype)
    parts = configs(model)
    latent = parts.latent(resolution)
    found = trace(parts.unet, latent, parts.n_tokens)
    students = {text: parse(text, found) for text in archs}
    others = pipeline_costs(parts, latent)
    if components:
        costs = {"teacher": found.total} | {text: found.cost(a) for text, a in students.items() if a}
        timings = _time_components(parts, students, latent, steps, rounds, where, precision) if latency else {}
        lines = {who: component_costs(others, unet, steps) for who, unet in costs.items()}
        _print_components(model, lines, timings, steps, convention, as_json)
        return
    (label, student), *_ = students.items()
    full, kept = (component_costs(others, found.cost(a), steps) for a in (Architecture(), student))
    data = _said(model, label, student, steps, found, full, kept)
    if verify:
        data["verify"] = verified(parts, student, latent)
    if latency:
        inputs = unet_inputs(parts.unet, latent, parts.n_tokens, batch_size, where, precision)
        timed = {"device": str(where), "dtype": dtype, "batch_size": batch_size}
        data["latency"] = timed | _measure(parts, student, inputs, rounds)
    if as_json:
        options.print_json(data)
        return
    _print(options.console(), data, full, kept, convention)


def _said(
    model: str, label: str, student: Architecture, steps: int, graph: BlockGraph, full: Mapping[str, Cost], kept: Mapping[str, Cost]
) -> dict[str, Any]:
    """Teacher and student as JSON data."""
    data = {
        "model": model,
        "label": label,
        "architecture": student.to_json(),
        "steps": steps,
        "latent": list(graph.latent),
        "n_tokens": graph.n_tokens,
    }
    return data | _to_json(kept) | {"teacher": _to_json(full), "reduction": _reductions(full, kept)}


def _time_components(
    parts: Configs, students: Mapping[str, Architecture], latent: tuple[int, int], steps: int, rounds: int, device: Any, dtype: Any
) -> dict[str, dict[str, Timing]]:
    """Each part of the teacher and of every student, in turn; students are masks on one U-Net of random weights."""
    from blockprune.cost.components import random_unet, time_components

    unet = random_unet(parts.unet, Architecture(), device, dtype)
    masked = {"teacher": (unet, Architecture())} | {text: (unet, arch) for text, arch in students.items() if arch}
    return time_components(parts, masked, latent, steps, rounds)


def _print_components(
    model: str,
    lines: Mapping[str, Mapping[str, Cost]],
    timings: Mapping[str, Mapping[str, Timing]],
    steps: int,
    convention: str,
    as_json: bool,
) -> None:
    from blockprune.cli.console import print_components
    from blockprune.cli.outputs import component_row
    from blockprune.cost.components import component_title

    rows = [
        component_row(component_title(name, steps), who, cost, timings[name][who].median_s if timings else None)
        for who, costs in lines.items()
        for name, cost in costs.items()
        if steps > 1 or name != "unet_steps"
    ]
    if as_json:
        options.print_json({"model": model, "steps": steps, "components": rows})
    else:
        print_components(rows, options.console(), convention)


def _to_json(rows: Mapping[str, Cost]) -> dict[str, Any]:
    return {name: c.to_json() for name, c in rows.items()}


def _reductions(full: Mapping[str, Cost], kept: Mapping[str, Cost]) -> dict[str, Any]:
    """What share of the teacher's cost is gone, 0 to 1."""
    return {
        name: {
            "params": 1 - kept[name].params / full[name].params,
            "macs": {c: 1 - kept[name].macs(c) / full[name].macs(c) for c in CONVENTIONS},
        }
        for name in ("unet", "pipeline")
    }


def _measure(parts: Configs, student: Architecture, inputs: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    from blockprune.cost.components import random_unet
    from blockprune.cost.latency import measure, ratio
    from blockprune.model.surgery import removed

    sample = inputs["sample"]
    unet = random_unet(parts.unet, Architecture(), sample.device, sample.dtype)
    models = {"teacher": lambda: removed(unet, Architecture()), "student": lambda: removed(unet, student)}
    timings = measure(models, inputs, n=rounds, device=sample.device)
    value, low, high = ratio(timings["teacher"], timings["student"])
    return {label: t.to_json() for label, t in timings.items()} | {"ratio": {"value": value, "low": low, "high": high}}


def _print(
    console: Console,
    data: Mapping[str, Any],
    full: Mapping[str, Cost],
    kept: Mapping[str, Cost],
    convention: str,
) -> None:
    from rich.table import Table

    from blockprune.cost.components import component_title

    table = Table(title=f"{data['model']}, student: {data['label']}", title_justify="left")
    for name in ("", "params: teacher", "student", "saved", f"MACs ({convention}): teacher", "student", "saved"):
        table.add_column(name, justify="right" if name else "left")
    for name, teacher in full.items():
        student = kept[name]
        if name == "pipeline":
            table.add_section()
        numbers = *_pair(teacher.params, student.params), *_pair(teacher.macs(convention), student.macs(convention))
        table.add_row(component_title(name, data["steps"]), *numbers)
    console.print(table)
    c, h, w = data["latent"]
    console.print(f"one image, {c}x{h}x{w} latent, no doubling for guidance; 1 MAC = one multiply-add")
    for name, tools in data.get("verify", {}).items():
        console.print(
            f"verified {name}: thop {tools['thop']:,} and fvcore {tools['fvcore']:,} MACs (norms left out) agree with these counts"
        )
    if "latency" in data:
        _print_timings(console, data["latency"])


def _pair(teacher: int, student: int) -> tuple[str, str, str]:
    return f"{teacher:,}", f"{student:,}", f"{1 - student / teacher:.1%}"


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
