"""The model contract: a diffusion pipeline as the stages see it. No stage looks into the pipeline or asks for its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from blockprune.model import pretrained, sampling, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.defaults import defaults_of
from blockprune.model.families import Condition, Family, family_of
from blockprune.model.fit import Fits, no_fits
from blockprune.model.graph import BlockGraph
from blockprune.model.identity import identity, identity_of
from blockprune.model.sampling import Protocol
from blockprune.model.trace import trace


@dataclass(frozen=True)
class Model:
    """A pipeline with the graph of its denoising network at one latent size (height, width), and its defaults for scoring.

    `graph` is of the full network. `identify` gives the 12-digit content id of the weights, which may take a while. `fits` gives
    the fitted weights of what stands in for removed blocks.
    """

    name: str
    pipe: DiffusionPipeline
    family: Family
    graph: BlockGraph
    latent: tuple[int, int]
    identify: Callable[[], str]
    defaults: Mapping[str, Any]
    fits: Fits = no_fits

    @cached_property
    def identity(self) -> str:
        return self.identify()

    @property
    def network(self) -> UNet2DConditionModel:
        """The denoising network that the pipeline has at the moment."""
        return getattr(self.pipe, self.family.network)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of its images."""
        return self.latent[0] * self.pipe.vae_scale_factor, self.latent[1] * self.pipe.vae_scale_factor

    @cached_property
    def schedule(self) -> DDPMScheduler:
        """The noise that training and denoising errors add."""
        return self.family.schedule(self.pipe)

    @contextmanager
    def running(self, network: torch.nn.Module) -> Iterator[None]:
        """Within this context the pipeline draws with another network."""
        own = self.network
        setattr(self.pipe, self.family.network, network)
        try:
            yield
        finally:
            setattr(self.pipe, self.family.network, own)

    def removed(self, arch: Architecture) -> AbstractContextManager[UNet2DConditionModel]:
        """A context in which the network runs with the blocks of `arch` masked."""
        return surgery.removed(self.network, arch, self.fits(arch))

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within this context the pipeline's modules are in evaluation mode and need no gradients; then they are as before."""
        parts = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        modes = [(module, module.training) for part in parts for module in part.modules()]
        learnt = [p for part in parts for p in part.parameters() if p.requires_grad]
        try:
            for part in parts:
                part.eval()
            for p in learnt:
                p.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for p in learnt:
                p.requires_grad_(True)

    def encode(self, prompts: Sequence[str]) -> tuple[Condition, Condition]:
        """The network's condition for each prompt, and the one-row condition of no prompt that guidance starts from."""
        return sampling.encode(self.pipe, prompts, self.latent)

    def draw(self, protocol: Protocol, condition: Condition, blank: Condition, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(latents, images NCHW uint8), image i from condition row i (cycled) and seed `protocol.seed + i`. Raises NotFinite."""
        return sampling.draw(self.pipe, protocol, condition, blank, index)

    def images(self, protocol: Protocol, condition: Condition, blank: Condition, seeds: Sequence[int]) -> Tensor:
        """Images NCHW uint8, one for each row of `condition`, each from a seed of its own. Raises NotFinite."""
        return sampling.decode(self.pipe, sampling.denoise(self.pipe, protocol, condition, blank, seeds))

    def edited(self, protocol: Protocol, strength: float, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images NCHW uint8 that `images` become by their prompts, each with a seed of its own. Raises NotFinite."""
        return sampling.decode(self.pipe, sampling.edit(self.pipe, protocol, strength, images, prompts, seeds))

    def encode_images(self, images: Tensor) -> Tensor:
        """Images NCHW uint8 => the mean of their latents (N, C, h, w), scaled as the network takes them."""
        return sampling.encode_images(self.pipe, images)


def load_model(
    name: str, resolution: str | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """The model of that name (see `pretrained.load`), its weights loaded. `resolution` is in pixels, "512" or "HEIGHTxWIDTH"."""
    config = pretrained.configs(name)
    latent = config.latent(resolution)
    pipe = pretrained.load(name, device, dtype)
    graph = trace(config.unet, latent, config.n_tokens)
    return Model(name, pipe, family_of(config.unet), graph, latent, partial(identity, name), defaults_of(name))


def of_pipeline(pipe: DiffusionPipeline, resolution: str | None = None) -> Model:
    """The model that a loaded pipeline is, on its device and in its dtype; its weights are not copied."""
    config = pretrained.configs_of(pipe)
    latent = config.latent(resolution)
    graph = trace(config.unet, latent, config.n_tokens)
    identify = partial(identity_of, pipe)
    return Model(config.model, pipe, family_of(config.unet), graph, latent, identify, defaults_of(config.model))
