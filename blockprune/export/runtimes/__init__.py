"""Pipelines outside PyTorch: each component as a program, in the formats of other runtimes, compared with the original there.

Needs no torch by itself, so that a command can check what it is asked for before it loads anything.
"""

from blockprune.errors import UserError

TORCH, COMPILED = "torch", "torch-compile"
RUNTIMES = (TORCH, COMPILED, "onnxruntime", "openvino", "torch-export", "aot-inductor")  # what computes a network
PRECISIONS = ("float32", "float16", "int8")
# what a network is written in, for all runtimes but the first two, and in which precisions
FORMAT_PRECISIONS = {"onnx": PRECISIONS, **dict.fromkeys(("openvino", "torch-export", "aot-inductor"), ("float32", "float16"))}


def check_precision(format: str, precision: str) -> None:
    """Raises UserError, which lists those there are, for a format that is unknown, or a precision that it has not."""
    if format not in FORMAT_PRECISIONS:
        raise UserError(f"unknown format {format!r}: choose from {', '.join(FORMAT_PRECISIONS)}")
    if precision not in FORMAT_PRECISIONS[format]:
        raise UserError(f"{format} has no precision {precision!r} here: choose from {', '.join(FORMAT_PRECISIONS[format])}")
