"""Drawing images: those of diffusers' own pipelines to a grey level, whatever the batch size, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from blockprune.errors import UserError
from blockprune.model.sampling import NotFinite, Protocol, batches_of, decode, draw, edit, encode, encode_images, noise
from blockprune.model.schedulers import SCHEDULERS

PROMPTS = ["a cat", "two dogs", "", "a red kite"]
PROTOCOL = Protocol(n_images=4, n_steps=3, cfg_scale=4.0, seed=7, latent=(8, 8))


@pytest.fixture
def pipe(tiny_folder: Callable[[str], Path]) -> Callable[[str], diffusers.DiffusionPipeline]:
    def load(kind: str) -> diffusers.DiffusionPipeline:
        pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_folder(kind), local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def images(pipe, protocol: Protocol, batch_size: int) -> torch.Tensor:
    conditions = encode(pipe, PROMPTS, protocol.latent)
    return torch.cat([draw(pipe, protocol, *conditions, batch)[1] for batch in batches_of(protocol.n_images, batch_size)])


def stock_images(pipe, protocol: Protocol) -> torch.Tensor:
    if protocol.scheduler:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[protocol.scheduler]).from_config(pipe.scheduler.config)
    start = noise((4, *protocol.latent), [protocol.seed + i for i in range(protocol.n_images)])
    generators = [torch.Generator().manual_seed(protocol.seed + i + 2**32) for i in range(protocol.n_images)]
    out = pipe(
        PROMPTS,
        height=protocol.latent[0] * pipe.vae_scale_factor,
        width=protocol.latent[1] * pipe.vae_scale_factor,
        num_inference_steps=protocol.n_steps,
        guidance_scale=protocol.cfg_scale,
        latents=start,
        generator=generators,
        output_type="pt",
    )
    return out.images.mul(255).round().to(torch.uint8)


@pytest.mark.parametrize("kind", ["sd1", "sd1-v", "sd2", "sdxl"])
@pytest.mark.parametrize("cfg_scale", [pytest.param(1.0, marks=pytest.mark.slow), 4.0])
def test_equals_the_diffusers_pipeline(pipe, kind: str, cfg_scale: float) -> None:
    protocol = Protocol(4, 3, cfg_scale, 7, (8, 8))
    ours, stock = images(pipe(kind), protocol, 4), stock_images(pipe(kind), protocol)
    assert (ours.int() - stock.int()).abs().max() <= 1


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_equals_diffusers(pipe, scheduler: str) -> None:
    protocol = Protocol(4, 4, 4.0, 7, (8, 8), scheduler)
    ours, stock = images(pipe("sd1"), protocol, 4), stock_images(pipe("sd1"), protocol)
    assert (ours.int() - stock.int()).abs().max() <= 1


@pytest.mark.parametrize("scheduler", ["", "euler-a"])
def test_batch_size_changes_nothing(pipe, scheduler: str) -> None:
    protocol = Protocol(5, 3, 4.0, 7, (8, 8), scheduler)
    whole, single = images(pipe("sd1"), protocol, 5), images(pipe("sd1"), protocol, 2)
    assert (whole.int() - single.int()).abs().max() <= 1
    assert (whole[0].int() - whole[4].int()).abs().max() > 1, "same prompt, other seed"


INPUTS = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SEEDS = [7, 8, 9, 10]


def edited(pipe, strength: float, index: list[int], scheduler: str = "") -> torch.Tensor:
    protocol = Protocol(4, 4, 4.0, 7, (8, 8), scheduler)
    return decode(pipe, edit(pipe, protocol, strength, INPUTS[index], [PROMPTS[i] for i in index], [SEEDS[i] for i in index]))


@pytest.mark.parametrize("kind", ["sd1", "sd1-v", "sdxl"])
@pytest.mark.parametrize("strength", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_edits_are_those_of_diffusers_image_to_image_pipeline(pipe, kind: str, strength: float) -> None:
    stock = diffusers.AutoPipelineForImage2Image.from_pipe(pipe(kind))
    images = stock(
        PROMPTS,
        image=INPUTS.float() / 255,
        strength=strength,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    ours = edited(pipe(kind), strength, [0, 1, 2, 3])
    assert (ours.int() - images.mul(255).round().int()).abs().max() <= 1


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_an_edit_depends_on_its_image_prompt_and_seed_alone(pipe, scheduler: str) -> None:
    p = pipe("sd1")
    own = p.scheduler
    whole = edited(p, 0.5, [0, 1, 2, 3], scheduler)
    assert (whole[[3, 1]].int() - edited(p, 0.5, [3, 1], scheduler).int()).abs().max() <= 1
    assert (whole[3].int() - edited(p, 0.75, [3], scheduler)[0].int()).abs().max() > 1, "more steps, another image"
    assert p.scheduler is own


def test_an_edit_that_is_not_finite_is_an_error(pipe) -> None:
    p = pipe("sd1")
    with torch.no_grad():
        p.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NotFinite):
        edited(p, 0.5, [0])


def test_sdxl_is_told_the_resolution(pipe) -> None:
    rows, _ = encode(pipe("sdxl"), PROMPTS, (8, 4))
    assert rows["added_cond_kwargs"]["time_ids"][0].tolist() == [16, 8, 0, 0, 16, 8]


def test_images_and_latents_round_trip_in_shape(pipe) -> None:
    p = pipe("sd1")
    latents = encode_images(p, torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert latents.shape == (2, 4, 8, 8)
    assert decode(p, latents).shape == (2, 3, 16, 16)


def test_nan_is_an_error(pipe) -> None:
    p = pipe("sd1")
    with torch.no_grad():
        p.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NotFinite):
        images(p, PROTOCOL, 4)


@pytest.mark.parametrize("bad", [{"n_images": 0}, {"n_steps": 0}, {"cfg_scale": -1}, {"scheduler": "nope"}])
def test_bad_protocols(bad: dict) -> None:
    with pytest.raises(UserError):
        Protocol(**{"n_images": 1, "n_steps": 1, "cfg_scale": 1.0, "seed": 0, "latent": (8, 8), **bad})
