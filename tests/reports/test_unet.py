"""The drawing of the U-Net: a file that stands alone, and the same drawing in a page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex

from blockprune.measures.score import TEACHER
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports.canvas import colour_of, loss_scale
from blockprune.reports.layout import layout, scored_units
from blockprune.reports.table import brief, number
from blockprune.reports.unet import UNIT_NAMES, Sensitivity, page_defs, page_legend, page_svg, scan_svg, unet_svg
from blockprune.reports.view import ScanView

MID = Architecture(frozenset({"mid_block"}))


def blocks(svg: str) -> dict[str, ElementTree.Element]:
    """The drawn blocks by the first line of their tooltips."""
    plain = svg.replace(' xmlns="http://www.w3.org/2000/svg"', "")
    return {block.findtext("title", "").split("\n")[0]: block for block in ElementTree.fromstring(plain).iterfind(".//g/[title]")}


def test_a_file_needs_nothing_else(make: Callable[..., ScanView], tmp_path: Path) -> None:
    svg = scan_svg(make(), MID)
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (
        root[0].tag.endswith("title") and root[0].text == "tiny|model: denoising error against the teacher when a block is removed"
    )
    ground = next(e for e in root if e.tag.endswith("rect"))
    assert [ground.get(k) for k in ("fill", "width", "height")] == ["#ffffff", root.get("width"), root.get("height")]
    assert "var(" not in svg
    assert "font-family" in svg
    assert set(re.findall(r"url\(#([\w-]+)\)", svg)) <= {e.get("id") for e in root.iter()}
    assert re.findall(r"https?://\S+", svg) == ['http://www.w3.org/2000/svg"']
    svg.savefig(tmp_path / "unet.svg")
    assert (tmp_path / "unet.svg").read_text(encoding="utf-8") == svg == svg._repr_svg_() == scan_svg(make(), MID)


def test_removed_blocks_are_hatched(graph: BlockGraph) -> None:
    plain, hatched = unet_svg(graph, "U-Net"), unet_svg(graph, "U-Net", MID)
    assert "url(#hatch" not in plain
    assert {name for name, block in blocks(hatched).items() if block.find("rect[@class='hatch']") is not None} == {
        name for name in layout(graph) if name in MID
    }
    assert ">removed<" in hatched and ">removed<" not in plain


def test_fitted_blocks_are_dotted(graph: BlockGraph) -> None:
    arch = Architecture(frozenset({"mid_block~linear", "down_blocks.0.resnets.1", "up_blocks.2.attentions.1~channel"}))
    drawn = blocks(unet_svg(graph, "U-Net", arch))
    fills = {
        name: hatch.get("fill", "") for name, block in drawn.items() if (hatch := block.find("rect[@class='hatch']")) is not None
    }
    assert {name for name, fill in fills.items() if "#fit-" in fill} == {"mid_block", "up_blocks.2.attentions.1"}
    assert {name for name, fill in fills.items() if "#hatch-" in fill} == {"down_blocks.0.resnets.1"} | {
        name for name in layout(graph) if name.startswith("mid_block.")
    }
    svg = unet_svg(graph, "U-Net", arch)
    assert ">fitted map<" in svg and ">removed<" in svg and "Dotted:" in svg
    assert "a linear map stands in in this student" in svg and ">fitted map<" not in unet_svg(graph, "U-Net", MID)


def test_a_block_has_its_colour_its_value_and_what_is_known_of_it(make: Callable[..., ScanView]) -> None:
    view, label = make(), "up_blocks.1.resnets.0"
    scored = Sensitivity.of_scan(view)
    assert scored is not None
    units = scored_units(view.graph, scored.losses)
    colour = to_hex(colour_of(loss_scale([u.value for u in units.values()], "eps_mse"), units[label].value))
    block = blocks(scan_svg(view))[label]
    cell, value = block.find("rect[@class='cell']"), view.value(label, "eps_mse")
    assert cell is not None and value is not None
    assert cell.get("fill") == colour
    assert brief(value) in [text.text for text in block.iter("text")]
    tooltip, params = block.findtext("title", ""), view.graph[label].cost.params
    assert f"({params / view.graph.total.params:.1%} of the U-Net)" in tooltip
    assert f"without it:\ndenoising error against the teacher: {number(value)} [" in tooltip
    assert "\nFID: " in tooltip
    assert f"step latency: {view.value(label, 'latency_ratio'):.3g} of the teacher's" in tooltip
    assert "without it" not in blocks(scan_svg(view))["conv_in"].findtext("title", "")


@pytest.mark.parametrize("unit", ["stage", "pair", "layer"])
def test_coarse_and_fine_units_are_drawn(make: Callable[..., ScanView], unit: str) -> None:
    view = make(unit)
    losses = {view.archs[n]: float(i) for i, n in enumerate(view.removals)}
    units = scored_units(view.graph, losses)
    scored = {b.name for b in view.graph if b.removable and (b.kind == "T" if unit == "layer" else b.kind in "RAM")}
    assert scored <= set(units)
    for name in scored:
        assert any(name in arch and units[name].value == losses[arch] for arch in losses)
    assert f"when a {UNIT_NAMES[unit]} is removed" in scan_svg(view)
    drawn = blocks(unet_svg(view.graph, "U-Net", None, Sensitivity(losses, "eps_mse")))
    assert {name for name, block in drawn.items() if block.find("rect").get("fill")} == (scored & {*drawn}) | (
        {"innermost stages, down and up"} & {*drawn}
    )


def test_the_bar_has_the_colours_of_the_scale_and_the_teachers_value(make: Callable[..., ScanView]) -> None:
    bars = ElementTree.fromstring(page_defs()).iterfind(".//linearGradient")
    for measure, bar in zip(("fid", "clip_score"), bars, strict=True):
        scale = loss_scale([1.0, 3.0], measure)
        for stop in bar:
            at = float(stop.get("offset") or 0)
            shown = [int((stop.get("stop-color") or "")[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert shown == pytest.approx(colour_of(scale, 1 + 2 * at)[:3], abs=0.02)  # a scale has 256 steps
    view = make(measures=("clip_score",))
    legend = page_legend(view.graph, Sensitivity.of_scan(view))
    assert f"CLIP score (higher is better); teacher: {number(view.value(TEACHER, 'clip_score'))}" in legend
    assert "url(#loss-up)" in legend
    assert "loss-" not in page_legend(view.graph, None)


def test_a_page_defines_what_its_drawings_refer_to_and_a_student_repeats_no_numbers(make: Callable[..., ScanView]) -> None:
    view = make()
    scored = Sensitivity.of_scan(view)
    teacher, student = (page_svg(view.graph, arch, scored, "thop", "mine") for arch in (Architecture(), MID))
    assert 'class="value"' in teacher and 'class="value"' not in student
    used = set(re.findall(r"url\(#([\w-]+)\)", teacher + student + page_legend(view.graph, scored)))
    assert used and used <= set(re.findall(r'id="([\w-]+)"', page_defs()))


def test_any_name_is_text(graph: BlockGraph) -> None:
    svg = unet_svg(graph, "</title><script>alert(1)</script> & \x01\ud800")
    root = ElementTree.fromstring(svg.encode())
    assert root[0].text == "</title><script>alert(1)</script> & ??"
    assert not any(e.tag.endswith("script") for e in root.iter())


def test_a_long_heading_has_several_lines(graph: BlockGraph) -> None:
    root = ElementTree.fromstring(unet_svg(graph, "a long heading " * 12))
    lines = [e for e in root.iter() if e.get("class") == "heading"]
    assert len(lines) == 3
    assert len({e.get("y") for e in lines}) == 3
    assert max(len(e.text or "") for e in lines) * 9 < float(root.get("width") or 0)
