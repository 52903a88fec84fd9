"""From any diffusers U-Net to its BlockGraph, by one forward pass on the meta device: no weights, no arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blockprune.errors import UserError
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.count import count
from blockprune.model.families import family_of
from blockprune.model.graph import Block, BlockGraph, Cost, sum_costs

KIND_OF = {
    ResnetBlock2D: "R",
    Transformer2DModel: "A",
    BasicTransformerBlock: "T",
    Downsample2D: "D",
    Upsample2D: "U",
}
Shape = tuple[int, int, int]


def trace(config: Mapping[str, Any], latent_size: tuple[int, int] | None = None, n_tokens: int = 77) -> BlockGraph:
    """The graph of the U-Net that a diffusers `config` describes, costed for one latent of (height, width).

    `latent_size` None means the configuration's own `sample_size`. A graph is traced once in a process, which takes seconds. Raises
    UserError for a U-Net of blocks it does not know.
    """
    return _trace(json.dumps(dict(config), sort_keys=True, default=repr), latent_size, n_tokens)


@lru_cache(maxsize=32)
def _trace(config_json: str, latent_size: tuple[int, int] | None, n_tokens: int) -> BlockGraph:
    config = json.loads(config_json)
    unet = surgery.skeleton(config, Architecture())
    side = config["sample_size"]
    height, width = latent_size or ((side, side) if isinstance(side, int) else side)
    sample = torch.empty(1, config["in_channels"], height, width, device="meta")
    family = family_of(config)

    def run() -> None:
        unet(sample, torch.ones((), device="meta"), **family.blank(config, 1, n_tokens, sample))

    names = _block_names(unet)
    with surgery.built("the U-Net"), _record(unet, names) as seen:
        costs = count(unet, run)
    inner = surgery.innermost(unet)
    blocks = [_block(unet, name, kind, seen, costs, inner) for name, kind in names.items() if name in seen.shapes]
    blocks.sort(key=lambda b: seen.order[b.name])
    outside = _without_innermost(unet, inner, run) if inner else {}
    mid = [b for b in blocks if b.stage == "mid_block" and b.removable]
    return BlockGraph(
        blocks=tuple(blocks),
        total=costs[""],
        latent=(config["in_channels"], height, width),
        n_tokens=n_tokens,
        innermost=inner,
        rescaled={b.name: outside[b.name] for b in mid} if inner else {},
        rescaling=outside["mid_block"] - costs["mid_block"] if inner and "mid_block" in outside else Cost(),
    )


def _without_innermost(unet: UNet2DConditionModel, inner: frozenset[str], run: Any) -> dict[str, Cost]:
    with surgery.removed(unet, Architecture(inner)):
        return count(unet, run)


def _block_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Module path => kind of every node; UserError names a stage of the U-Net in which none is known."""
    names = {"mid_block": "M"} if unet.mid_block is not None else {}
    names |= dict.fromkeys(surgery.innermost(unet) - {n for n in surgery.innermost(unet) if "samplers" in n}, "S")
    for name, module in unet.named_modules():
        if type(module) in KIND_OF and "." in name:
            names[name] = KIND_OF[type(module)]
        if isinstance(module, BasicTransformerBlock):
            names |= {f"{name}.{part}": "C" for part in surgery.COMPONENTS if getattr(module, part, None) is not None}
    for path in ("down_blocks", "up_blocks"):
        for i, stage in enumerate(getattr(unet, path)):
            if not any(name.startswith(f"{path}.{i}.") for name in names):
                raise UserError(f"{path}.{i} is a {type(stage).__name__}: its blocks are not ResNets and attentions known here")
    return names | {name: "F" for name, _ in unet.named_children() if name not in {"down_blocks", "mid_block", "up_blocks"}}


class _Seen:
    """What a forward pass showed: order, shapes and skip sources by name."""

    def __init__(self) -> None:
        self.order: dict[str, int] = {}
        self.shapes: dict[str, tuple[Shape, Shape]] = {}
        self.skips: dict[str, str] = {}
        self.source: dict[int, str] = {}
        self.joined: dict[int, str] = {}
        self.alive: list[Tensor] = []


class _CatWatch(TorchFunctionMode):
    """Notes, for each concatenation of two block outputs, where the second (the skip) came from."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.cat and len(args[0]) == 2 and id(args[0][1]) in self.seen.source:
            self.seen.joined[id(out)] = self.seen.source[id(args[0][1])]
            self.seen.alive.append(out)
        return out


@contextmanager
def _record(unet: UNet2DConditionModel, names: Mapping[str, str]) -> Iterator[_Seen]:
    """Watches one forward pass: fills the yielded record by hooks and by the concatenations of the up path."""
    seen = _Seen()
    hooks = []
    for name in names:
        module = unet.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(_on_enter(seen, name), with_kwargs=True))
        hooks.append(module.register_forward_hook(_on_leave(seen, name), with_kwargs=True))
    try:
        with _CatWatch(seen):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _on_enter(seen: _Seen, name: str) -> Any:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.order.setdefault(name, len(seen.order))
        if (source := seen.joined.get(id(_first(args, kwargs)))) and isinstance(module, ResnetBlock2D):
            seen.skips[name] = source

    return enter


def _on_leave(seen: _Seen, name: str) -> Any:
    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        first = _first(args, kwargs)
        if not isinstance(tensor, Tensor) or not isinstance(first, Tensor):
            return
        seen.shapes[name] = (_shape(first), _shape(tensor))
        if name.count(".") != 1:
            seen.source[id(tensor)] = name
            seen.alive.append(tensor)

    return leave


def _shape(t: Tensor) -> Shape:
    """(channels, height, width); a sequence of tokens is (channels, tokens, 1) and an embedding (channels, 1, 1)."""
    c, h, w = t.shape[1:] if t.ndim == 4 else (t.shape[-1], t.shape[1] if t.ndim == 3 else 1, 1)
    return int(c), int(h), int(w)


def _block(
    unet: UNet2DConditionModel,
    name: str,
    kind: str,
    seen: _Seen,
    costs: Mapping[str, Cost],
    inner: frozenset[str],
) -> Block:
    stage = name if kind in "MSF" or name == "mid_block" else ".".join(name.split(".")[: 1 if name.startswith("mid") else 2])
    shape_in, shape_out = seen.shapes[name]
    try:
        module = surgery.stand_in(unet, name)
    except UserError as err:
        how, saves, why = "", None, str(err).partition(": ")[2]
    else:
        kept = [costs[f"{name}.{child}"] for child, _ in module.named_children()]
        how, saves, why = type(module).__name__, costs[name] - sum_costs(kept), ""
    skips = (seen.skips[name],) if name in seen.skips else ()
    requires = tuple(sorted(inner - {name})) if name in inner else ()
    return Block(name, kind, stage, shape_in, shape_out, costs[name], saves, how, why, skips, requires)
