"""Small random models of the real families' exact block structure: every name of SD v1, SD v2 and SDXL, few channels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from blockprune.cost import latency
from blockprune.model import surgery
from blockprune.model.pretrained import silence

KINDS = ("sd1", "sd2", "sdxl")  # and "sd1-v": SD v1 trained to predict the velocity
FIRST_KIND = ("sd1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]))  # of laws that take long on the others
N_TOKENS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

_SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}
_SD2 = _SD1 | {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
_SDXL = _SD2 | {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
_UNETS = {"sd1": _SD1, "sd1-v": _SD1, "sd2": _SD2, "sdxl": _SDXL}


def config(kind: str) -> dict[str, Any]:
    """The full diffusers configuration of a tiny U-Net."""
    with torch.device("meta"):
        return dict(UNet2DConditionModel(**_UNETS[kind]).config)


def unet(kind: str, seed: int = 0) -> UNet2DConditionModel:
    """A tiny U-Net with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**_UNETS[kind]).eval()


def small_unet(kind: str, seed: int = 0) -> UNet2DConditionModel:
    """A U-Net of the kind "sd1" or "sdxl" with two stages of one layer, where the number of modules is what takes the time."""
    plain, attention = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    outer, inner = (plain, attention) if kind == "sdxl" else (attention, plain)
    more: dict[str, Any] = {"attention_head_dim": (1, 2), "transformer_layers_per_block": (1, 2)} if kind == "sdxl" else {}
    stages = {"down_block_types": (outer[0], inner[0]), "up_block_types": (inner[1], outer[1]), "layers_per_block": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**{**_UNETS[kind], "block_out_channels": (8, 16), **stages, **more}).eval()


def inputs(kind: str, batch: int = 2, size: int | tuple[int, int] = 8, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of the U-Net's forward: noise (batch, 4, h, w), a timestep per row, random conditions."""
    g = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size
    out: dict[str, Any] = {
        "sample": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.randint(1000, (batch,), generator=g),
        "encoder_hidden_states": torch.randn(batch, N_TOKENS, _UNETS[kind]["cross_attention_dim"], generator=g),
    }
    if kind == "sdxl":
        out["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 8, generator=g),
            "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(batch, 6),
        }
    return out


def tokenizer() -> CLIPTokenizer:
    """A tokenizer that spells words letter by letter."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=N_TOKENS)


def _text_encoder(projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=N_TOKENS,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).eval()


def pipeline(kind: str, folder: Path, seed: int = 0) -> DiffusionPipeline:
    """A tiny pipeline with random weights and 16-pixel images (8x8 latents), also written to `folder` in diffusers layout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": _vae(),
            "text_encoder": _text_encoder(),
            "tokenizer": tokenizer(),
            "unet": UNet2DConditionModel(**_UNETS[kind]).eval(),
            "scheduler": _scheduler(kind),
        }
        if kind == "sdxl":
            parts |= {"text_encoder_2": _text_encoder(projected=True), "tokenizer_2": tokenizer()}
            pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with silence():
        pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(kind: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if kind == "sd1-v" else "epsilon",
    )


class _Nan(surgery.StandIn):
    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden * torch.nan


def break_mid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the removal of the mid stage give NaN, but on the meta device, where graphs are traced that outlive the test."""
    real = surgery.stand_in

    def stand_in(unet: UNet2DConditionModel, name: str, kind: str = "") -> surgery.StandIn:
        return _Nan() if name == "mid_block" and unet.device.type != "meta" else real(unet, name, kind)

    monkeypatch.setattr(surgery, "stand_in", stand_in)


def drifting_clock(monkeypatch: pytest.MonkeyPatch, floor: float = 0.0) -> None:
    """Makes a step take (floor + parameters / 10^6) milliseconds, on a machine that is slower by half after every twelve steps."""
    steps = itertools.count()

    def step(unet: torch.nn.Module, inputs: object) -> float:
        size = sum(p.numel() for p in unet.parameters())
        return (floor + size / 10**6) / 1000 * (1 + 0.5 * (next(steps) // 12))

    monkeypatch.setattr(latency, "_cpu_step", step)
