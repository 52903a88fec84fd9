"""DreamBooth (arXiv 2208.12242): the losses of a subject's images and of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blockprune.cost.latency import peak_bytes, weight_bytes
from blockprune.model.families import Condition, join
from blockprune.model.model import Model
from blockprune.stages.train.checkpoints import Snapshot
from blockprune.stages.train.losses import task_loss
from blockprune.stages.train.samples import Batch, Sampler
from blockprune.stages.train.trainer import Optimiser, Settings, Trainer


class Learner(nn.Module):
    """A pipeline's network, and its text encoders where they learn, as one module: what is asked for under a prompt."""

    def __init__(self, model: Model, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model = model
        for name, module in parts.items():
            self.add_module(name, module)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Condition, prompts: Sequence[str]) -> Tensor:
        """`prompts` stand for their condition, with gradients to the text encoders; where there are none, `condition` counts."""
        if prompts:
            condition = self.model.family.text(self.model.pipe, prompts, self.model.pixels)
        output: Tensor = self.model.network(noisy, timestep=timesteps, **condition, return_dict=False)[0]
        return output


class DreamBooth(Trainer):
    """Training on a subject's images, each beside one of its class where `prior` has these.

    Where text encoders learn, `prompts` are those of the subject and those of its class, each for its images in turn.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        learner: Learner,
        instance: Sampler,
        prior: Sampler | None,
        prior_weight: float,
        prompts: Sequence[Sequence[str]],
        optimiser: Optimiser,
        settings: Settings,
        start: Snapshot | None = None,
    ) -> None:
        self.model, self.instance, self.prior, self.prior_weight, self.prompts = (
            learner.model,
            instance,
            prior,
            prior_weight,
            prompts,
        )
        super().__init__(accelerator, learner, optimiser, settings, start=start)

    def terms(self, samples: range) -> dict[str, Tensor]:
        """The mean squared errors of the subject's images ("task") and of its class ("prior")."""
        device, n = self.accelerator.device, len(samples)
        samplers = [sampler for sampler in (self.instance, self.prior) if sampler is not None]
        batches = [sampler.batch(samples, device) for sampler in samplers]
        asked = zip(samplers, self.prompts, strict=False)  # no prompts where no text encoder learns
        prompts = [texts[sampler.index(g) % len(texts)] for sampler, texts in asked for g in samples]
        both = batches[0] if len(batches) == 1 else _together(*batches)
        with self.accelerator.autocast():
            predicted = self.module(both.noisy, both.timesteps, both.condition, prompts)
        terms = {"task": task_loss(predicted[:n], both.target[:n])}
        if self.prior is None:
            return terms | {"loss": terms["task"]}
        terms["prior"] = task_loss(predicted[n:], both.target[n:])
        return terms | {"loss": terms["task"] + self.prior_weight * terms["prior"]}

    def mem_bytes(self) -> int:
        """Peak memory of an update: all weights of the pipeline, the optimiser's state, gradients and what the passes allocate."""
        parts = [part for part in self.model.pipe.components.values() if isinstance(part, nn.Module)]
        state = sum(t.nbytes for slots in self.optimizer.state.values() for t in slots.values() if isinstance(t, Tensor))

        def passes() -> None:
            self.terms(range(self.settings.batch_size))["loss"].backward()

        try:
            return sum(map(weight_bytes, parts)) + state + peak_bytes(passes, self.accelerator.device)
        finally:
            self.bare.zero_grad(set_to_none=True)


def _together(first: Batch, second: Batch) -> Batch:
    """Two batches one below the other."""
    tensors = (torch.cat([getattr(b, name) for b in (first, second)]) for name in ("noisy", "timesteps", "target"))
    noisy, timesteps, target = tensors
    return Batch(noisy, timesteps, join(first.condition, second.condition), target)
