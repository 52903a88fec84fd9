"""How long a run will take: its passes times what a pass takes, measured on this device or from a device's stated throughput."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import nn

from blockprune.assets import ASSETS
from blockprune.cost.components import Part, encoder_part, other_parts, pipeline_costs, random_unet, unet_inputs
from blockprune.cost.work import CONVENTION, Work
from blockprune.decode import read_toml
from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.pretrained import Configs
from blockprune.progress import duration

DEVICES = ASSETS / "devices.toml"
MEASURED_S = 2.0
LEAST_TIMES = 2


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device's stated throughput in multiply-adds (two operations each), and the share of it that a U-Net reaches."""

    tflops: Annotated[float, Meta(gt=0, le=1e6)]
    utilisation: Annotated[float, Meta(gt=0, le=1)]
    source: str

    @property
    def macs_per_s(self) -> float:
        return self.tflops * 1e12 / 2 * self.utilisation


@dataclass(frozen=True)
class Estimate:
    """How long some work takes, in seconds by step, and where that is known from."""

    work: Work
    seconds: Mapping[str, float]
    macs: float
    source: str

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def line(self) -> str:
        """All of it in one line."""
        w = self.work
        most = "at most " if w.at_most else ""
        passes = f"{most}{w.n_passes:,} passes of the U-Net ({self.macs / 1e12:.3g} T multiply-adds)"
        sizes = f"memory about {_bytes(w.mem_bytes)}, disk about {_bytes(w.disk_bytes)}"
        return f"{passes}: {most or 'about '}{duration(self.total_s)}, {sizes}; {self.source}"


def _bytes(n: int) -> str:
    return f"{n / 2**30:.3g} GiB" if n >= 2**30 else f"{n / 2**20:.3g} MiB"


def devices() -> dict[str, Device]:
    """The devices whose throughput is stated, by name."""
    return read_toml(DEVICES, dict[str, Device], "the list of devices", "install the package again")


def assumed(work: Work, configs: Configs, graph: BlockGraph, device: str) -> Estimate:
    """The estimate for a device of `devices`; UserError lists those there are."""
    known = devices()
    by_lower = {name.lower(): name for name in known}
    if device.lower() not in by_lower:
        near = difflib.get_close_matches(device.lower(), by_lower, n=1)
        hint = f"did you mean {by_lower[near[0]]}? " if near else ""
        raise UserError(f"unknown --assume {device[:60]!r}: {hint}choose from {', '.join(known)}")
    name = by_lower[device.lower()]
    about, costs = known[name], pipeline_costs(configs, graph.latent[1:])
    total = graph.total.macs(CONVENTION)
    macs: dict[str, float] = {}
    for p in work.passes:
        macs[p.step] = macs.get(p.step, 0.0) + p.in_rows * total
    if work.decoded:
        macs["VAE decoder"] = work.decoded * costs["vae_decoder"].macs(CONVENTION)
    if work.encoded:
        macs["VAE encoder"] = work.encoded * encoder_part(configs, graph.latent[1:]).count()[""].macs(CONVENTION)
    seconds = {step: n / about.macs_per_s for step, n in macs.items()}
    rate = f"{about.tflops:g} TFLOP/s, {about.utilisation:.0%} of it used: {about.source}"
    return Estimate(work, seconds, work.macs(graph), f"assumed, not measured: {name} ({rate})")


def measured(
    work: Work,
    configs: Configs,
    graph: BlockGraph,
    device: torch.device,
    dtype: torch.dtype,
    network: nn.Module | None = None,
) -> Estimate:
    """The estimate for this device, from about two seconds of passes of `network`; of one with random weights where that is None.

    What of the rows of a pass would take too long is reckoned from fewer rows.
    """
    network = network if network is not None else random_unet(configs.unet, Architecture(), device, dtype)
    latent = graph.latent[1:]
    kinds = dict.fromkeys((p.rows, p.learns) for p in work.passes)
    each_s = MEASURED_S / max(1, len(kinds) + bool(work.decoded) + bool(work.encoded))
    inputs = partial(unet_inputs, configs.unet, latent, configs.n_tokens, device=device, dtype=dtype)
    took = {(rows, learns): _of_rows(partial(_pass, network, inputs, learns), rows, device, each_s) for rows, learns in kinds}
    seconds: dict[str, float] = {}
    for p in work.passes:
        seconds[p.step] = seconds.get(p.step, 0.0) + p.n * p.share * took[p.rows, p.learns]
    if work.decoded:
        part = other_parts(configs, latent, device, dtype)["vae_decoder"]
        seconds["VAE decoder"] = work.decoded * _timed(partial(_run, part), device, each_s)
    if work.encoded:
        seconds["VAE encoder"] = work.encoded * _timed(partial(_run, encoder_part(configs, latent, device, dtype)), device, each_s)
    name = f"{device}, {str(dtype).removeprefix('torch.')}"
    return Estimate(work, seconds, work.macs(graph), f"measured on this device ({name}){_busy(device)}")


def _busy(device: torch.device) -> str:
    """Words for a processor whose cores are wanted by more than there are of them: then a pass takes longer than on a free one."""
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none, and some sandboxes do not tell it
        return ""
    return f" while it was busy: load {load:.1f} on {cores} cores" if device.type == "cpu" and load > cores else ""


def _pass(network: nn.Module, inputs: Callable[[int], Mapping[str, Any]], learns: bool, rows: int) -> None:
    """One pass over so many rows; one that learns leaves no gradients."""
    if not learns:
        with torch.inference_mode():
            network(**inputs(rows), return_dict=False)
        return
    needing = [p for p in network.parameters() if not p.requires_grad]
    try:
        with torch.enable_grad():
            for p in needing:
                p.requires_grad_(True)
            learnt = [p for p in network.parameters() if p.requires_grad]
            torch.autograd.grad(network(**inputs(rows), return_dict=False)[0].float().square().mean(), learnt, allow_unused=True)
    finally:
        for p in needing:
            p.requires_grad_(False)


def _run(part: Part) -> None:
    with torch.inference_mode():
        part.run()


def _of_rows(run: Callable[[int], None], rows: int, device: torch.device, limit_s: float) -> float:
    """Seconds of a call over `rows` rows: measured on 1, 2, 4 … of them while there is time, since few rows take longer each."""
    few, took = 1, _timed(partial(run, 1), device, 0)
    while few < rows and took < limit_s / 2:
        few = min(2 * few, rows)
        took = _timed(partial(run, few), device, 0)
    return took * rows / few


def _timed(run: Callable[[], None], device: torch.device, limit_s: float) -> float:
    """The median seconds of a call after a first one, of as many as fit into the limit, but `LEAST_TIMES`."""
    run()
    took: list[float] = []
    while len(took) < LEAST_TIMES or sum(took) < limit_s:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - begun)
    return sorted(took)[(len(took) - 1) // 2]
