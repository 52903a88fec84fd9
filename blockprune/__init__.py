"""Which blocks of a diffusion U-Net can go, what each one costs in quality, and how to get a good smaller model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockprune.api import distill, evaluate, graph, personalise, prune, removed, report, save, scan, search
    from blockprune.export.pipeline import load_pipeline
    from blockprune.model.architecture import Architecture
    from blockprune.model.graph import BlockGraph
    from blockprune.progress import Silent
    from blockprune.stages.estimates import estimate
    from blockprune.stages.search.budget import Budget

# name => the module that has it, imported on first use, so that the package itself loads without torch
_HOMES = {
    "Architecture": "model.architecture",
    "BlockGraph": "model.graph",
    "Budget": "stages.search.budget",
    "Silent": "progress",
    "distill": "api",
    "estimate": "stages.estimates",
    "evaluate": "api",
    "graph": "api",
    "load_pipeline": "export.pipeline",
    "personalise": "api",
    "prune": "api",
    "removed": "api",
    "report": "api",
    "save": "api",
    "scan": "api",
    "search": "api",
}
__all__ = [
    "Architecture",
    "BlockGraph",
    "Budget",
    "Silent",
    "distill",
    "estimate",
    "evaluate",
    "graph",
    "load_pipeline",
    "personalise",
    "prune",
    "removed",
    "report",
    "save",
    "scan",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"blockprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
