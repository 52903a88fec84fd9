"""Charts as values: where things lie, what is written, and the file that they make."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from blockprune.reports.plot import LETTER, LINE, SERIES, Axis, Bar, Line, Mark, Plot, Rule, Sheet, series

AXES = Axis.over("across", [0.0, 100.0]), Axis.over("", [0.0, 1.0])


def texts(plot: Plot) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(plot.page_svg()).iter("text")]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[0.7, 0.8], [3.8e-7, 1.66], [12.0, 900.0], [5.0], [0.001, 0.0012]])
def test_an_axis_has_room_for_its_values_and_a_few_ticks_in_order(values: list[float], log: bool) -> None:
    axis = Axis.over("", values, log)
    assert all(0 < axis.at(v) < 1 for v in values)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(ticks) and len({text for _, text in ticks}) == len(ticks)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place, _ in ticks)


def test_labels_cover_no_other_where_there_is_room() -> None:
    marks = [Mark(50 + i, 0.5 + 0.01 * i, "found", f"model {i}", label=f"model {i}") for i in range(6)]
    places = Plot("", *AXES, marks).labels()
    boxes = []
    for i, (x, y, anchor) in places.items():
        wide = LETTER * len(marks[i].label)
        boxes.append((x if anchor == "start" else x - wide, y, wide))
    assert len(boxes) == 6
    assert not any(abs(a[1] - b[1]) < LINE and a[0] < b[0] + b[2] and b[0] < a[0] + a[2] for a, b in combinations(boxes, 2))


def test_names_at_the_ends_of_curves_stand_apart_and_their_looks_differ() -> None:
    lines = [Line([(0, 0.5), (100, 0.5)], series(i), f"run {i}") for i in range(9)]
    drawn = ElementTree.fromstring(Plot("", *AXES, lines=lines).page_svg())
    heights = sorted(float(e.get("y", 0)) for e in drawn.iter("text") if (e.text or "").startswith("run "))
    assert all(b - a >= LINE - 0.1 for a, b in pairwise(heights))
    assert len({series(i) for i in range(3 * SERIES)}) == 3 * SERIES


def test_labels_over_rules_stand_apart() -> None:
    rules = [Rule("x", at, f"budget {at} of something") for at in (50, 52, 54, 95)]
    plot = Plot("", *AXES, rules=rules)
    assert [row for _, row in plot.over()] in ([0, 1, 2, 1], [0, 1, 2, 0], [0, 1, 2, 3])
    assert plot.over()[-1][0] == "end"
    drawn = ElementTree.fromstring(plot.page_svg())
    top = plot.box[1]
    assert all(float(e.get("y", 0)) < top for e in drawn.iter("text") if (e.text or "").startswith("budget"))


def test_what_is_said_is_literal_and_everything_can_be_reached() -> None:
    hostile = "$x$ <script>alert(1)</script> & \x00"
    marks = [Mark(1, 0.5, "found", hostile, label=hostile, band=(0.4, 0.6))]
    bars = [Bar(0, None, "", hostile), Bar(1, 0.5, "#ff0000", "second", (0.4, 0.6))]
    for plot in (Plot(hostile, *AXES, marks), Plot("", Axis.over("", [0, 1]), Axis("", rows=[hostile, "b"]), bars=bars)):
        svg = plot.page_svg()
        assert "<script" not in svg and "\x00" not in svg
        for item in ElementTree.fromstring(svg).iterfind(".//g[@role='img']"):
            assert item.findtext("title") and item.get("tabindex") == "-1"
    assert "not measured" in texts(plot)


def test_a_sheet_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    sheet = Sheet("heading", "note", [Plot(f"chart {i}", *AXES, [Mark(1, 0.5, "s0", "one")]) for i in range(4)])
    svg = sheet.file()
    root = ElementTree.fromstring(svg)
    assert "var(" not in svg and "url(" not in svg
    assert {"heading", "note", "chart 0", "chart 3"} <= {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
    svg.savefig(tmp_path / "sheet.svg")
    assert (tmp_path / "sheet.svg").read_text(encoding="utf-8") == svg == svg._repr_svg_()
