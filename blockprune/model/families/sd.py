"""Stable Diffusion v1 and v2: one text encoder, whose hidden states the U-Net attends to."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from torch import Tensor

from blockprune.model.config_schema import Config
from blockprune.model.families.family import Condition, Family, Size


def _text(pipe: DiffusionPipeline, prompts: Sequence[str], size: Size) -> Condition:
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


def _empty(pipe: DiffusionPipeline, size: Size) -> Condition:
    return _text(pipe, [""], size)


def blank(config: Config, n: int, n_tokens: int, like: Tensor) -> Condition:
    return {"encoder_hidden_states": like.new_zeros(n, n_tokens, config["cross_attention_dim"])}


def _img2img(pipe: DiffusionPipeline) -> DiffusionPipeline:
    parts = pipe.components | {"safety_checker": None}  # which would black out images that are measured
    return StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)


SD = Family("sd", _text, _empty, blank, img2img=_img2img)
