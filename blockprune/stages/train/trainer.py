"""The loop of any training: optimiser steps over the losses of batches, exactly resumable."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from blockprune.runs.records import TrainState
from blockprune.stages.train.checkpoints import Snapshot


@dataclass(frozen=True)
class Settings:
    """How a run is cut into steps: `batch_size` is of one process and one forward pass, `compiler` a backend of torch.compile."""

    batch_size: int
    accumulation: int = 1
    seed: int = 0
    ema: bool = False
    ema_decay: float = 0.9999
    gradient_checkpointing: bool = False
    compiler: str = ""


@dataclass(frozen=True)
class Optimiser:
    """AdamW's settings, and the norm that gradients are clipped to."""

    learning_rate: float
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0


class Trainer(ABC):
    """Trains those parameters of `bare` that require gradients, by the losses that a kind of training gives for its samples.

    `start` continues from a checkpoint; `offset` is how many optimiser steps were taken before this training. `module` is `bare`
    as accelerate and torch.compile wrap it, for forward passes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        bare: nn.Module,
        optimiser: Optimiser,
        settings: Settings,
        offset: int = 0,
        start: Snapshot | None = None,
    ) -> None:
        self.accelerator, self.bare, self.optimiser, self.settings = accelerator, bare, optimiser, settings
        self.offset, self.step = offset, offset
        fused = accelerator.device.type in ("cuda", "cpu")
        rate, decay = optimiser.learning_rate, optimiser.weight_decay
        optimizer = torch.optim.AdamW(self.learnt().values(), lr=rate, weight_decay=decay, betas=(0.9, 0.999), fused=fused)
        self.module, self.optimizer = accelerator.prepare(bare, optimizer)
        self.ema = EMAModel(self.learnt().values(), decay=settings.ema_decay, foreach=True) if settings.ema else None
        if start is not None:
            self._restore(start)

    @abstractmethod
    def terms(self, samples: range) -> dict[str, Tensor]:
        """The terms of the loss of those samples, unweighted, and as "loss" what is to fall."""

    def learnt(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.bare.named_parameters() if p.requires_grad}

    def run(self, n_steps: int) -> Iterator[TrainState]:
        """Trains up to `n_steps` optimiser steps of this phase; yields a row after each. A loss that is not finite ends it."""
        while self.step < self.offset + n_steps:
            begun = time.perf_counter()
            terms = self._optimise()
            self.step += 1
            if not math.isfinite(terms["loss"]):
                raise FloatingPointError(f"the loss is {terms['loss']} at step {self.step}")
            n = self.settings.batch_size * self.settings.accumulation * self.accelerator.num_processes
            yield TrainState(self.step, terms, n, time.perf_counter() - begun)

    def _optimise(self) -> dict[str, float]:
        """One optimiser step over the accumulated forward passes; the mean of every term over all processes."""
        s, world, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        sums: dict[str, Tensor] = {}
        for m in range(s.accumulation):
            first = ((self.step * s.accumulation + m) * world + rank) * s.batch_size
            with self.accelerator.accumulate(self.module):
                terms = self.terms(range(first, first + s.batch_size))
                self.accelerator.backward(terms["loss"])
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.module.parameters(), self.optimiser.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach().float() / s.accumulation
        if self.ema is not None:
            self.ema.step(self.learnt().values())
        values = self.accelerator.reduce(torch.stack(list(sums.values())), "mean")
        return dict(zip(sums, values.tolist(), strict=True))

    def weights(self, averaged: bool) -> dict[str, Tensor]:
        """What is trained, or its moving average where it is kept: whole tensors, so every process must ask together."""
        frozen = {name for name, p in self.bare.named_parameters() if not p.requires_grad}
        own = {name: _whole(t) for name, t in self.bare.state_dict().items() if name not in frozen}
        if self.ema is None or not averaged:
            return own
        return own | {name: _whole(t) for name, t in zip(self.learnt(), self.ema.shadow_params, strict=True)}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a continuation needs, as named whole tensors; every process must ask together."""
        names, states = list(self.learnt()), [self.optimizer.state[p] for p in self.learnt().values()]
        optimizer = {f"{n}/{k}": _whole(torch.as_tensor(v)) for n, s in zip(names, states, strict=True) for k, v in s.items()}
        found = {"student": self.weights(averaged=False), "optimizer": optimizer}
        if self.accelerator.scaler is not None:
            scaler = {k: torch.tensor(v, dtype=torch.float64) for k, v in self.accelerator.scaler.state_dict().items()}
            found["scaler"] = scaler
        if self.ema is not None:
            shadow = dict(zip(names, map(_whole, self.ema.shadow_params), strict=True))
            found["ema"] = shadow | {"optimization_step": torch.tensor(self.ema.optimization_step)}
        return found

    def _restore(self, start: Snapshot) -> None:
        self.step = start.step
        mine = self.bare.state_dict()
        self.bare.load_state_dict(mine | {name: _laid_out(t, mine[name]) for name, t in start.parts["student"].items()})
        names, slots = list(self.learnt()), list(self.optimizer.param_groups[0]["params"])
        for name, p in zip(names, slots, strict=True):
            kept = {k.removeprefix(f"{name}/"): v for k, v in start.parts["optimizer"].items() if k.rpartition("/")[0] == name}
            state = {k: _laid_out(v, p) if v.ndim else v.to(p.device) if p.is_cuda else v for k, v in kept.items()}
            if state:
                self.optimizer.state[p] = state
        if self.accelerator.scaler is not None and "scaler" in start.parts:
            self.accelerator.scaler.load_state_dict({k: v.item() for k, v in start.parts["scaler"].items()})
        if self.ema is not None and "ema" in start.parts:
            self.ema.optimization_step = int(start.parts["ema"]["optimization_step"])
            self.ema.shadow_params = [_laid_out(start.parts["ema"][n], p) for n, p in zip(names, slots, strict=True)]


def _whole(t: Tensor) -> Tensor:
    """A tensor as it is, or put together from its shards (FSDP), which every process must do at the same time."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in memory as another of its shape is: device, shards and layout, by which kernels round."""
    if isinstance(like, DTensor):
        return distribute_tensor(t.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=t.dtype, requires_grad=False).copy_(t)
