"""What is known of a model without its weights, and how long a run of it will take: said before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from blockprune.cost.components import encoder_part, other_parts
from blockprune.cost.estimate import measured
from blockprune.cost.work import Passes, Work, activation_bytes, batches
from blockprune.errors import UserError, first_line
from blockprune.export import pipeline
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.defaults import defaults_of
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model
from blockprune.model.pretrained import Configs, configs_of
from blockprune.model.sampling import Protocol
from blockprune.model.schedulers import SCHEDULERS
from blockprune.model.trace import trace
from blockprune.progress import Listener
from blockprune.stages.loading import defaults_of_exported, pipeline_folder

LONG_S = 600
SURELY_SHORT = 1e12  # multiply-adds for which no machine takes that long
TRAINED = 4  # float32 numbers of each parameter in training: weight, gradient, and AdamW's two


@dataclass(frozen=True)
class Outline:
    """A model as its configurations describe it. `graph` is of the full network, `lacks` what a pruned one is without."""

    configs: Configs
    graph: BlockGraph
    defaults: Mapping[str, Any]
    lacks: Architecture = field(default_factory=Architecture)

    @property
    def latent(self) -> tuple[int, int]:
        return self.graph.latent[1:]

    @property
    def pixels(self) -> int:
        """Of one image."""
        height, width = self.latent
        return height * width * self.configs.vae_factor**2

    def calls(self, steps: int, scheduler: str | None = None, strength: float | None = None) -> int:
        """How often the network is asked for a batch of images in so many steps; image to image from a strength.

        UserError for a scheduler that cannot draw in so many.
        """
        kind = SCHEDULERS[scheduler] if scheduler else self.configs.scheduler["_class_name"]
        drawn = getattr(diffusers, kind).from_config(self.configs.scheduler)
        try:
            drawn.set_timesteps(steps)
        except (ValueError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as err:
            why = first_line(err)
            raise UserError(f"{kind} cannot draw in {steps} steps ({why}): give another --steps or --scheduler") from None
        skipped = 0 if strength is None else max(steps - int(steps * strength), 0) * getattr(drawn, "order", 1)
        return len(drawn.timesteps) - skipped

    def drawing(
        self, step: str, protocol: Protocol, batch_size: int, share: float = 1.0, times: int = 1, strength: float | None = None
    ) -> Iterator[Passes]:
        """The passes that draw a protocol's images, `times` times over."""
        calls = self.calls(protocol.n_steps, protocol.scheduler, strength)
        yield from batches(step, protocol.n_images, batch_size, times * calls, 1 + (protocol.cfg_scale > 1), share)

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the whole pipeline's weights."""
        parts = [*other_parts(self.configs, self.latent).values(), encoder_part(self.configs, self.latent)]
        return itemsize * (self.graph.cost(self.lacks).params + sum(p.numel() for part in parts for p in part.module.parameters()))

    def scoring_bytes(self, passes: list[Passes], itemsize: int) -> int:
        """Memory of a run that learns nothing: all weights, and what its largest pass allocates."""
        rows = max((p.rows for p in passes), default=0)
        return self.weight_bytes(itemsize) + activation_bytes(self.graph, rows, itemsize)

    def image_bytes(self, n: int) -> int:
        """Disk of `n` images, and of what is kept beside each, taken for as large as its pixels."""
        return 2 * n * 3 * self.pixels


def outline_of(name: str, resolution: str | None = None) -> Outline:
    """The outline of a model that `load_model` or `any_model` would load; no weights are read. Errors as theirs."""
    folder = pipeline_folder(name)
    if not pipeline.is_exported(folder):
        configs = pretrained.configs(name)
        graph = trace(configs.unet, configs.latent(resolution), configs.n_tokens)
        return Outline(configs, graph, defaults_of(name))
    configs, about = pretrained.configs(str(folder)), pipeline.read_teacher(folder)
    lacks = pipeline.read_architecture(folder / pipeline.PRUNING) if about else Architecture()
    teacher = Configs(configs.model, about["unet"] if about else configs.unet, configs.vae, configs.text, configs.scheduler)
    graph = trace(teacher.unet, teacher.latent(resolution), teacher.n_tokens)
    return Outline(teacher, graph, defaults_of_exported(folder), lacks)


def outlined(model: Model) -> Outline:
    """The outline of a model that is loaded."""
    return Outline(configs_of(model.pipe), model.graph, model.defaults)


def say_how_long(work: Work, model: Model, progress: Listener) -> None:
    """One line before a run of more than ten minutes; what is surely shorter is not measured. For runs that just begin."""
    if work.macs(model.graph) < SURELY_SHORT:
        return
    outline = outlined(model)
    with model.undisturbed():
        estimate = measured(work, outline.configs, model.graph, model.device, model.dtype, model.network)
    if estimate.total_s > LONG_S:
        progress.say(f"from its beginning this run takes {estimate.line}")
