"""SDXL: two text encoders, and the size and crop of the image as six numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from blockprune.model.config_schema import Config
from blockprune.model.families import sd
from blockprune.model.families.family import Condition, Family, Size


def _text(pipe: DiffusionPipeline, prompts: Sequence[str], size: Size) -> Condition:
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.device, do_classifier_free_guidance=False)
    time_ids = torch.tensor([*size, 0, 0, *size], dtype=embeds.dtype, device=embeds.device).repeat(len(prompts), 1)
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def _empty(pipe: DiffusionPipeline, size: Size) -> Condition:
    row = _text(pipe, [""], size)
    if not pipe.config.force_zeros_for_empty_prompt:
        return row
    added = row["added_cond_kwargs"]
    zeros = {"encoder_hidden_states": torch.zeros_like(row["encoder_hidden_states"])}
    return zeros | {"added_cond_kwargs": added | {"text_embeds": torch.zeros_like(added["text_embeds"])}}


def _blank(config: Config, n: int, n_tokens: int, like: Tensor) -> Condition:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": like.new_zeros(n, pooled), "time_ids": like.new_zeros(n, 6)}
    return sd.blank(config, n, n_tokens, like) | {"added_cond_kwargs": added}


def _img2img(pipe: DiffusionPipeline) -> DiffusionPipeline:
    zeros = pipe.config.force_zeros_for_empty_prompt
    return StableDiffusionXLImg2ImgPipeline(**pipe.components, force_zeros_for_empty_prompt=zeros, add_watermarker=False)


SDXL = Family("sdxl", _text, _empty, _blank, img2img=_img2img)
