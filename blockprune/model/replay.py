"""Masked forwards that reuse the teacher's: modules before the first removed block replay what they returned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from accelerate.utils import recursively_apply
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph


class Play(nn.Module):
    """Returns a recorded output, whatever it is called with; `resnets` keeps the length by which the U-Net pops skips."""

    def __init__(self, output: Any, recorded: nn.Module) -> None:
        super().__init__()
        self.output = output
        self.resnets = range(len(getattr(recorded, "resnets", ())))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class Recording:
    """What every stage and every block of a U-Net returned in one forward pass.

    Masked passes must get the same sample, timesteps and condition as the recorded one. The outputs of blocks of the kinds
    `also` are kept, too ("T" for transformer layers, "C" for their components).
    """

    def __init__(self, graph: BlockGraph, also: Collection[str] = ()) -> None:
        self._also = [b.name for b in graph if b.kind in also]
        self._stage_of = {b.name: b.stage for b in graph if b.kind in "RADU"}
        self._steps = list(self._stage_of)
        self._stages = list(dict.fromkeys(self._stage_of.values()))
        self._output: dict[str, Any] = {}

    @contextmanager
    def of(self, unet: UNet2DConditionModel) -> Iterator[None]:
        """Within this context a forward pass of `unet` is recorded; a later one replaces it."""
        names = ["conv_in", *self._stages, *self._steps, *self._also]
        hooks = [unet.get_submodule(n).register_forward_hook(self._keep(n)) for n in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._output[name] = output

        return hook

    @property
    def mem_bytes(self) -> int:
        """The bytes of everything that is recorded."""
        storages = [t.untyped_storage() for output in self._output.values() for t in _tensors(output)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def output(self, name: str) -> Tensor:
        """What a block gave."""
        output = self._output[name]
        return output[0] if isinstance(output, tuple) else output

    def removed(
        self, unet: UNet2DConditionModel, arch: Architecture, fits: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[UNet2DConditionModel]:
        """As `surgery.removed`, with everything before the first removed block replayed."""
        surgery.check_innermost(unet, arch)
        return self.around(unet, arch, surgery.stand_ins(unet, arch, fits))

    def around(
        self, unet: UNet2DConditionModel, arch: Architecture, masks: Mapping[str, nn.Module]
    ) -> AbstractContextManager[UNet2DConditionModel]:
        """`removed` with stand-ins that are given."""
        plays = {n: Play(self._output[n], unet.get_submodule(n)) for n in self._before(arch)}
        return surgery.swapped(unet, {**plays, **masks})

    def _before(self, arch: Architecture) -> list[str]:
        """The largest modules that end before the first removed block begins."""
        if not arch:
            return []
        first = min(self._position(name) for name in arch)
        stage = self._stage_of[self._steps[first]]
        inside = [step for step in self._steps[:first] if self._stage_of[step] == stage]
        return ["conv_in", *self._stages[: self._stages.index(stage)], *inside]

    def _position(self, name: str) -> int:
        """The index of the first step at which removing `name` changes something."""
        block = name.partition(".transformer_blocks.")[0]
        return next(i for i, step in enumerate(self._steps) if step == block or step.startswith(block + "."))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a module's output, which may be a tuple of tuples."""
    tensors: list[Tensor] = []
    recursively_apply(tensors.append, value)
    return tensors
