"""Architectures as values: normalisation, algebra, wire format, the command-line syntax."""

from __future__ import annotations

import json
import random

import pytest
import tiny

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.graph import UNITS, BlockGraph
from blockprune.model.presets import PRESETS, expand, fitting, parse, preset
from blockprune.model.trace import trace


@pytest.fixture(scope="module")
def graph() -> BlockGraph:
    return trace(tiny.config("sd1"))


@pytest.fixture(scope="module")
def graph_xl() -> BlockGraph:
    return trace(tiny.config("sdxl"))


def arch(*names: str) -> Architecture:
    return Architecture(frozenset(names))


def test_no_name_lies_inside_another() -> None:
    assert arch("mid_block", "mid_block.attentions.0", "mid_blocks") == arch("mid_block", "mid_blocks")
    assert "mid_block.attentions.0" in arch("mid_block")
    assert "mid_block" not in arch("mid_block.attentions.0")


def test_algebra() -> None:
    a, b = arch("up_blocks.1.resnets.1"), arch("mid_block")
    assert (a | b) - b == a
    assert a <= a | b and not a | b <= a
    assert arch("mid_block.attentions.0") <= b
    assert (a | arch("mid_block.resnets.0")) - b == a
    with pytest.raises(UserError, match="put that back first"):
        b - arch("mid_block.attentions.0")


def test_wire_format() -> None:
    text = '{"format": 1, "removed": ["mid_block", "up_blocks.1.resnets.1"]}'
    value = Architecture.from_json(json.loads(text))
    assert json.dumps(value.to_json()) == text
    assert value.key == "c56fb62dc877"
    assert Architecture.from_json({"architecture": value.to_json(), "score": 1}) == value


@pytest.mark.parametrize("bad", [[], {"removed": "mid_block"}, {"removed": [], "format": 2}, {"removed": ["a b"], "format": 1}, 7])
def test_other_json_is_refused(bad: object) -> None:
    with pytest.raises(UserError):
        Architecture.from_json(bad)


def test_what_stands_in_is_part_of_the_value() -> None:
    fitted = arch("mid_block~linear", "down_blocks.0.resnets.1")
    assert fitted.removed == {"mid_block", "down_blocks.0.resnets.1"} and fitted.fits == {("mid_block", "linear")}
    assert fitted.to_json() == {"format": 1, "removed": ["down_blocks.0.resnets.1", "mid_block~linear"]}
    assert Architecture.from_json(json.loads(fitted.dumps())) == fitted == Architecture(frozenset(fitted.terms))
    assert list(fitted) == ["down_blocks.0.resnets.1", "mid_block"] and "mid_block.resnets.0" in fitted
    assert fitted.plain == arch("mid_block", "down_blocks.0.resnets.1") != fitted
    assert len({fitted.key, fitted.plain.key, arch("mid_block~channel", "down_blocks.0.resnets.1").key}) == 3
    assert fitted.plain <= fitted and fitted <= fitted.plain
    assert fitted.plain | arch("mid_block~channel") == arch("mid_block~channel", "down_blocks.0.resnets.1")
    assert fitted | arch("mid_block") == fitted.plain
    assert fitted - arch("mid_block") == arch("down_blocks.0.resnets.1")
    assert arch("mid_block", "mid_block.resnets.0~linear") == arch("mid_block")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["mid_block~cubic"], "'mid_block~cubic': what is fitted in place of a block is one of channel, linear; got 'cubic'"),
        (["mid_block~"], "one of channel, linear; got ''"),
        (["~linear"], "a module path such as 'mid_block'"),
        (["mid_block~linear", "mid_block~channel"], "choose one of mid_block~channel, mid_block~linear"),
        (["mid_block~linear", "mid_block"], "choose one of mid_block, mid_block~linear"),
    ],
)
def test_what_cannot_stand_in(names: list[str], says: str) -> None:
    with pytest.raises(UserError) as err:
        arch(*names)
    assert says in str(err.value)


def test_fits_on_a_command_line(graph: BlockGraph) -> None:
    assert parse("mid_block~linear", graph) == arch("mid_block~linear")
    assert parse("bk-sdm-base,mid_block~channel", graph) == preset("bk-sdm-base") | arch("mid_block~channel")
    assert parse("mid_block~linear,mid_block~none", graph) == arch("mid_block")
    everything = parse("bk-sdm-small~linear", graph)
    assert everything.removed == preset("bk-sdm-small").removed and {name for name, _ in everything.fits} == everything.removed
    # without the innermost stage the mid stage runs at another resolution, and only what comes out of the up stage can be fitted
    tiny = parse("bk-sdm-tiny~linear", graph)
    assert {name for name, _ in tiny.fits} == {n for n in tiny if not n.startswith(("down_blocks.3", "down_blocks.2.d", "mid"))}
    for text, says in {
        "down_blocks.3~linear,up_blocks.0,down_blocks.2.downsamplers.0": "the innermost stage goes as one",
        "bk-sdm-tiny,mid_block~linear": "without the innermost stage it runs at another resolution",
        "mid_block~square": "unknown fit 'square'",
    }.items():
        with pytest.raises(UserError, match=says):
            parse(text, graph)


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


def test_presets_fit_their_families(graph: BlockGraph, graph_xl: BlockGraph) -> None:
    assert set(fitting(graph)) == {"mid-removed", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"}
    assert set(fitting(graph_xl)) == {"mid-removed", "ssd-1b", "vega", "koala-1b", "koala-700m"}
    assert len(PRESETS) == 9


def test_short_syntax(graph: BlockGraph) -> None:
    base = preset("bk-sdm-base")
    assert parse("bk-sdm-base,-mid_block", graph) == preset("bk-sdm-small") == parse("mid_block,bk-sdm-base", graph)
    assert parse("bk-sdm-small,+mid_block", graph) == base
    assert parse("full", graph) == Architecture()
    assert parse("up_blocks.{1,2}.resnets.1", graph) == arch("up_blocks.1.resnets.1", "up_blocks.2.resnets.1")
    assert parse("down_blocks.0.*", graph) == graph.units("stage")["down_blocks.0"]


def test_json_file(graph: BlockGraph, tmp_path) -> None:
    file = tmp_path / "a.json"
    file.write_text(preset("bk-sdm-tiny").dumps())
    assert parse(str(file), graph) == preset("bk-sdm-tiny")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mid_blok", "did you mean mid_block"),
        ("ssd-1b", "for another U-Net"),
        ("-conv_in", "no path around"),
        ("down_blocks.0.downsamplers.0", "changes the resolution"),
        ("down_blocks.3", "remove down_blocks.2.downsamplers.0, up_blocks.0 with it"),
        ("bk-sdm-base,", "empty term"),
        ("", "empty term"),
        ("mid_block,+mid_block", "removes nothing"),
        ("down_blocks.7.*", "no removable block matches"),
        ("nowhere.json", "no architecture file"),
    ],
)
def test_bad_architectures_say_what_to_do(graph: BlockGraph, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(text, graph)


def test_expand() -> None:
    assert list(expand("a{b,c}d{e,f}")) == ["abde", "abdf", "acde", "acdf"]


def test_pricing_many_is_arithmetic(graph: BlockGraph) -> None:
    """Additivity, for combinations that share no block; and that pricing looks nothing up but the graph."""
    draw = random.Random(0)
    names = [b.name for b in graph if b.removable and not b.requires and b.kind != "T"]
    for _ in range(200):
        one = Architecture(frozenset(draw.sample(names, 8)))
        saved = [graph.cost(Architecture()).params - graph.cost(arch(n)).params for n in one]
        assert graph.total.params - graph.cost(one).params == sum(saved)
