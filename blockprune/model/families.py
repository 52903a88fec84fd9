"""What differs between model families: how the U-Net is conditioned. Everything else is one path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockprune.errors import UserError

Condition = dict[str, Any]


Size = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """How one family conditions its U-Net. A Condition holds keyword arguments of the U-Net, one row per prompt.

    `text(pipe, prompts, size)` encodes prompts for images of (height, width) pixels; `empty(pipe, size)` is the one row that
    classifier-free guidance starts from; `blank(config, n, n_tokens, like)` is zeros of those shapes for counting and timing,
    `like` giving dtype and device.
    """

    name: str
    text: Callable[[Any, Sequence[str], Size], Condition]
    empty: Callable[[Any, Size], Condition]
    blank: Callable[[Mapping[str, Any], int, int, Tensor], Condition]


def _text_sd(pipe: Any, prompts: Sequence[str], size: Size) -> Condition:
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


def _empty_sd(pipe: Any, size: Size) -> Condition:
    return _text_sd(pipe, [""], size)


def _text_sdxl(pipe: Any, prompts: Sequence[str], size: Size) -> Condition:
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.device, do_classifier_free_guidance=False)
    time_ids = torch.tensor([*size, 0, 0, *size], dtype=embeds.dtype, device=embeds.device).repeat(len(prompts), 1)
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def _empty_sdxl(pipe: Any, size: Size) -> Condition:
    row = _text_sdxl(pipe, [""], size)
    if not pipe.config.force_zeros_for_empty_prompt:
        return row
    added = row["added_cond_kwargs"]
    zeros = {"encoder_hidden_states": torch.zeros_like(row["encoder_hidden_states"])}
    return zeros | {"added_cond_kwargs": added | {"text_embeds": torch.zeros_like(added["text_embeds"])}}


def _blank_sd(config: Mapping[str, Any], n: int, n_tokens: int, like: Tensor) -> Condition:
    return {"encoder_hidden_states": like.new_zeros(n, n_tokens, config["cross_attention_dim"])}


def _blank_sdxl(config: Mapping[str, Any], n: int, n_tokens: int, like: Tensor) -> Condition:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": like.new_zeros(n, pooled), "time_ids": like.new_zeros(n, 6)}
    return _blank_sd(config, n, n_tokens, like) | {"added_cond_kwargs": added}


FAMILIES: dict[str | None, Family] = {
    None: Family("sd", _text_sd, _empty_sd, _blank_sd),
    "text_time": Family("sdxl", _text_sdxl, _empty_sdxl, _blank_sdxl),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a U-Net configuration; UserError for one that is conditioned in a way not supported."""
    kind = config.get("addition_embed_type")
    if kind not in FAMILIES or config.get("class_embed_type") or config.get("time_cond_proj_dim"):
        raise UserError(f"U-Net conditioning {kind!r} is not supported: Stable Diffusion v1, v2 and SDXL are")
    return FAMILIES[kind]


def join(*conditions: Condition) -> Condition:
    """The conditions one below the other, along the batch dimension."""
    return _zip(lambda *rows: torch.cat(rows), *conditions)


def take(condition: Condition, rows: Any) -> Condition:
    """The given rows (slice or index tensor) of a condition."""
    return _zip(lambda t: t[rows], condition)


def _zip(fn: Callable[..., Tensor], *conditions: Condition) -> Condition:
    first = conditions[0]
    return {
        k: _zip(fn, *(c[k] for c in conditions)) if isinstance(first[k], dict) else fn(*(c[k] for c in conditions)) for k in first
    }
