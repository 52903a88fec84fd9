"""What a run will do, counted before it begins: passes of the denoising network, images, bytes. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from blockprune.model.architecture import Architecture
from blockprune.model.graph import Block, BlockGraph

CONVENTION = "with_attention"  # the multiply-adds that time goes by
BACKWARD = 3  # a pass that learns, in forward passes: forward, and twice as much backward
WHOLE = "RADUF"  # the kinds of blocks that lie in no other
# numbers that are kept for each number of a block's shape; checked against what a pass of tiny-digits and of SD v1 allocates
OF_RESNET, OF_LAYER, OF_LARGEST = 3, 18, 8


@dataclass(frozen=True)
class Passes:
    """`n` forward passes of the network over `rows` rows each, for one step of a run.

    `share` of the network's multiply-adds are done, without what is removed or replayed; a pass that `learns` goes back as well.
    """

    step: str
    n: int
    rows: int
    share: float = 1.0
    learns: bool = False

    @property
    def in_rows(self) -> float:
        """What the passes cost, in forward passes of one row of the whole network."""
        return self.n * self.rows * self.share * (BACKWARD if self.learns else 1)


@dataclass(frozen=True)
class Work:
    """A run that has not begun: its passes in order, the images that the VAE decodes and encodes, memory and disk.

    `at_most` is True where the run may get along with less.
    """

    passes: Sequence[Passes]
    decoded: int = 0
    encoded: int = 0
    mem_bytes: int = 0
    disk_bytes: int = 0
    at_most: bool = False

    @property
    def n_passes(self) -> int:
        return sum(p.n for p in self.passes)

    def macs(self, graph: BlockGraph) -> float:
        """The multiply-adds of the network, in `CONVENTION`."""
        return sum(p.in_rows for p in self.passes) * graph.total.macs(CONVENTION)


def batches(step: str, n: int, size: int, times: int = 1, rows: int = 1, share: float = 1.0) -> Iterator[Passes]:
    """`n` samples of `rows` rows each, `size` samples at a time, each batch `times` times over."""
    whole, rest = divmod(n, size)
    if whole and times:
        yield Passes(step, whole * times, size * rows, share)
    if rest and times:
        yield Passes(step, times, rest * rows, share)


def share(graph: BlockGraph, arch: Architecture, replayed: bool = False) -> float:
    """The share of the network's multiply-adds that is done without the blocks of `arch`; `replayed` leaves out what comes before
    the first of them."""
    done = graph.cost(arch).macs(CONVENTION)
    if replayed and arch:
        done -= sum(block.cost.macs(CONVENTION) for block in _before(graph, arch))
    return max(done, 0) / graph.total.macs(CONVENTION)


def _before(graph: BlockGraph, arch: Architecture) -> Iterator[Block]:
    firsts = {name.partition(".transformer_blocks.")[0] for name in arch}
    for block in graph:
        if block.kind in WHOLE:
            if any(block.name == first or block.name.startswith(first + ".") for first in firsts):
                return
            yield block


def activation_bytes(graph: BlockGraph, rows: int, itemsize: int, learns: bool = False, checkpointing: bool = False) -> int:
    """About what a pass has allocated at its peak beside weights, and gradients of these."""
    by_name = {block.name: block for block in graph}
    skips = sum(prod(by_name[source].shape_out) for source, _ in graph.skip_edges)
    least = skips + OF_LARGEST * max(prod(block.shape_in) for block in graph)
    resnets = sum(prod(block.shape_in) + prod(block.shape_out) for block in graph if block.kind == "R")
    layers = sum(prod(block.shape_out) for block in graph if block.kind == "T")
    numbers = least if not learns else resnets + layers + least if checkpointing else OF_RESNET * resnets + OF_LAYER * layers
    return rows * numbers * itemsize


def recorded_bytes(graph: BlockGraph, rows: int, itemsize: int) -> int:
    """What is kept of the teacher's passes over so many rows, to be replayed."""
    return rows * itemsize * sum(prod(block.shape_out) for block in graph if block.kind in "RADU")
