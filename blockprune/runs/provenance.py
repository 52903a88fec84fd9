"""What a run records about itself: versions, the machine, and short hashes of what went in."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch


def fingerprint(values: Sequence[str]) -> str:
    """A 12-digit hash of a list of texts."""
    return hashlib.sha256("\0".join(values).encode()).hexdigest()[:12]


def made_with(device: torch.device) -> dict[str, str]:
    """Versions and the machine, for the record of a run."""
    packages = ("blockprune", "torch", "diffusers", "transformers", "numpy")
    n = torch.get_num_threads()
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {n} thread{'s' * (n != 1)}"
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, "processor": processor}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
