"""The parts of a text-to-image pipeline on the meta device: what each costs, checked by other counters, or with random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from blockprune import crosscheck, surgery
from blockprune.arch import Architecture, Cost
from blockprune.checkpoints import Configs
from blockprune.costs import count
from blockprune.errors import UserError
from blockprune.families import family_of

TEXT_MODELS = {c.__name__: c for c in (CLIPTextModel, CLIPTextModelWithProjection)}
_TILE = 1_000_003  # prime, so that rows of a weight do not repeat in step


@dataclass(frozen=True)
class Part:
    """A module and the keyword arguments of one call."""

    module: nn.Module
    kwargs: Mapping[str, Any]

    def run(self) -> Any:
        return self.module(**self.kwargs)

    def count(self) -> dict[str, Cost]:
        """The cost of one call by module path; the module is on the meta device."""
        return count(self.module, self.run)


def unet_inputs(
    config: Mapping[str, Any],
    latent: tuple[int, int],
    n_tokens: int,
    batch_size: int = 1,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Zeros of the right shapes as keyword arguments for a U-Net's forward."""
    sample = torch.zeros(batch_size, config["in_channels"], *latent, device=device, dtype=dtype)
    return {"sample": sample, "timestep": torch.ones((), device=device)} | family_of(config).blank(
        config, batch_size, n_tokens, sample
    )


def unet_part(configs: Configs, arch: Architecture, latent: tuple[int, int]) -> Part:
    """One step of the pruned U-Net, batch 1, on the meta device."""
    return Part(surgery.skeleton(configs.unet, arch), unet_inputs(configs.unet, latent, configs.n_tokens))


def other_parts(configs: Configs, latent: tuple[int, int]) -> dict[str, Part]:
    """The text encoders and the VAE decoder (without `post_quant_conv`), one prompt and one image, on the meta device."""
    parts = {name: _text_part(name, config) for name, config in configs.text.items()}
    with torch.device("meta"):
        decoder = AutoencoderKL.from_config(configs.vae).eval().decoder
        sample = torch.zeros(1, configs.vae["latent_channels"], *latent)
    return parts | {"vae_decoder": Part(decoder, {"sample": sample})}


def _text_part(name: str, config: Mapping[str, Any]) -> Part:
    kind = (config.get("architectures") or ["?"])[0]
    if kind not in TEXT_MODELS:
        raise UserError(f"{name} is a {kind}, whose cost is not known here: give a model with {' or '.join(TEXT_MODELS)}")
    with torch.device("meta"):
        module = TEXT_MODELS[kind](CLIPTextConfig(**config)).eval()
        ids = torch.zeros(1, module.config.max_position_embeddings, dtype=torch.long)
    return Part(module, {"input_ids": ids})


def pipeline_costs(configs: Configs, latent: tuple[int, int]) -> dict[str, Cost]:
    """The cost of everything but the U-Net for one image: each text encoder for one prompt, the VAE decoder."""
    return {name: part.count()[""] for name, part in other_parts(configs, latent).items()}


def verify(configs: Configs, arch: Architecture, latent: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Multiply-adds by thop and by fvcore of each part of the pipeline, where they agree with ours; UserError where not.

    fvcore runs every part once on the CPU.
    """

    def parts() -> dict[str, Part]:
        return {"unet": unet_part(configs, arch, latent)} | other_parts(configs, latent)

    costs = {name: part.count() for name, part in parts().items()}
    thop = {name: crosscheck.check_thop(p.module, p.kwargs, costs[name]) for name, p in parts().items()}
    fvcore = {}
    for name, part in parts().items():
        kwargs = {k: _zeros(v) for k, v in part.kwargs.items()}
        fvcore[name] = crosscheck.check_fvcore(crosscheck.hollow(part.module), kwargs, costs[name])
    return {name: {"thop": thop[name], "fvcore": fvcore[name]} for name in costs}


def _zeros(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _zeros(v) for k, v in value.items()}
    return torch.zeros(value.shape, dtype=value.dtype)


def random_unet(
    config: Mapping[str, Any],
    arch: Architecture,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> UNet2DConditionModel:
    """A pruned U-Net with random weights that keep activations finite: for timing, not for images.

    A few seconds for SD v1 on one core: every weight is cut from one block of normal noise, scaled by 1/sqrt(fan-in).
    """
    unet = surgery.skeleton(config, arch)
    noise = torch.randn(_TILE, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    weights = {name: _random(name, p.shape, noise) for name, p in unet.state_dict().items()}
    unet.load_state_dict(weights, assign=True)
    return unet.requires_grad_(False)


def _random(name: str, shape: torch.Size, noise: Tensor) -> Tensor:
    if len(shape) < 2:
        return noise.new_full(shape, 1.0 if name.endswith("weight") else 0.0)
    flat = noise.new_empty(shape.numel())
    for piece in flat.split(_TILE):
        torch.mul(noise[: piece.numel()], 1 / math.sqrt(shape[1:].numel()), out=piece)
    return flat.view(shape)
