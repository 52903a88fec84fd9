"""Adapters made for a teacher, renamed for its student: those of removed blocks go, the rest follow their blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from diffusers import UNet2DConditionModel
from torch import Tensor

from blockprune.decode import Finite, Natural, Object, checked, parse_json
from blockprune.errors import UserError
from blockprune.export.stock_config import BlockMap

UNET_PARTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
PEFT = "base_model.model."
PREFIXES = ("unet.", f"{PEFT}unet.", PEFT, "")
OTHERS = ("text_encoder.", "text_encoder_2.")
METADATA = "lora_adapter_metadata"  # diffusers' name for the adapter's configuration in the file
TENSOR = re.compile(r"\.(lora|lokr|loha|hada|alpha|dora_scale|processor)\b|\.(lora|lokr|loha|hada|oft|boft)_")
KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT")  # of peft, those whose configuration selects modules by these entries


@dataclass(frozen=True)
class Mapped:
    """An adapter for the student, and what became of the teacher's keys: renamed (old => new) and dropped; the rest stayed.

    `config` is peft's adapter_config.json, where there is one.
    """

    tensors: Mapping[str, Tensor]
    renamed: Mapping[str, str]
    dropped: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def map_lora(
    tensors: Mapping[str, Tensor],
    blocks: BlockMap,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Mapped:
    """The LoRA (or another kind that peft knows) of the student: `tensors` in the style of diffusers or peft.

    `metadata` is that of the file, `config` its adapter_config.json. Keys of text encoders stay. Raises UserError for a key of
    neither style, when no key of the U-Net is left, and for tensors in peft's style of which neither says how they are scaled.
    """
    if not tensors:
        raise UserError("the adapter holds no tensors: give a file that was saved with weights")
    names = {key: _mapped(key, blocks) for key in tensors}
    if config is None and METADATA not in (metadata or {}) and any(key.startswith(PEFT) for key in tensors):
        raise UserError("the tensors are in peft's style, and their scaling is in adapter_config.json: put that file beside them")
    dropped = tuple(key for key, new in names.items() if new is None)
    kept = {key: new for key, new in names.items() if new is not None}
    if dropped and not any(_is_unet(key) for key in kept):
        raise UserError(
            f"all {len(dropped)} tensors of the LoRA belong to removed blocks, {dropped[0]!r} first: nothing is left of it"
        )
    ours = {key: new for key, new in kept.items() if _is_unet(key)}
    return Mapped(
        tensors={new: tensors[key] for key, new in kept.items()},
        metadata=_map_metadata(metadata or {}, ours),
        config=None if config is None else dict(config) | _map_config(config, ours, _root(ours)),
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
    """The U-Net module that a key adapts, or is a tensor of."""
    name = _split(key)[1]
    found = TENSOR.search(name)
    return name[: found.start()] if found else name.rpartition(".")[0]


def _root(keys: Mapping[str, str]) -> str:
    """What peft's names of modules begin with: "unet." when the adapted model is a pipeline's worth of modules."""
    return "unet." if any(_split(key)[0] == f"{PEFT}unet." for key in keys) else ""


class AdapterConfig(msgspec.Struct):
    """The entries of a peft configuration that are read here: numbers by pattern of module names."""

    rank_pattern: dict[str, Natural] | None = None
    alpha_pattern: dict[str, Finite] | None = None

    def __post_init__(self) -> None:
        for pattern in {**(self.rank_pattern or {}), **(self.alpha_pattern or {})}:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                raise ValueError(f"Expected regular expressions, got {pattern[:60]!r}") from None


def _map_metadata(metadata: Mapping[str, str], keys: Mapping[str, str]) -> dict[str, str]:
    """The file's metadata with the adapter's configuration naming the student's modules one by one."""
    out = dict(metadata)
    if METADATA not in out:
        return out
    config: dict[str, Any] = parse_json(out[METADATA], Object, "the LoRA's metadata", "save it again")
    for prefix in PREFIXES:
        if f"{prefix}target_modules" in config:
            plain = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
            config |= {prefix + key: value for key, value in _map_config(plain, keys).items()}
            break
    return out | {METADATA: json.dumps(config, indent=2, sort_keys=True)}


def _map_config(config: Mapping[str, Any], keys: Mapping[str, str], root: str = "") -> dict[str, Any]:
    """Entries of a peft configuration that select modules by name; patterns are matched as peft does, on the teacher's names."""
    checked(dict(config), AdapterConfig, "the adapter's configuration", "save it again")
    if (kind := config.get("peft_type") or KINDS[0]) not in KINDS:
        raise UserError(f"the adapter is of peft's kind {kind!r}: only {', '.join(KINDS)} can be mapped")
    adapted = {root + _module(key): root + _module(new) for key, new in keys.items() if TENSOR.search(key)}
    named: dict[str, Any] = {"target_modules": sorted({*adapted.values()})}
    named |= {key: None for key in ("exclude_modules", "layers_to_transform", "layers_pattern") if key in config}
    if config.get("modules_to_save"):
        biases = config.get("bias", "none") != "none"
        whole = {_module(new) for new in keys.values() if not TENSOR.search(new) and not (biases and new.endswith(".bias"))}
        named["modules_to_save"] = sorted(root + module for module in whole) or None
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        found = {new: _first_match(patterns, old) for old, new in adapted.items()}
        if key in config:
            named[key] = {f"^{re.escape(new)}": patterns[p] for new, p in found.items() if p is not None}
    return named


def _first_match(patterns: Mapping[str, Any], module: str) -> str | None:
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def check_fits(mapped: Mapped, unet: UNet2DConditionModel) -> None:
    """Raises UserError when the LoRA names a module that the student lacks, or is of another width."""
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
