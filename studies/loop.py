"""A resumable training loop for small models, shared by the studies that train the parts of tiny-digits."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Loop:
    """One resumable training run: AdamW, warm-up and cosine, an exponential moving average, a JSONL log.

    `run` is given the loss as a function of the step's generator. The state is written atomically every `save_every` steps.
    """

    def __init__(self, modules: nn.Module, directory: Path, n_steps: int, lr: float, ema_decay: float = 0.999) -> None:
        self.modules, self.directory, self.n_steps, self.lr = modules, directory, n_steps, lr
        self.ema, self.ema_decay, self.step = copy.deepcopy(modules), ema_decay, 0
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01, fused=True)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "state.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step = state["step"]
            for name, part in (("modules", modules), ("ema", self.ema), ("optimizer", self.optimizer)):
                part.load_state_dict(state[name])

    def save(self) -> None:
        state = {"step": self.step, "modules": self.modules.state_dict(), "ema": self.ema.state_dict()}
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def learning_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / (0.03 * self.n_steps))
        return self.lr * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * self.step / self.n_steps)))

    def run(self, loss_of: Callable[[torch.Generator], Tensor], watch: Callable[[], dict[str, Any]], save_every: int) -> nn.Module:
        """Return the averaged modules after the last step."""
        losses, start_s = [], time.time()
        while self.step < self.n_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            loss = loss_of(torch.Generator().manual_seed(self.step))
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.average()
            losses.append(loss.item())
            if self.step % 50 == 0 or self.step == self.n_steps:
                row = {"step": self.step, "loss": float(np.mean(losses)), "s_per_step": (time.time() - start_s) / len(losses)}
                losses, start_s = [], time.time()
                if self.step % save_every == 0 or self.step == self.n_steps:
                    self.save()
                    row |= watch()
                with open(self.directory / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
        return self.ema

    @torch.no_grad()
    def average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = [*self.ema.parameters()]
        values: list[Tensor] = [*self.modules.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)


def batch_of(n: int, generator: torch.Generator, size: int = 64) -> Tensor:
    return torch.randint(n, (size,), generator=generator)
