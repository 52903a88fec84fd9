"""Measured, never summed: latency and peak memory of U-Net steps, teacher and students interleaved A B A B."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Model = Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Timing:
    """The step latencies of one model in seconds, in order of measurement, and the bytes that a step needs at its peak.

    `mem_bytes` is the model's own weights plus the most that one step had allocated at once, as torch's allocator counts it: not
    what the driver, the allocator's cache or a maths library's scratch space hold beside that; 0 where it was not measured. `over`
    is the `ratio` to another timing of the same rounds, None where there is none to compare with.
    """

    latency_s: tuple[float, ...]
    mem_bytes: int
    over: tuple[float, float, float] | None = None

    @property
    def median_s(self) -> float:
        return float(np.median(self.latency_s))

    @property
    def quartiles_s(self) -> tuple[float, float]:
        low, high = np.percentile(self.latency_s, [25, 75])
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        low, high = self.quartiles_s
        return {"median_s": self.median_s, "q25_s": low, "q75_s": high, "n": len(self.latency_s), "mem_bytes": self.mem_bytes}


def ratio(teacher: Timing, student: Timing, seed: int = 0, n_resamples: int = 2000) -> tuple[float, float, float]:
    """Student's latency over the teacher's: the median over rounds of the paired ratio, and its 95 % bootstrap interval."""
    ratios = np.asarray(student.latency_s) / np.asarray(teacher.latency_s)
    return float(np.median(ratios)), *median_interval(ratios, seed, n_resamples)


def median_interval(values: ArrayLike, seed: int = 0, n_resamples: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median of (N,) values."""
    x = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(x), size=(n_resamples, len(x)))
    low, high = np.percentile(np.median(x[rows], axis=1), [2.5, 97.5])
    return float(low), float(high)


def fitted_savings(alone: ArrayLike, sets: ArrayLike, saved: ArrayLike) -> list[float]:
    """What each of U units saves, in seconds, so that sums come near the (K,) savings measured of K sets of units.

    `alone` (U,) is what each saves by itself, `sets` (K, U) says which are in a set. Ridge regression towards `alone`, scaled by
    the ratio of all that was measured to its sum; never below 0.
    """
    x, y, prior = (np.asarray(a, dtype=np.float64) for a in (sets, saved, np.clip(alone, 0, None)))
    total = (x @ prior).sum()
    centre = prior * (y.sum() / total if total > 0 else 1.0)
    pull = x.sum() / max(1, x.shape[1]) + 1e-12  # as if each unit had been seen alone as often as in the sets
    step = np.linalg.solve(x.T @ x + pull * np.eye(x.shape[1]), x.T @ (y - x @ centre))
    return np.clip(centre + step, 0, None).tolist()


def measure(
    models: Mapping[str, Model],
    inputs: Mapping[str, Any],
    n: int = 20,
    n_warmup: int = 3,
    device: str | torch.device = "cpu",
    memory: Collection[str] | None = None,
) -> dict[str, Timing]:
    """Timings by label: `n` rounds, each one step of every model in turn, after `n_warmup` such rounds.

    A model is a function that gives a context with the U-Net to run, such as `lambda: nullcontext(unet)` or
    `lambda: removed(unet, arch)`; entering it is not timed. `inputs` are keyword arguments of the forward, on `device`.
    `memory` names the models whose memory is measured, None for all; on a processor that takes as long as eight steps.
    """
    clock = _cuda_step if torch.device(device).type == "cuda" else _cpu_step
    seconds: dict[str, list[float]] = {label: [] for label in models}
    mem_bytes = dict.fromkeys(models, 0)
    with torch.inference_mode():
        for i in range(n_warmup + n):
            for label, model in models.items():
                with model() as unet:
                    s = clock(unet, inputs)
                if i >= n_warmup:
                    seconds[label].append(s)
        for label in models if memory is None else memory:
            with models[label]() as unet:
                mem_bytes[label] = weight_bytes(unet) + peak_bytes(partial(unet, **inputs), device)
    return {label: Timing(tuple(seconds[label]), mem_bytes[label]) for label in models}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers as they are stored, each counted once."""
    return sum(_stored(t) for t in [*module.parameters(), *module.buffers()])


def _stored(t: Tensor) -> int:
    """A quantised tensor names the tensors it is made of; its own shape and precision are what it stands for."""
    inner = getattr(t, "__tensor_flatten__", None)
    if inner is None:
        return t.numel() * t.element_size()
    return sum(_stored(part) for name in inner()[0] if (part := getattr(t, name)) is not None)


def _cpu_step(unet: nn.Module, inputs: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    unet(**inputs)
    return time.perf_counter() - start


def _cuda_step(unet: nn.Module, inputs: Mapping[str, Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    unet(**inputs)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(step: Callable[[], Any], device: str | torch.device) -> int:
    """The most bytes that torch's allocator had out at once during one call, above what it had before."""
    return _cuda_peak(step) if torch.device(device).type == "cuda" else _cpu_peak(step)


def _cuda_peak(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(step: Callable[[], Any]) -> int:
    """The profiler logs every allocation and release. The process's resident size would not do: the C library keeps freed pages."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
            step()
        path = Path(folder, "trace.json")
        log.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return _running_peak([e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0])


def _running_peak(events: Sequence[Mapping[str, Any]]) -> int:
    now = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += int(event["args"]["Bytes"])
        most = max(most, now)
    return most
