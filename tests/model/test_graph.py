"""The graph of a U-Net's blocks: units of removal, skip connections, costs by arithmetic."""

from __future__ import annotations

import json
import random

from blockprune.model.architecture import Architecture
from blockprune.model.graph import UNITS, BlockGraph
from blockprune.model.presets import parse


def arch(*names: str) -> Architecture:
    return Architecture(frozenset(names))


def test_graph_round_trip(graph: BlockGraph, graph_xl: BlockGraph) -> None:
    for g in (graph, graph_xl):
        assert BlockGraph.from_json(json.loads(json.dumps(g.to_json()))) == g


def test_units_of_sd1(graph: BlockGraph) -> None:
    counts = {unit: len(graph.units(unit)) for unit in UNITS}
    assert counts == {"stage": 10, "pair": 21, "block": 39, "layer": 16, "component": 48}
    kinds = [b.kind for b in graph]
    assert (kinds.count("R"), kinds.count("A"), kinds.count("M")) == (22, 16, 1)
    shortcuts = [b.name for b in graph if b.stand_in == "Shortcut"]
    assert shortcuts == ["down_blocks.1.resnets.0", "down_blocks.2.resnets.0", "up_blocks.2.resnets.0", "up_blocks.3.resnets.0"]


def test_components_of_sd1(graph: BlockGraph) -> None:
    units = graph.units("component")
    layers = graph.units("layer")
    assert list(units) == [f"{layer}.{part}" for layer in layers for part in ("attn1", "attn2", "ff")]
    for layer in layers:
        inside = arch(*(f"{layer}.{part}" for part in ("attn1", "attn2", "ff")))
        norms = graph.cost(inside) - graph.cost(arch(layer))  # the layer's norms are what is left of it
        width = graph[layer].shape_in[0]
        assert norms.params == 3 * 2 * width and norms.conv_linear == norms.with_attention == 0
    assert parse("*.attn2", graph) == arch(*(f"{layer}.attn2" for layer in layers))
    assert all(".transformer_blocks." not in name for name in parse("down_blocks.*", graph))


def test_skip_edges_of_sd1(graph: BlockGraph) -> None:
    """As diffusers pops them: last pushed, first taken."""
    down = ["conv_in"]
    for stage in range(4):
        outs = ["attentions.0", "attentions.1", "downsamplers.0"] if stage < 3 else ["resnets.0", "resnets.1"]
        down += [f"down_blocks.{stage}.{out}" for out in outs]
    up = [f"up_blocks.{stage}.resnets.{i}" for stage in range(4) for i in range(3)]
    assert list(graph.skip_edges) == list(zip(reversed(down), up, strict=True))


def test_pricing_many_is_arithmetic(graph: BlockGraph) -> None:
    """Additivity, for combinations that share no block; and that pricing looks nothing up but the graph."""
    draw = random.Random(0)
    names = [b.name for b in graph if b.removable and not b.requires and b.kind != "T"]
    for _ in range(200):
        one = Architecture(frozenset(draw.sample(names, 8)))
        saved = [graph.cost(Architecture()).params - graph.cost(arch(n)).params for n in one]
        assert graph.total.params - graph.cost(one).params == sum(saved)
