"""Which blocks of a diffusion U-Net can go, what each one costs in quality, and how to get a good smaller model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockprune.export.pipeline import load_pipeline

__all__ = ["load_pipeline"]


def __getattr__(name: str) -> Any:
    """`load_pipeline`, imported on first use, so that the package itself loads without torch."""
    if name != "load_pipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blockprune.export.pipeline import load_pipeline

    return load_pipeline
