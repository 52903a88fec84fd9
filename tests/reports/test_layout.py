"""Where blocks are drawn, and which unit's score colours each."""

from __future__ import annotations

import pytest

from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports.layout import layout, scored_units, tiles


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


def test_components_are_strips_of_their_attention(graph: BlockGraph) -> None:
    """Each with the colour of its own score, or hatched alone; an attention that goes as a whole stays one cell."""
    cells = layout(graph)
    name = "down_blocks.1.attentions.0"
    parts = [f"{name}.transformer_blocks.0.{part}" for part in ("attn1", "attn2", "ff")]
    scanned = {unit: float(i) for i, unit in enumerate(graph.units("component").values())}
    units = scored_units(graph, scanned)
    drawn = {tile.name: tile for tile in tiles(graph, cells, units, Architecture(frozenset({parts[1]})))}
    assert name not in drawn
    assert [drawn[part].gone for part in parts] == [False, True, False]
    assert all(unit is not None and part in unit.arch for part in parts for unit in [drawn[part].unit])
    assert drawn[parts[0]].x < drawn[parts[1]].x < drawn[parts[2]].x
    whole = {tile.name: tile for tile in tiles(graph, cells, {}, Architecture(frozenset({name})))}
    assert whole[name].gone
    assert not whole.keys() & {*parts}


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
