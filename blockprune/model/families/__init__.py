"""Model families: one file each, and the one place that tells them apart. Everything else is one path."""

from __future__ import annotations

from blockprune.errors import UserError
from blockprune.model.config_schema import Config
from blockprune.model.families.family import Condition, Family, join, on, take
from blockprune.model.families.sd import SD
from blockprune.model.families.sdxl import SDXL

__all__ = ["FAMILIES", "Condition", "Family", "family_of", "join", "on", "take"]

FAMILIES: dict[str | None, Family] = {None: SD, "text_time": SDXL}  # by how a U-Net's configuration says it is conditioned


def family_of(config: Config) -> Family:
    """The family of a U-Net configuration; UserError for one that is conditioned in a way not supported."""
    kind = config.get("addition_embed_type")
    if kind not in FAMILIES or config.get("class_embed_type") or config.get("time_cond_proj_dim"):
        raise UserError(f"U-Net conditioning {kind!r} is not supported: Stable Diffusion v1, v2 and SDXL are")
    return FAMILIES[kind]
