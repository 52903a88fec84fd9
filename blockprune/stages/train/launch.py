"""Where a training runs: on one device, or shared by the processes that `accelerate launch` or torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState

from blockprune.errors import UserError, first_line
from blockprune.model.device import device_of


def launched() -> bool:
    """True in a process that was started to share the work with others."""
    return "LOCAL_RANK" in os.environ


def helps() -> bool:
    """True in a process that helps another, which alone writes and speaks."""
    return int(os.environ.get("RANK", "0")) > 0


@contextmanager
def accelerated(
    device: str | None,
    mixed_precision: str = "no",
    accumulation: int = 1,
    tracker: str | None = None,
    folder: Path | None = None,
) -> Iterator[Accelerator]:
    """accelerate on that device, None for the one it chooses; UserError for a way to train that is not to be had here.

    accelerate keeps one state for a process, with its first device and precision; here it begins anew, and is put back.
    """
    place = None if device is None else device_of(device)
    if place is not None and place.index is not None and launched():
        raise UserError(f"--device {device} is one GPU, and several processes share the work: leave it out")
    kinds = () if launched() else (PartialState, AcceleratorState, GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    with _on(place):
        try:
            for kind in kinds:
                kind._shared_state.clear()
            yield _accelerator(place is not None and place.type == "cpu", mixed_precision, accumulation, tracker, folder)
        finally:
            for kind, state in zip(kinds, before, strict=True):
                kind._shared_state.clear()
                kind._shared_state.update(state)


def _on(place: torch.device | None) -> AbstractContextManager[object]:
    """A context in which "cuda" is the GPU that was asked for."""
    return torch.cuda.device(place) if place is not None and place.type == "cuda" else nullcontext()


def _accelerator(cpu: bool, precision: str, accumulation: int, tracker: str | None, folder: Path | None) -> Accelerator:
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=accumulation,
            log_with=tracker,
            project_dir=None if folder is None else str(folder),
        )
    except ValueError as err:
        why = first_line(err)
        raise UserError(f"cannot train with --mixed-precision {precision} here ({why}): give bf16 or no, or use a GPU") from None
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("cannot train with --mixed-precision fp16 on a processor: give bf16 or no, or use a GPU")
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise UserError(
            f"distill runs on one device, under data parallelism, or under FSDP 2: got {kind.value}; "
            "launch it with --fsdp_version 2 or without --use_fsdp and --use_deepspeed"
        )
    return accelerator
