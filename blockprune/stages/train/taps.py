"""Where student and teacher are compared inside: module pairs by name, and the hooks that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph


@dataclass(frozen=True)
class Tap:
    """A teacher module and the student module that is compared with it."""

    teacher: str
    student: str


def stage_taps(graph: BlockGraph, arch: Architecture) -> list[Tap]:
    """The outputs of the down and up stages, after their resamplers; the mid stage is not tapped (arXiv 2305.15798, section 3.2).

    A stage that has lost its resampler with the innermost stage is compared before it, at its last attention or ResNet; one of
    which nothing is left is not tapped.
    """
    stages = dict.fromkeys(b.stage for b in graph if b.stage.startswith(("down_blocks", "up_blocks")))
    taps: list[Tap] = []
    for stage in stages:
        if stage in arch:
            continue
        resampler = next((b.name for b in graph if b.stage == stage and b.kind in "DU"), None)
        taps += _last(graph, arch, stage) if resampler and resampler in arch else [Tap(stage, stage)]
    return taps


def _last(graph: BlockGraph, arch: Architecture, stage: str) -> list[Tap]:
    """The last attention of a stage, or its last ResNet where it has none, teacher's and student's; none when none is left."""
    blocks = [b for b in graph if b.stage == stage and b.kind in "RA"]
    kind = "A" if any(b.kind == "A" and b.name not in arch for b in blocks) else "R"
    names = [b.name for b in blocks if b.kind == kind]
    kept = [name for name in names if name not in arch]
    tail = ".proj_out" if kind == "A" else ""
    return [Tap(names[-1] + tail, kept[-1] + tail)] if kept else []


def layer_taps(graph: BlockGraph, arch: Architecture) -> list[Tap]:
    """Every ResNet and attention that both have (arXiv 2401.02677)."""
    return [Tap(b.name, b.name) for b in graph if b.kind in "RA" and b.name not in arch]


def self_attention_taps(graph: BlockGraph, arch: Architecture) -> list[Tap]:
    """The self-attention output of every transformer layer that both have one in (arXiv 2312.04005)."""
    return [Tap(name, name) for b in graph if b.kind == "T" and (name := f"{b.name}.attn1") not in arch]


def taps_of(graph: BlockGraph, arch: Architecture, choice: str | Sequence[str], self_attention: bool = False) -> list[Tap]:
    """The taps that a recipe asks for. UserError names a listed module that the student has lost."""
    if choice == "stages":
        taps = stage_taps(graph, arch)
    elif choice == "layers":
        taps = layer_taps(graph, arch)
    else:
        taps = [Tap(name, name) for name in choice]
        if lost := [tap.student for tap in taps if tap.student in arch]:
            raise UserError(f"the tap {lost[0]!r} is removed in the student: leave it out of the recipe's taps")
    return taps + (self_attention_taps(graph, arch) if self_attention else [])


@dataclass
class Watch:
    """Reads the outputs of modules in forward passes, on the bare model, so that names carry no prefix of a wrapper."""

    unet: UNet2DConditionModel
    names: Sequence[str]
    seen: dict[str, Tensor] = field(default_factory=dict)
    _open: bool = False

    def __post_init__(self) -> None:
        modules = dict(self.unet.named_modules())
        if missing := [name for name in self.names if name not in modules]:
            raise UserError(f"no module {missing[0]!r} to tap in this U-Net: see `blockprune graph`, and mend the recipe's taps")
        self._hooks = [modules[name].register_forward_hook(self._keep(name)) for name in self.names]

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._open:
                self.seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    @contextmanager
    def watching(self) -> Iterator[dict[str, Tensor]]:
        """Within this context outputs are kept; a recomputation for checkpointed gradients, outside it, replaces nothing."""
        self.seen, self._open = {}, True
        try:
            yield self.seen
        finally:
            self._open = False
