"""Presets, and the syntax in which an architecture is written on a command line."""

from __future__ import annotations

import pytest

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.presets import PRESETS, expand, fitting, parse, preset


def arch(*names: str) -> Architecture:
    return Architecture(frozenset(names))


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
