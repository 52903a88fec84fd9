"""Images from a text-to-image pipeline in lazy batches: one path for every family, one seed per image."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from torch import Tensor

from blockprune.errors import UserError, first_line
from blockprune.model.families import Condition, family_of, join, take
from blockprune.model.schedulers import MAX_SEED, SCHEDULERS


class NotFinite(ArithmeticError):
    """The U-Net or the decoder gave NaN or infinity."""


def teacher_fails(err: NotFinite) -> UserError:
    """What a user is told when it is the teacher's."""
    return UserError(f"the teacher itself fails: {err}; check its weights or use --dtype float32")


@dataclass(frozen=True)
class Protocol:
    """How images are drawn: image i has prompt i (cycled), seed `seed + i`, and a latent of (height, width)."""

    n_images: int
    n_steps: int
    cfg_scale: float
    seed: int
    latent: tuple[int, int]
    scheduler: str = ""

    def __post_init__(self) -> None:
        for name, least in {"n_images": 1, "n_steps": 1, "cfg_scale": 0, "seed": 0}.items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"{name.replace('_', '-')} must be at least {least} and finite: got {getattr(self, name)}")
        if self.seed > MAX_SEED:
            raise UserError(f"seed must be at most {MAX_SEED}: got {self.seed}")
        if self.scheduler and self.scheduler not in SCHEDULERS:
            raise UserError(
                f"unknown scheduler {self.scheduler!r}: choose from {', '.join(SCHEDULERS)}, or leave it out for the model's own"
            )


def scheduler_of(pipe: DiffusionPipeline, name: str = "") -> SchedulerMixin:
    """A fresh scheduler: the pipeline's own kind, or the one of that short name with the pipeline's noise schedule."""
    if not name:
        return copy.deepcopy(pipe.scheduler)
    return getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config)


def scheduler_name(pipe: DiffusionPipeline, name: str = "") -> str:
    """What `scheduler_of` gives, by its short name where it has one, else by its class."""
    short = {kind: short for short, kind in SCHEDULERS.items()}
    kind = SCHEDULERS[name] if name else type(pipe.scheduler).__name__
    return short.get(kind, kind)


def check_schedule(pipe: DiffusionPipeline, protocol: Protocol) -> None:
    """Raises UserError where the protocol's scheduler cannot draw in so many steps, by letting it step over zeros."""
    scheduler, zeros = scheduler_of(pipe, protocol.scheduler), torch.zeros(1, 1, 2, 2)
    try:
        scheduler.set_timesteps(protocol.n_steps)
        if len({*scheduler.timesteps.tolist()}) < protocol.n_steps:
            raise ValueError("it has not so many timesteps")
        for t in scheduler.timesteps:
            scheduler.step(scheduler.scale_model_input(zeros, t), t, zeros, return_dict=False)
    except (ValueError, IndexError, RuntimeError, TypeError, AttributeError, ZeroDivisionError) as err:
        why = first_line(err)
        name = scheduler_name(pipe, protocol.scheduler)
        raise UserError(
            f"the scheduler {name} cannot draw in {protocol.n_steps} steps ({why}): give another --steps or --scheduler"
        ) from None


def encode(
    pipe: DiffusionPipeline, prompts: Sequence[str], latent: tuple[int, int], chunk: int = 32
) -> tuple[Condition, Condition]:
    """The U-Net's condition for each prompt, and the one-row condition of no prompt that guidance starts from."""
    family = family_of(pipe.unet.config)
    size = (latent[0] * pipe.vae_scale_factor, latent[1] * pipe.vae_scale_factor)
    with torch.inference_mode():
        rows = join(*(family.text(pipe, prompts[i : i + chunk], size) for i in range(0, len(prompts), chunk)))
        return rows, family.empty(pipe, size)


def noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal noise (len(seeds), *shape), float32 on CPU, each row from its own seed."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def guide(out: Tensor, cfg_scale: float) -> Tensor:
    """(2 N, …) predictions without and with their prompts => (N, …) guided ones (arXiv 2207.12598)."""
    plain, text = out.chunk(2)
    return plain + cfg_scale * (text - plain)


@torch.inference_mode()
def denoise(pipe: DiffusionPipeline, protocol: Protocol, condition: Condition, blank: Condition, seeds: Sequence[int]) -> Tensor:
    """The latents (N, C, h, w) drawn for the rows of `condition`; `blank` is the one-row condition of the empty prompt.

    Classifier-free guidance (arXiv 2207.12598): e = e_blank + s (e_text - e_blank); none for s <= 1. Raises NotFinite.
    """
    unet = pipe.unet
    scheduler = scheduler_of(pipe, protocol.scheduler)
    scheduler.set_timesteps(protocol.n_steps, device=unet.device)
    latents = noise((unet.config.in_channels, *protocol.latent), seeds).to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    guided = protocol.cfg_scale > 1
    both = join(take(blank, [0] * len(seeds)), condition) if guided else condition
    extra = _generators(scheduler, seeds)
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
        out = unet(x, t, **both, return_dict=False)[0]
        latents = scheduler.step(guide(out, protocol.cfg_scale) if guided else out, t, latents, **extra, return_dict=False)[0]
    if not torch.isfinite(latents).all():
        raise NotFinite("the latents are not finite")
    return latents


@torch.inference_mode()
def edit(
    pipe: DiffusionPipeline, protocol: Protocol, strength: float, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """The latents (N, C, h, w) that images NCHW uint8 become by their prompts in diffusers' own image-to-image pipeline.

    The last int(strength * n_steps) of the protocol's steps are taken, at least one. Image i has seed `seeds[i]` for its encoding,
    its noise, and the scheduler's. Raises NotFinite.
    """
    img2img = family_of(pipe.unet.config).img2img
    assert img2img is not None, "a plan has checked that the family has one"
    editor = img2img(pipe)
    editor.scheduler = scheduler_of(pipe, protocol.scheduler)
    editor.set_progress_bar_config(disable=True)
    latents: Tensor = editor(
        prompt=list(prompts),
        image=images.float() / 255,
        strength=strength,
        num_inference_steps=protocol.n_steps,
        guidance_scale=protocol.cfg_scale,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        output_type="latent",
    ).images
    if not torch.isfinite(latents).all():
        raise NotFinite("the latents are not finite")
    return latents


def _generators(scheduler: SchedulerMixin, seeds: Sequence[int]) -> dict[str, Any]:
    """Generators of each image's own for schedulers that add noise, offset so as not to repeat the first noise."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": [torch.Generator().manual_seed(s + 2**32) for s in seeds]}


@torch.inference_mode()
def decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) => images NCHW uint8 on CPU. Raises NotFinite."""
    vae = pipe.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with upcast(vae):
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
    if not torch.isfinite(images).all():
        raise NotFinite("the decoded images are not finite")
    return (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


@torch.inference_mode()
def encode_images(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """Images NCHW uint8 => the mean of the VAE's latents (N, C, h, w), scaled as the U-Net takes them."""
    vae = pipe.vae
    with upcast(vae):
        moments = vae.encode(images.to(vae.device, vae.dtype) / 127.5 - 1).latent_dist
    return (moments.mean - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


@contextmanager
def upcast(vae: AutoencoderKL) -> Iterator[None]:
    """float32 for a VAE that overflows in float16 (SDXL's `force_upcast`), and back."""
    dtype = vae.dtype
    needed = bool(getattr(vae.config, "force_upcast", False)) and dtype == torch.float16
    try:
        yield vae.to(torch.float32) if needed else None
    finally:
        if needed:
            vae.to(dtype)


def draw(
    pipe: DiffusionPipeline, protocol: Protocol, condition: Condition, blank: Condition, index: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(latents, images NCHW uint8) of these numbers, image i from prompt i and seed `protocol.seed + i`. Raises NotFinite."""
    n_prompts = condition["encoder_hidden_states"].shape[0]
    rows = take(condition, torch.tensor([i % n_prompts for i in index]))
    latents = denoise(pipe, protocol, rows, blank, [protocol.seed + i for i in index])
    return latents, decode(pipe, latents)


def batches_of(n: int, size: int) -> list[range]:
    """Numbers 0 to n - 1 in batches of at most `size`."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]
