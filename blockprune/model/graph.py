"""Values: the blocks of a U-Net with their costs, and their graph. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blockprune.decode import Natural, Whole, checked
from blockprune.errors import UserError
from blockprune.model.architecture import FITS, Architecture

CONVENTIONS = ("thop", "conv_linear", "with_attention")
UNITS = ("stage", "pair", "block", "layer", "component")
KINDS = {
    "R": "ResNet block",
    "A": "attention",
    "T": "transformer layer",
    "C": "component of a transformer layer",
    "M": "mid stage",
    "S": "innermost stage",
    "D": "downsampler",
    "U": "upsampler",
    "F": "fixed",
}


@dataclass(frozen=True)
class Cost:
    """Parameters, state-dict keys, and multiply-adds (one multiply-add = 1 MAC, batch 1) in three conventions.

    `thop`: convolutions, linear layers and 4 per LayerNorm element; `conv_linear`: convolutions and linear layers alone;
    `with_attention`: those plus the two attention matrix products.
    """

    params: int = 0
    keys: int = 0
    thop: int = 0
    conv_linear: int = 0
    with_attention: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def astuple(self) -> tuple[int, int, int, int, int]:
        return self.params, self.keys, self.thop, self.conv_linear, self.with_attention

    def macs(self, convention: str) -> int:
        if convention not in CONVENTIONS:
            raise UserError(f"unknown MAC convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
        return int(getattr(self, convention))

    def to_json(self) -> dict[str, Any]:
        return {"params": self.params, "keys": self.keys, "macs": {c: self.macs(c) for c in CONVENTIONS}}


class MacsRecord(msgspec.Struct):
    thop: Whole
    conv_linear: Whole
    with_attention: Whole


class CostRecord(msgspec.Struct):
    """A Cost in JSON."""

    params: Whole
    keys: Whole
    macs: MacsRecord

    def value(self) -> Cost:
        return Cost(self.params, self.keys, self.macs.thop, self.macs.conv_linear, self.macs.with_attention)


@dataclass(frozen=True)
class Block:
    """One node of the U-Net.

    Shapes are (channels, height, width) of the hidden state at batch 1. `saves` is what leaves with the block: its cost
    less what its stand-in keeps; None when the block cannot be removed, `why_fixed` then says why. `skips` names the blocks whose
    outputs it takes over a skip connection; `requires` the blocks that must be removed together with it.
    """

    name: str
    kind: str
    stage: str
    shape_in: tuple[int, int, int]
    shape_out: tuple[int, int, int]
    cost: Cost
    saves: Cost | None
    stand_in: str = ""
    why_fixed: str = ""
    skips: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    @property
    def removable(self) -> bool:
        return self.saves is not None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cost": self.cost.to_json(), "saves": self.saves.to_json() if self.saves else None}


Side = Annotated[int, Meta(ge=1, le=2**20)]
Shape = tuple[Side, Side, Side]


class BlockRecord(msgspec.Struct):
    """A Block in JSON."""

    name: str
    kind: Literal["R", "A", "T", "C", "M", "S", "D", "U", "F"]
    stage: str
    shape_in: Shape
    shape_out: Shape
    cost: CostRecord
    saves: CostRecord | None
    stand_in: str = ""
    why_fixed: str = ""
    skips: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def value(self) -> Block:
        plain = {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("cost", "saves")}
        return Block(**plain, cost=self.cost.value(), saves=self.saves.value() if self.saves else None)


@dataclass(frozen=True)
class BlockGraph:
    """The blocks of one U-Net in forward order, with its total cost and its skip connections.

    `rescaled` holds what each block of the mid stage saves once the innermost stage is gone and the mid stage runs at the
    resolution outside it; `rescaling` is what that move adds to the cost of the full mid stage.

    >>> import blockprune as bp
    >>> graph = bp.graph("tiny-digits")
    >>> (graph.total - graph.cost(bp.Architecture({"mid_block"}))).params
    256192
    """

    blocks: tuple[Block, ...]
    total: Cost
    latent: tuple[int, int, int]
    n_tokens: int
    innermost: frozenset[str] = frozenset()
    rescaled: Mapping[str, Cost] = field(default_factory=dict)
    rescaling: Cost = Cost()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {b.name: b for b in self.blocks})

    def __getitem__(self, name: str) -> Block:
        """The block of that name; UserError with the nearest names when there is none."""
        by_name: dict[str, Block] = self.__dict__["_by_name"]
        if name in by_name:
            return by_name[name]
        near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
        raise UserError(
            f"no block {name!r} in this U-Net: {'did you mean ' + ', '.join(near) if near else 'see `blockprune graph`'}"
        )

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__["_by_name"]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @property
    def skip_edges(self) -> tuple[tuple[str, str], ...]:
        """(producer, consumer) pairs by name."""
        return tuple((source, b.name) for b in self.blocks for source in b.skips)

    def to_json(self) -> dict[str, Any]:
        return {
            "blocks": [b.to_json() for b in self.blocks],
            "total": self.total.to_json(),
            "latent": list(self.latent),
            "n_tokens": self.n_tokens,
            "innermost": sorted(self.innermost),
            "rescaled": {name: cost.to_json() for name, cost in self.rescaled.items()},
            "rescaling": self.rescaling.to_json(),
        }

    @classmethod
    def from_json(cls, data: object) -> BlockGraph:
        """The graph of `to_json`; UserError on any other shape."""
        return checked(data, GraphRecord, "the graph of a U-Net", "make it again").value()

    def check(self, arch: Architecture) -> Architecture:
        """`arch` itself; UserError names a block that is unknown, cannot be removed, or lacks what it requires."""
        for name in arch:
            block = self[name]
            if not block.removable:
                raise UserError(f"cannot remove {name!r}: {block.why_fixed}")
            missing = [r for r in block.requires if r not in arch]
            if missing:
                raise UserError(f"removing {name!r} alone breaks the U-Net: remove {', '.join(missing)} with it")
        for name, _ in arch.fits:
            if why := self.why_unfit(name, arch):
                raise UserError(f"nothing can be fitted in place of {name!r}: {why}; remove it without")
        return arch

    def why_unfit(self, name: str, arch: Architecture) -> str:
        """Why nothing can be fitted in place of a removed block of `arch`: there the student has another size; "" if it can."""
        block = self[name]
        gone = bool(self.innermost) and self.innermost <= arch.removed
        if block.requires and not name.startswith("up"):
            return "the innermost stage goes as one; fit what comes out of its up stage"
        if gone and block.stage == "mid_block":
            return "without the innermost stage it runs at another resolution; fit the innermost up stage"
        return ""

    def fitted(self, arch: Architecture, kind: str) -> Architecture:
        """`arch` with a fit of that kind ("none" for nothing) in place of each removed block for which there can be one."""
        if kind == "none":
            return arch.plain
        if kind not in FITS:
            raise UserError(f"unknown fit {kind!r}: choose one of none, {', '.join(FITS)}")
        return Architecture(arch.removed, frozenset((name, kind) for name in arch if not self.why_unfit(name, arch)))

    def fit_cost(self, name: str, kind: str) -> Cost:
        """What a fit costs beyond the plain stand-in: 2 C parameters per channel; C_in C_out + C_out for a linear map.

        A linear map takes the place of a shortcut that the plain stand-in keeps.
        """
        block = self[name]
        c_out, height, width = block.shape_out
        if kind == "channel":
            return Cost(params=2 * c_out, keys=2)
        weights = c_out * (c_out if block.stand_in == "DropSkip" else block.shape_in[0])
        macs = weights * height * width
        return Cost(weights + c_out, 2, macs, macs, macs) - (block.cost - (block.saves or block.cost))

    def cost(self, arch: Architecture) -> Cost:
        """The exact cost of the U-Net by `arch`, by arithmetic: the total less what removed blocks save, plus what is fitted."""
        fitted = self.total + sum_costs(self.fit_cost(*fit) for fit in arch.fits)
        if not self.innermost or not self.innermost <= arch.removed:
            return fitted - sum_costs(self[n].saves or Cost() for n in arch.removed)
        saved = (self.rescaled.get(n) or self[n].saves or Cost() for n in arch.removed)
        return fitted + self.rescaling - sum_costs(saved)

    def units(self, unit: str) -> dict[str, Architecture]:
        """Every removal at one granularity, label => Architecture, in forward order."""
        if unit not in UNITS:
            raise UserError(f"unknown unit {unit!r}: choose one of {', '.join(UNITS)}")
        groups: dict[str, list[str]] = {}
        for block in self.blocks:
            if block.removable and (label := _label(block, unit)):
                groups.setdefault(label, []).append(block.name)
        return {label: Architecture(frozenset(names)) for label, names in groups.items()}


class GraphRecord(msgspec.Struct):
    """A BlockGraph in JSON; whatever it names is one of its blocks."""

    blocks: list[BlockRecord]
    total: CostRecord
    latent: Shape
    n_tokens: Natural
    innermost: list[str]
    rescaled: dict[str, CostRecord]
    rescaling: CostRecord

    def __post_init__(self) -> None:
        names = [b.name for b in self.blocks]
        named = [*self.innermost, *self.rescaled, *(n for b in self.blocks for n in (*b.skips, *b.requires))]
        if len({*names}) < len(names):
            raise ValueError("Expected blocks of different names")
        if strange := [n for n in named if n not in {*names}]:
            raise ValueError(f"Expected {strange[0][:60]!r} among the blocks, as something names it")

    def value(self) -> BlockGraph:
        return BlockGraph(
            blocks=tuple(b.value() for b in self.blocks),
            total=self.total.value(),
            latent=self.latent,
            n_tokens=self.n_tokens,
            innermost=frozenset(self.innermost),
            rescaled={name: cost.value() for name, cost in self.rescaled.items()},
            rescaling=self.rescaling.value(),
        )


def _label(block: Block, unit: str) -> str:
    """The unit of removal to which a block belongs, or "" for none."""
    inside_mid = block.stage == "mid_block" and block.kind != "M"
    inner = {"T": "layer", "C": "component"}
    if block.kind in inner or unit in inner.values():
        return block.name if inner.get(block.kind) == unit else ""
    if block.requires:
        return "innermost" if unit == "stage" else ""
    if block.kind == "M" or unit == "block":
        return block.name
    if inside_mid:
        return ""
    return block.stage if unit == "stage" else f"{block.stage}.pair.{block.name.rsplit('.', 1)[1]}"


def sum_costs(costs: Iterable[Cost]) -> Cost:
    rows = [c.astuple() for c in costs]
    return Cost(*map(sum, zip(*rows, strict=True))) if rows else Cost()
