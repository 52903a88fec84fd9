"""Slot-keeping surgery: a removed block is replaced, in place, by a stand-in; every other module keeps its name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import no_init_weights
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture

COMPONENTS = ("attn1", "attn2", "ff")  # of a transformer layer: self-attention, cross-attention, feed-forward


class ChannelFit(nn.Module):
    """A scale and a shift for each channel of NCHW images or (N, tokens, C) sequences."""

    def __init__(self, channels: int, scale: float, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(like.new_full((channels,), scale), like.requires_grad)
        self.shift = nn.Parameter(like.new_zeros(channels), like.requires_grad)

    def forward(self, hidden: Tensor) -> Tensor:
        shape = (-1, 1, 1) if hidden.ndim == 4 else (-1,)
        return hidden * self.scale.view(shape) + self.shift.view(shape)


class StandIn(nn.Module):
    """Takes the place of a removed block; `fit`, where there is one, maps what would pass through to what the block gave."""

    fit: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.fit = None

    def out(self, hidden: Tensor) -> Tensor:
        return hidden if self.fit is None else self.fit(hidden)


class Pass(StandIn):
    """The hidden state, unchanged: stands in for a transformer layer, a ResNet of the down path, the mid stage, a resampler."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.out(hidden)


class PassAttention(StandIn):
    """The hidden state as a 1-tuple, as an attention returns it."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (self.out(hidden),)


class DropSkip(StandIn):
    """The hidden state without the skip that was concatenated behind it: stands in for a ResNet of the up path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        last = hidden.is_contiguous(memory_format=torch.channels_last) and not hidden.is_contiguous()
        kept = hidden[:, : self.channels].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return self.out(kept)


class Shortcut(StandIn):
    """The trained 1x1 `conv_shortcut` alone: stands in for a ResNet that changes the width."""

    def __init__(self, resnet: ResnetBlock2D) -> None:
        super().__init__()
        self.conv_shortcut: nn.Conv2d = resnet.conv_shortcut

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.out(self.conv_shortcut(hidden))


class Zero(StandIn):
    """Zeros, or what is fitted to the input: stands in for a component of a transformer layer, beside its residual."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden) if self.fit is None else self.fit(hidden)


class PassDown(StandIn):
    """Stands in for the innermost down stage: as many skips as that pushed, so that the up path's books still balance."""

    def __init__(self, n_skips: int) -> None:
        super().__init__()
        self.n_skips = n_skips

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return hidden_states, (hidden_states,) * self.n_skips


class PassUp(StandIn):
    """Stands in for the innermost up stage; `resnets` has the length by which the U-Net pops skips."""

    def __init__(self, n_skips: int) -> None:
        super().__init__()
        self.resnets = range(n_skips)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.out(hidden_states)


def stand_in(unet: UNet2DConditionModel, name: str, kind: str = "") -> StandIn:
    """A new stand-in for the module `name`; UserError says why a module cannot be removed.

    A trained part that stays (a `conv_shortcut`) is shared with the teacher, not copied. `kind` adds a fit that is still to be
    fitted: it changes nothing, or is the shortcut itself where a linear map takes that one's place.
    """
    plain = _plain_stand_in(unet, name)
    return _with_fit(plain, unet.get_submodule(name), kind) if kind else plain


def _plain_stand_in(unet: UNet2DConditionModel, name: str) -> StandIn:
    module = _module(unet, name)
    if name == "mid_block" or isinstance(module, BasicTransformerBlock):
        return Pass()
    if isinstance(module, Transformer2DModel):
        return PassAttention()
    if _is_component(unet, name):
        return Zero()
    if isinstance(module, ResnetBlock2D):
        return _resnet_stand_in(unet, name, module)
    if name in innermost(unet):
        n_skips = len(getattr(module, "resnets", ()))
        return Pass() if not n_skips else PassDown(n_skips) if name.startswith("down") else PassUp(n_skips)
    raise UserError(f"cannot remove {name!r}: {why_fixed(unet, name)}")


def _is_component(unet: UNet2DConditionModel, name: str) -> bool:
    layer, _, part = name.rpartition(".")
    return part in COMPONENTS and isinstance(unet.get_submodule(layer), BasicTransformerBlock)


def _with_fit(plain: StandIn, module: nn.Module, kind: str) -> StandIn:
    like, channels = next(module.parameters()), _channels(module)
    start = 0.0 if isinstance(plain, Zero) else 1.0
    if kind == "channel":
        plain.fit = ChannelFit(channels, start, like)
        return plain
    shortcut = plain.conv_shortcut if isinstance(plain, Shortcut) else None
    wide = channels if shortcut is None else int(shortcut.in_channels)
    sequence = isinstance(module, BasicTransformerBlock | Attention | FeedForward)
    linear: nn.Linear | nn.Conv2d = nn.Linear(wide, channels) if sequence else nn.Conv2d(wide, channels, 1)
    linear = linear.to(like.device, like.dtype).requires_grad_(False)
    weight = start * torch.eye(channels, dtype=like.dtype, device=like.device) if shortcut is None else shortcut.weight
    bias = like.new_zeros(channels) if shortcut is None or shortcut.bias is None else shortcut.bias
    linear.weight.copy_(weight.view_as(linear.weight))
    linear.bias.copy_(bias)  # type: ignore[union-attr]
    whole = plain if shortcut is None else Pass()
    whole.fit = linear.requires_grad_(like.requires_grad)
    return whole


def _channels(module: Any) -> int:
    """Channels of what a block that can be fitted returns."""
    if isinstance(module, BasicTransformerBlock | FeedForward):
        return int(module.dim if isinstance(module, BasicTransformerBlock) else module.net[-1].out_features)
    if isinstance(module, Attention):
        return int(module.query_dim)
    if isinstance(module, Transformer2DModel):
        return int(module.in_channels)
    last = module if isinstance(module, ResnetBlock2D) else module.resnets[-1]
    return int(last.out_channels)


def stand_ins(unet: UNet2DConditionModel, arch: Architecture, fits: Mapping[str, Tensor] | None = None) -> dict[str, StandIn]:
    """A stand-in for each block that `arch` removes, with the fitted weights of `fits` ("mid_block.fit.weight", …), if given.

    Raises UserError when these are not exactly those of `arch`.
    """
    kinds = dict(arch.fits)
    made = {name: stand_in(unet, name, kinds.get(name, "")) for name in arch}
    if fits is None:
        return made
    parts = {name: module.fit for name, module in made.items() if module.fit is not None}
    own = {f"{name}.fit.{key}": t for name, fit in parts.items() for key, t in fit.state_dict().items()}
    if own.keys() != fits.keys() or any(own[key].shape != fits[key].shape for key in own):
        raise UserError(f"the fitted weights are not those of the architecture {arch.key}: fit it again")
    with torch.no_grad():
        for key, t in own.items():
            t.copy_(fits[key])
    return made


def _module(unet: UNet2DConditionModel, name: str) -> nn.Module:
    try:
        return unet.get_submodule(name)
    except AttributeError:
        raise UserError(f"no block {name!r} in this U-Net: see `blockprune graph`") from None


def _resnet_stand_in(unet: UNet2DConditionModel, name: str, resnet: ResnetBlock2D) -> StandIn:
    hidden = _hidden_width(unet, name, resnet)
    if resnet.up or resnet.down:
        raise UserError(f"cannot remove {name!r}: it changes the resolution")
    if hidden != resnet.out_channels:
        return Shortcut(resnet)
    return Pass() if hidden == resnet.in_channels else DropSkip(hidden)


def _hidden_width(unet: UNet2DConditionModel, name: str, resnet: ResnetBlock2D) -> int:
    """Channels of the hidden state that enters a ResNet, without the skip concatenated to it in the up path."""
    path, _, index = name.partition(".resnets.")
    if not path.startswith("up_blocks."):
        return int(resnet.in_channels)
    if int(index) > 0:
        return int(unet.get_submodule(f"{path}.resnets.{int(index) - 1}").out_channels)
    stage = int(path.split(".")[1])
    before = unet.up_blocks[stage - 1] if stage else unet.down_blocks[-1]
    return int(before.resnets[-1].out_channels)


def innermost(unet: UNet2DConditionModel) -> frozenset[str]:
    """The modules of the innermost stage, which go together; empty when widths forbid it."""
    last = len(unet.down_blocks) - 1
    if last < 1 or not unet.down_blocks[last - 1].downsamplers or not unet.up_blocks[0].upsamplers:
        return frozenset()
    inner = [*unet.down_blocks[last].resnets, *unet.up_blocks[0].resnets]
    widths = {unet.down_blocks[last].resnets[0].in_channels} | {r.out_channels for r in inner}
    if len(widths) > 1:
        return frozenset()
    return frozenset({f"down_blocks.{last - 1}.downsamplers.0", f"down_blocks.{last}", "up_blocks.0"})


def why_fixed(unet: UNet2DConditionModel, name: str) -> str:
    """Why a module that has no stand-in must stay."""
    if "samplers." in name:
        return "it changes the resolution, so widths and skips would no longer meet; only the innermost stage can lose its pair"
    if name.startswith(("down_blocks.", "up_blocks.")) and name.count(".") == 1:
        return "the stage changes width or resolution; remove its blocks instead"
    return "the U-Net has no path around it"


@contextmanager
def swapped(unet: UNet2DConditionModel, modules: Mapping[str, nn.Module]) -> Iterator[UNet2DConditionModel]:
    """`unet` with some of its modules swapped in place; they are put back on leaving, also after an exception."""
    originals = {name: unet.get_submodule(name) for name in modules}
    training, saving = unet.training, vars(unet).get("save_pretrained")
    try:
        for name, module in modules.items():
            unet.set_submodule(name, module.train(training))
        if modules and saving is None:
            unet.save_pretrained = refuse_to_save
        yield unet
    finally:
        for name, module in originals.items():
            unet.set_submodule(name, module)
        if saving is None:
            vars(unet).pop("save_pretrained", None)


def refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Takes the place of `save_pretrained`, which would write the full configuration beside the weights that are left."""
    raise UserError(
        "save_pretrained cannot save a U-Net without some of its blocks: loading would fill them at random; write the pipeline "
        "with blockprune.save and load it with blockprune.load_pipeline, or the U-Net alone with "
        "blockprune.export.pipeline.save_student"
    )


def removed(
    unet: UNet2DConditionModel, arch: Architecture, fits: Mapping[str, Tensor] | None = None
) -> AbstractContextManager[UNet2DConditionModel]:
    """A context in which `unet` runs with the blocks of `arch` masked: no weight of it is copied, none is lost.

    `fits` are the fitted weights of the stand-ins that have some; without them these still do what plain ones do.
    """
    check_innermost(unet, arch)
    return swapped(unet, stand_ins(unet, arch, fits))


def check_innermost(unet: UNet2DConditionModel, arch: Architecture) -> None:
    """Raises UserError when `arch` removes a part of the innermost stage and keeps another."""
    parts = innermost(unet) if arch else frozenset()  # a pruned U-Net has no innermost stage to look for
    if arch.removed & parts and not parts <= arch.removed:
        raise UserError(f"the innermost stage goes as one: also remove {', '.join(sorted(parts - arch.removed))}")


def prune(unet: UNet2DConditionModel, arch: Architecture, fits: Mapping[str, Tensor] | None = None) -> UNet2DConditionModel:
    """A standalone student: a copy of `unet` in which the weights of the removed blocks do not exist; `fits` as for `removed`.

    Its `save_pretrained` raises UserError; `blockprune.save` and `blockprune.export.pipeline.save_student` write it.
    """
    with removed(unet, arch, fits) as masked:
        return copy.deepcopy(masked)


def architecture_of(unet: nn.Module) -> Architecture:
    """What a pruned or masked U-Net lacks, and what stands in for it."""
    parts = {name: module for name, module in unet.named_modules() if isinstance(module, StandIn)}
    kinds = {
        name: "channel" if isinstance(part.fit, ChannelFit) else "linear" for name, part in parts.items() if part.fit is not None
    }
    return Architecture(frozenset(parts), frozenset(kinds.items()))


@contextmanager
def built(what: str) -> Iterator[None]:
    """Within this context a library builds or runs a network that a configuration describes: what it raises is a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as err:
        why = (str(err).strip().splitlines() or [""])[0][:200] or type(err).__name__
        remedy = "mend its config.json, or choose another resolution"
        raise UserError(f"the configuration of {what} describes no network that can be built ({why}): {remedy}") from None


def skeleton(config: Mapping[str, Any], arch: Architecture) -> UNet2DConditionModel:
    """The student's modules on the meta device, without weights."""
    with built("the U-Net"), torch.device("meta"), no_init_weights():
        unet = UNet2DConditionModel.from_config(config)
    for name, module in stand_ins(unet, arch).items():
        unet.set_submodule(name, module)
    if arch:
        unet.save_pretrained = refuse_to_save
    return unet.eval()
