"""Where blocks are drawn, and which unit's score colours each."""

from __future__ import annotations

import pytest

from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports.layout import layout, scored_units


def test_a_block_takes_the_colour_of_its_smallest_scored_unit(graph: BlockGraph) -> None:
    mid, part = Architecture(frozenset({"mid_block"})), Architecture(frozenset({"mid_block.resnets.0"}))
    both = Architecture(frozenset({"mid_block", "down_blocks.0.resnets.1"}))
    units = scored_units(graph, {mid: 1.0, part: 2.0, both: 3.0})
    assert {n: u.value for n, u in units.items() if "transformer_blocks" not in n} == {
        "mid_block": 1.0,
        "mid_block.resnets.0": 2.0,
        "mid_block.resnets.1": 1.0,
        "mid_block.attentions.0": 1.0,
    }


def test_cells_do_not_overlap_and_skips_are_level(graph: BlockGraph) -> None:
    cells = layout(graph, innermost=True)
    assert {b.name for b in graph if b.kind in "RADUM"} <= set(cells)
    boxes = list(cells.values())
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = a.x + a.w <= b.x or b.x + b.w <= a.x or a.y + a.h <= b.y or b.y + b.h <= a.y
            assert apart, (a.name, b.name)
    for source, target in graph.skip_edges:
        a, b = cells[source], cells[target]
        assert a.y + a.h / 2 == pytest.approx(b.y + b.h / 2), (source, target)
        assert a.x + a.w < b.x
