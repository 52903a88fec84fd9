"""LoRA adapters made for a teacher, renamed for its student: those of removed blocks go, the rest follow their blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from blockprune.errors import UserError
from blockprune.stock import BlockMap

UNET_PARTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
PREFIXES = ("unet.", "base_model.model.unet.", "base_model.model.", "")
OTHERS = ("text_encoder.", "text_encoder_2.")
METADATA = "lora_adapter_metadata"  # diffusers' name for the adapter's configuration in the file
TENSOR = re.compile(r"\.(lora|lokr|loha|hada|alpha|dora_scale|processor)\b|\.(lora|lokr|loha|hada|oft)_")


@dataclass(frozen=True)
class Mapped:
    """An adapter for the student, and what became of the teacher's keys: renamed (old => new) and dropped; the rest stayed."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    renamed: Mapping[str, str]
    dropped: tuple[str, ...]


def map_lora(tensors: Mapping[str, Tensor], blocks: BlockMap, metadata: Mapping[str, str] | None = None) -> Mapped:
    """The adapter of the student: `tensors` in the style of diffusers or peft, `metadata` that of the file.

    Keys of text encoders stay. Raises UserError for a key of neither, and when no key of the U-Net is left.
    """
    names = {key: _mapped(key, blocks) for key in tensors}
    dropped = tuple(key for key, new in names.items() if new is None)
    kept = {key: new for key, new in names.items() if new is not None}
    if dropped and not any(_is_unet(key) for key in kept):
        raise UserError(
            f"all {len(dropped)} tensors of the LoRA belong to removed blocks, {dropped[0]!r} first: nothing is left of it"
        )
    modules = {_module(key): _module(new) for key, new in kept.items() if _is_unet(key)}
    return Mapped(
        tensors={new: tensors[key] for key, new in kept.items()},
        metadata=_map_metadata(metadata or {}, modules),
        renamed={key: new for key, new in kept.items() if key != new},
        dropped=dropped,
    )


def _split(key: str) -> tuple[str, str]:
    """The prefix before the U-Net's own name of a key, and that name; UserError for a key of another style."""
    for prefix in PREFIXES:
        rest = key.removeprefix(prefix)
        if key.startswith(prefix) and rest.split(".")[0] in UNET_PARTS:
            return prefix, rest
    hint = " (load a kohya file with diffusers and save it with save_lora_weights first)" if key.startswith("lora_") else ""
    raise UserError(f"{key!r} is no LoRA key like 'unet.down_blocks.0.attentions.0...lora_A.weight'{hint}: give one in that style")


def _is_unet(key: str) -> bool:
    return not key.startswith(OTHERS)


def _mapped(key: str, blocks: BlockMap) -> str | None:
    if not _is_unet(key):
        return key
    prefix, name = _split(key)
    new = blocks.new_name(name)
    return None if new is None else prefix + new


def _module(key: str) -> str:
    """The U-Net module that a key adapts."""
    name = _split(key)[1]
    found = TENSOR.search(name)
    return name[: found.start()] if found else name.rpartition(".")[0]


def _map_metadata(metadata: Mapping[str, str], modules: Mapping[str, str]) -> dict[str, str]:
    """The file's metadata with the adapter's configuration naming the student's modules one by one."""
    out = dict(metadata)
    if METADATA not in out:
        return out
    try:
        config = json.loads(out[METADATA])
    except ValueError as err:
        raise UserError(f"the LoRA's metadata is damaged ({err}): save it again") from None
    if not isinstance(config, dict):
        raise UserError("the LoRA's metadata is damaged (no JSON object): save it again")
    for prefix in PREFIXES:
        if f"{prefix}target_modules" in config:
            config |= _map_config({k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}, modules, prefix)
            break
    return out | {METADATA: json.dumps(config, indent=2, sort_keys=True)}


def _map_config(config: Mapping[str, Any], modules: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """Entries of a peft configuration that select modules by name; patterns are matched as peft does, on the teacher's names."""
    named: dict[str, Any] = {"target_modules": sorted({*modules.values()})}
    named |= {key: None for key in ("exclude_modules", "layers_to_transform", "layers_pattern") if key in config}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        found = {new: _first_match(patterns, old) for old, new in modules.items()}
        if key in config:
            named[key] = {f"^{re.escape(new)}": patterns[p] for new, p in found.items() if p is not None}
    return {prefix + key: value for key, value in named.items()}


def _first_match(patterns: Mapping[str, Any], module: str) -> str | None:
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def check_fits(mapped: Mapped, unet: UNet2DConditionModel) -> None:
    """Raises UserError when the adapter names a module that the student lacks, or is of another width."""
    shapes = {name: module.weight.shape for name, module in unet.named_modules() if hasattr(module, "weight")}
    for key, t in mapped.tensors.items():
        if not _is_unet(key) or ".processor" in key:
            continue
        module = _module(key)
        if module not in shapes:
            raise UserError(f"the LoRA adapts {module!r}, which the student lacks: it was made for another model")
        sides = {".lora_A.weight": 1, ".lora.down.weight": 1, ".lora_B.weight": 0, ".lora.up.weight": 0}
        for tail, side in sides.items():
            if key.endswith(tail) and t.shape[side] != shapes[module][side]:
                raise UserError(
                    f"the LoRA's {key!r} is of width {t.shape[side]}, and {module!r} of width {shapes[module][side]}: "
                    "it was made for another model"
                )
