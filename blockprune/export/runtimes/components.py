"""The parts of a pipeline as modules that take and give plain tensors, with example inputs: what an exporter wants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from blockprune.data.encoded import flat, nested
from blockprune.model import sampling
from blockprune.model.model import Model
from blockprune.model.sampling import Protocol

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PROMPTS = ["a photo", ""]
ROWS, STEPS = len(PROMPTS), 4  # exporters take a size of one for constant, so there are two rows
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Component:
    """A part of a pipeline: `module` takes the tensors of `example` in their order and gives the tensors `outputs`.

    All tensors have the batch in front; of those named in `spatial` the last two dimensions may vary as well. `network` is what
    the weights belong to.
    """

    name: str
    module: nn.Module
    network: nn.Module
    example: Inputs
    outputs: tuple[str, ...]
    spatial: frozenset[str] = frozenset()

    @torch.inference_mode()
    def run(self, inputs: Inputs) -> list[Tensor]:
        """What PyTorch gives."""
        given = self.module(*inputs.values())
        return [given] if isinstance(given, Tensor) else list(given)


class Denoiser(nn.Module):
    """A U-Net whose condition is given as separate tensors, of these paths, after sample (B, C, h, w) and timestep (B,)."""

    def __init__(self, unet: UNet2DConditionModel, paths: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.paths = unet, tuple(paths)

    def forward(self, sample: Tensor, timestep: Tensor, *condition: Tensor) -> Tensor:
        like = self.unet.dtype
        given = nested(dict(zip(self.paths, (t.to(like) for t in condition), strict=True)))
        output: Tensor = self.unet(sample.to(like), timestep, **given, return_dict=False)[0]
        return output.float()


class TextEncoder(nn.Module):
    """A text encoder: token ids (B, n) to the hidden states that the pipeline takes, and the pooled ones where it takes them."""

    def __init__(self, encoder: nn.Module, layer: int | None, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.layer, self.pooled = encoder, layer, pooled

    def forward(self, input_ids: Tensor) -> Any:
        found = self.encoder(input_ids, output_hidden_states=self.layer is not None)
        states = found[0] if self.layer is None else found.hidden_states[self.layer]
        return (states.float(), found[0].float()) if self.pooled else states.float()


class Decoder(nn.Module):
    """A VAE's decoder, from latents as the VAE takes them to images in -1…1."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latent_sample.to(self.vae.dtype), return_dict=False)[0]
        return image.float()


class Encoder(nn.Module):
    """A VAE's encoder, from images in -1…1 to the mean and the log-variance of their latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(sample.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()


def drawn_latents(model: Model) -> Tensor:
    """(2, C, h, w): latents of two images that the model draws in a few steps."""
    condition, blank = model.encode(PROMPTS)
    protocol = Protocol(ROWS, STEPS, 1.0, 0, model.latent)
    return sampling.denoise(model.pipe, protocol, condition, blank, [0, 1]).float()


def denoiser(model: Model, latents: Tensor) -> Component:
    """The denoising network, on noisy `latents` early and late in sampling, with and without a prompt."""
    paths = dict(flat(model.encode(PROMPTS)[0]))
    last = model.schedule.config.num_train_timesteps - 1
    timesteps = torch.tensor([last, last // 3])
    sample = model.schedule.add_noise(latents, sampling.noise(latents.shape[1:], [2, 3]), timesteps)
    example = {"sample": sample, "timestep": timesteps.float(), **{path.rpartition("/")[2]: t.float() for path, t in paths.items()}}
    module = Denoiser(model.network, list(paths))
    return Component("unet", module, model.network, example, ("out_sample",), frozenset({"sample"}))


def components(model: Model, every: bool) -> Iterator[Component]:
    """The denoising network, and with `every` the text encoders, the VAE's decoder and its encoder, on what the model draws."""
    latents = drawn_latents(model)
    yield denoiser(model, latents)
    if not every:
        return
    pipe = model.pipe
    yield from (text_encoder(model, name) for name in TEXT_ENCODERS if getattr(pipe, name, None) is not None)
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    scaled = latents / pipe.vae.config.scaling_factor + shift
    yield Component(
        "vae_decoder", Decoder(pipe.vae), pipe.vae, {"latent_sample": scaled}, ("sample",), frozenset({"latent_sample"})
    )
    images = sampling.decode(pipe, latents).float() / 127.5 - 1
    outputs = ("latent_mean", "latent_logvar")
    yield Component("vae_encoder", Encoder(pipe.vae), pipe.vae, {"sample": images}, outputs, frozenset({"sample"}))


def text_encoder(model: Model, name: str) -> Component:
    """A text encoder on two prompts, as the pipeline asks it."""
    encoder, tokenizer = getattr(model.pipe, name), getattr(model.pipe, name.replace("text_encoder", "tokenizer"))
    ids = tokenizer(
        PROMPTS, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    sdxl = model.family.name == "sdxl"
    pooled = sdxl and name == "text_encoder_2"
    outputs = ("last_hidden_state", *(["text_embeds"] if pooled else []))
    return Component(name, TextEncoder(encoder, -2 if sdxl else None, pooled), encoder, {"input_ids": ids}, outputs)
