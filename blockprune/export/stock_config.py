"""Whether a plain diffusers configuration can say what a pruned U-Net is, and under which names that keeps its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import Any, Literal

import msgspec
from diffusers import UNet2DConditionModel

from blockprune.decode import checked
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import other_settings
from blockprune.model.config_schema import Config
from blockprune.model.graph import BlockGraph

WITHOUT_ATTENTION = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
STAGES = {*WITHOUT_ATTENTION, *WITHOUT_ATTENTION.values()}
# entries of a configuration that may list one value per stage, outermost stage first; and innermost stage first
PER_DOWN_STAGE = ("block_out_channels", "down_block_types", "attention_head_dim", "cross_attention_dim", "only_cross_attention")
PER_UP_STAGE = ("up_block_types",)
Depth = int | list[int]


@dataclass(frozen=True)
class BlockMap:
    """Where the modules of a teacher are in its student; a module in neither `moved` nor `removed` keeps its name."""

    moved: Mapping[str, str]
    removed: frozenset[str]

    def new_name(self, name: str) -> str | None:
        """The student's name of a teacher's module or tensor, None when it is gone; the innermost block around it decides."""
        outer = name
        while outer:
            if outer in self.moved:
                return self.moved[outer] + name[len(outer) :]
            if outer in self.removed:
                return None
            outer = outer.rpartition(".")[0]
        return name

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, "moved": dict(self.moved), "removed": sorted(self.removed)}

    @classmethod
    def from_json(cls, data: object, what: str = "the block map") -> BlockMap:
        """The map of `to_json`; UserError, which calls it `what`, on any other shape."""
        record = checked(data, BlockMapRecord, what, 'it is JSON like {"format": 1, "moved": {}, "removed": []}')
        return cls(record.moved, frozenset(record.removed))


class BlockMapRecord(msgspec.Struct):
    """A BlockMap in JSON."""

    format: Literal[1]
    moved: dict[str, str]
    removed: list[str]


@dataclass(frozen=True)
class Stock:
    """A U-Net of stock diffusers: its configuration, and where it keeps the teacher's blocks."""

    config: Config
    blocks: BlockMap


class _NotStockError(Exception):
    """Why no stock configuration describes a student."""


@dataclass(frozen=True)
class _Stage:
    """What stays of a stage: its ResNets by index, and the transformer depth behind each, or None where there is no attention."""

    name: str
    n_resnets: int
    kept: tuple[int, ...]
    depths: tuple[int, ...] | None

    @property
    def gone(self) -> list[int]:
        return [j for j in range(self.n_resnets) if j not in self.kept]


def expressible(config: Config, arch: Architecture) -> Stock | str:
    """The stock form of the U-Net of `config` without the blocks of `arch`; the reason in words when there is none.

    Keys, shapes and settings of a stock form have been compared with the student's, once in a process. Raises UserError when `arch`
    does not fit.
    """
    return _expressible(json.dumps(dict(config), sort_keys=True, default=repr), arch)


@lru_cache(maxsize=32)
def _expressible(config_json: str, arch: Architecture) -> Stock | str:
    config = json.loads(config_json)
    teacher, student = surgery.skeleton(config, Architecture()), surgery.skeleton(config, arch)
    surgery.check_innermost(teacher, arch)
    if not arch:
        return Stock(_plain(config), BlockMap({}, frozenset()))
    if lost := next((name for name in arch if name.rpartition(".")[2] in surgery.COMPONENTS), None):
        return f"{lost} is gone alone: a stock transformer layer has its attentions and its feed-forward"
    if arch.fits:
        return f"a fitted map stands in for {min(arch.fits)[0]}: no stock stage has one"
    inner = surgery.innermost(teacher)
    gone = int(bool(inner) and inner <= arch.removed)
    n_stages = len(teacher.down_blocks) - gone
    try:
        downs = [_stage(teacher, student, arch, f"down_blocks.{i}") for i in range(n_stages)]
        ups = [_stage(teacher, student, arch, f"up_blocks.{i + gone}") for i in range(n_stages)]
        for down, up in zip(downs, reversed(ups), strict=True):
            _check_skips(down, up)
        mid_type, mid_kept = _mid(teacher, arch)
        blocks = BlockMap(_moved(teacher, arch, downs, ups, mid_kept, gone), arch.removed)
        depths = _depths(config, downs, ups, _mid_depth(teacher, arch) if mid_type == "UNetMidBlock2DCrossAttn" else None)
        stock = _config(config, downs, ups, gone) | {"mid_block_type": mid_type} | depths
        _compare(student, surgery.skeleton(stock, Architecture()), blocks)
    except _NotStockError as why:
        return str(why)
    return Stock(stock, blocks)


def who_loads(stock: Stock | str) -> str:
    """Whether plain diffusers loads a student, in words; `stock` is what `expressible` says of it."""
    return f"only blockprune.load_pipeline loads it: {stock}" if isinstance(stock, str) else "any diffusers loads it"


def stock_options(graph: BlockGraph) -> dict[str, dict[str, Architecture]]:
    """Level => label => what can go of it: one of each level at most, whatever goes of others. A level is the mid stage, or a down
    stage with the up stage that takes its skips.

    `expressible` has the last word: stages of other kinds, and the widths of attention heads, are not looked at here.
    """
    downs, ups = ({b.stage: None for b in graph if b.stage.startswith(way)} for way in ("down_blocks", "up_blocks"))
    levels = {f"{down} {up}": dict(_level(graph, down, up)) for down, up in zip(downs, reversed(ups), strict=True)}
    resnets = [j for j in range(2) if f"mid_block.resnets.{j}" in graph]
    mid = {f"mid_block but resnets.{j}": {f"mid_block.resnets.{1 - j}", "mid_block.attentions.0"} for j in resnets}
    sound = {label: Architecture(frozenset(gone)) for label, gone in mid.items() if all(name in graph for name in gone)}
    return levels | ({"mid_block": {"mid_block": Architecture(frozenset({"mid_block"})), **sound}} if "mid_block" in graph else {})


def _level(graph: BlockGraph, down: str, up: str) -> Iterator[tuple[str, Architecture]]:
    """What can go of two stages between which skips run, each with a label of pairs, and of stages whose attentions all go."""
    attended = [stage for stage in (down, up) if f"{stage}.attentions.0" in graph]
    for a, b in product(_kept(graph, down), _kept(graph, up)):
        try:
            _check_skips(a, b)
        except _NotStockError:
            continue
        pairs = [f"{s.name}.{part}.{j}" for s in (a, b) for j in s.gone for part in ("resnets", "attentions")]
        label = [f"{s.name}.pair.{j}" for s in (a, b) for j in s.gone]
        left = [s.name for s in (a, b) if s.kept and s.name in attended]
        for bare in (some for n in range(len(left) + 1) for some in combinations(left, n)):
            inside = [block.name for block in graph if block.kind == "A" and block.stage in bare]
            if gone := frozenset(name for name in (*pairs, *inside) if name in graph):
                yield "+".join([*label, *(f"{stage}.attentions" for stage in bare)]), Architecture(gone)


def _kept(graph: BlockGraph, stage: str) -> Iterator[_Stage]:
    """A stage without some of its ResNets, none of them such as leaves a convolution in its place."""
    resnets = [block for block in graph if block.kind == "R" and block.stage == stage]
    must = {j for j, block in enumerate(resnets) if block.stand_in == "Shortcut"}
    for n in range(len(resnets) + 1):
        for kept in combinations(range(len(resnets)), n):
            if must <= {*kept}:
                yield _Stage(stage, len(resnets), kept, None)


def slots(config: Config, arch: Architecture) -> BlockMap:
    """The map of a student that keeps the teacher's names: nothing moves, and what a stand-in keeps of its block is not gone."""
    student = surgery.skeleton(config, arch)
    parts = [f"{name}.{child}" for name in arch for child, _ in student.get_submodule(name).named_children()]
    return BlockMap({part: part for part in parts}, arch.removed)


def _plain(config: Config) -> dict[str, Any]:
    """The public entries as JSON would give them."""
    public = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}
    return {"_class_name": "UNet2DConditionModel"} | public


def _stage(teacher: UNet2DConditionModel, student: UNet2DConditionModel, arch: Architecture, name: str) -> _Stage:
    stage = teacher.get_submodule(name)
    if type(stage).__name__ not in STAGES:
        raise _NotStockError(f"{name} is a {type(stage).__name__}: only {', '.join(sorted(STAGES))} are known here")
    n_resnets = len(stage.resnets)
    kept = tuple(j for j in range(n_resnets) if f"{name}.resnets.{j}" not in arch)
    for j in set(range(n_resnets)) - {*kept}:
        if isinstance(student.get_submodule(f"{name}.resnets.{j}"), surgery.Shortcut):
            raise _NotStockError(f"{name}.resnets.{j} changes the width: no stock stage has its 1x1 convolution alone")
    attentions = tuple(j for j in range(len(getattr(stage, "attentions", ()))) if f"{name}.attentions.{j}" not in arch)
    if not attentions:
        return _Stage(name, n_resnets, kept, None)
    rule = "a stock stage has an attention behind each of its ResNets, or none at all"
    for j in range(n_resnets):
        if (j in kept) != (j in attentions):
            lacks, keeps = ("attentions", "resnets") if j in kept else ("resnets", "attentions")
            raise _NotStockError(f"{name} lacks {lacks}.{j} but keeps {keeps}.{j}: {rule}")
    return _Stage(name, n_resnets, kept, tuple(len(_layers(teacher, arch, f"{name}.attentions.{j}")) for j in kept))


def _layers(teacher: UNet2DConditionModel, arch: Architecture, attention: str) -> list[str]:
    """The transformer layers of an attention that stay."""
    n = len(teacher.get_submodule(attention).transformer_blocks)
    return [layer for t in range(n) if (layer := f"{attention}.transformer_blocks.{t}") not in arch]


def _check_skips(down: _Stage, up: _Stage) -> None:
    """Each up ResNet that stays must take the very skip which the stock stage, one ResNet longer than its down stage, gives it."""
    if len(up.kept) != len(down.kept) + 1:
        counts = f"{down.name} keeps {len(down.kept)} ResNets and {up.name} keeps {len(up.kept)}"
        raise _NotStockError(f"{counts}: a stock up stage has one more than its down stage")

    def pushed(slot: int) -> int:
        """The ResNet whose output is skip number `slot` of the student; -1 for what entered the stage."""
        return max((j for j in down.kept if j <= slot), default=-1)

    for j, wanted in zip(up.kept, [*reversed(down.kept), -1], strict=True):
        if (taken := pushed(down.n_resnets - 1 - j)) != wanted:
            source = [f"the output of {down.name}.resnets.{k}" if k >= 0 else f"what enters {down.name}" for k in (taken, wanted)]
            raise _NotStockError(f"{up.name}.resnets.{j} takes {source[0]}, where a stock up stage gives it {source[1]}")


def _mid(teacher: UNet2DConditionModel, arch: Architecture) -> tuple[str | None, list[str]]:
    """The mid stage's type, and its blocks that stay, in order."""
    mid = teacher.mid_block
    parts = [f"{part}.{j}" for part in ("resnets", "attentions") for j in range(len(getattr(mid, part, ()) or ()))]
    kept = [part for part in parts if f"mid_block.{part}" not in arch]
    if not kept:
        return None, []
    if kept == parts:
        return type(mid).__name__, kept
    if len(kept) == 1 and kept[0].startswith("resnets."):
        return "UNetMidBlock2D", kept
    missing = next(part for part in parts if part not in kept)
    raise _NotStockError(f"mid_block lacks {missing} but keeps {kept[0]}: a stock mid stage is whole, one ResNet, or absent")


def _mid_depth(teacher: UNet2DConditionModel, arch: Architecture) -> int:
    return len(_layers(teacher, arch, "mid_block.attentions.0"))


def _moved(
    teacher: UNet2DConditionModel,
    arch: Architecture,
    downs: Sequence[_Stage],
    ups: Sequence[_Stage],
    mid_kept: Sequence[str],
    gone: int,
) -> dict[str, str]:
    moved: dict[str, str] = {}
    map_ = BlockMap(moved, frozenset())

    def move(old: str, new: str) -> None:
        if map_.new_name(old) != new:
            moved[old] = new

    for path, stages in (("down_blocks", downs), ("up_blocks", ups)):
        for s, stage in enumerate(stages):
            for new, old in enumerate(stage.kept):
                move(f"{stage.name}.resnets.{old}", f"{path}.{s}.resnets.{new}")
                if stage.depths is not None:
                    for a, b in _attention_moves(teacher, arch, f"{stage.name}.attentions.{old}", f"{path}.{s}.attentions.{new}"):
                        move(a, b)
    for s in range(len(ups)):
        if teacher.up_blocks[s + gone].upsamplers:
            move(f"up_blocks.{s + gone}.upsamplers", f"up_blocks.{s}.upsamplers")
    for part in mid_kept:
        if part.startswith("resnets.") and len(mid_kept) == 1:
            move(f"mid_block.{part}", "mid_block.resnets.0")
        elif part.startswith("attentions."):
            for a, b in _attention_moves(teacher, arch, f"mid_block.{part}", f"mid_block.{part}"):
                move(a, b)
    return moved


def _attention_moves(teacher: UNet2DConditionModel, arch: Architecture, old: str, new: str) -> Iterator[tuple[str, str]]:
    """An attention's new name, and those of its layers, which count from 0 without gaps."""
    yield old, new
    if hasattr(teacher.get_submodule(old), "transformer_blocks"):
        for t, layer in enumerate(_layers(teacher, arch, old)):
            yield layer, f"{new}.transformer_blocks.{t}"


def _config(config: Config, downs: Sequence[_Stage], ups: Sequence[_Stage], gone: int) -> dict[str, Any]:
    """The configuration of the stages that stay, but for transformer depths and the mid stage."""
    out = _plain(config)
    for key in (*PER_DOWN_STAGE, *PER_UP_STAGE):
        if isinstance(out.get(key), list):
            out[key] = out[key][gone:] if key in PER_UP_STAGE else out[key][: len(downs)]
    for key, stages in (("down_block_types", downs), ("up_block_types", ups)):
        out[key] = [
            WITHOUT_ATTENTION.get(kind, kind) if s.depths is None else kind for kind, s in zip(out[key], stages, strict=True)
        ]
    n_layers = [len(s.kept) for s in downs]
    return out | {"layers_per_block": n_layers[0] if len(set(n_layers)) == 1 else n_layers}


def _depths(config: Config, downs: Sequence[_Stage], ups: Sequence[_Stage], mid: int | None) -> dict[str, Any]:
    """Transformer layers per attention: one number a stage where that says it all, else a list a stage in both directions."""
    asked = config.get("transformer_layers_per_block", 1)
    usual = [asked] * len(downs) if isinstance(asked, int) else [n if isinstance(n, int) else 1 for n in asked]
    used = [{*(down.depths or ()), *(up.depths or ())} for down, up in zip(downs, reversed(ups), strict=True)]
    if mid is not None:
        used[-1].add(mid)
    reverse = {"reverse_transformer_layers_per_block": None} if "reverse_transformer_layers_per_block" in config else {}
    if all(len(depths) < 2 for depths in used):
        one = [depths.pop() if depths else usual[i] for i, depths in enumerate(used)]
        return {"transformer_layers_per_block": asked if one == [asked] * len(one) else one} | reverse
    nested: list[Depth] = [list(s.depths) if s.depths is not None else usual[i] for i, s in enumerate(downs)]
    if mid is not None and downs[-1].depths is None:
        nested[-1] = mid
    elif mid is not None and downs[-1].depths and downs[-1].depths[0] != mid:
        counts = (
            f"mid_block.attentions.0 keeps {mid} transformer layers and {downs[-1].name}'s first attention {downs[-1].depths[0]}"
        )
        raise _NotStockError(f"{counts}: a stock configuration gives both the same")
    back: list[Depth] = [list(s.depths) if s.depths is not None else usual[-1 - i] for i, s in enumerate(ups)]
    return {"transformer_layers_per_block": nested, "reverse_transformer_layers_per_block": back}


def _compare(student: UNet2DConditionModel, stock: UNet2DConditionModel, blocks: BlockMap) -> None:
    """Raises unless the stock U-Net has the student's tensors, by name and shape, in modules of the same kind and settings."""
    have = {str(blocks.new_name(k)): tuple(t.shape) for k, t in student.state_dict().items()}
    want = {k: tuple(t.shape) for k, t in stock.state_dict().items()}
    for key in sorted({*have, *want}):
        if have.get(key) != want.get(key):
            raise _NotStockError(f"{key} would have the shape {want.get(key)} in a stock U-Net, not the student's {have.get(key)}")
    if name := other_settings(student, stock, blocks.new_name):
        raise _NotStockError(f"{name} would have other settings in a stock U-Net (heads, norms or the like)")
