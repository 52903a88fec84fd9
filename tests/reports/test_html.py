"""The report as values: order, what follows from the runs, escaping everywhere, and what is said to be missing."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report_rows

from blockprune.errors import UserError
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.reports import model_tables, search_text
from blockprune.reports.html import page, parts
from blockprune.reports.html.sections import sections
from blockprune.reports.notes import caveats, missing
from blockprune.reports.recommendation import recommendations
from blockprune.reports.report_data import ReportData, report_data
from blockprune.reports.results import flat, result_tables, results_table, to_latex
from blockprune.reports.table import Table, to_csv


class Reader(HTMLParser):
    """What a page is made of: tags with their attributes, and text by the tag around it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return report_data(report_rows.everything(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def files(data: ReportData) -> dict[str, str]:
    return page.report_files(data, "thop")


@pytest.fixture(scope="module")
def shown(data: ReportData) -> dict[str, Sequence[Any]]:
    """The parts of each section, by its anchor."""
    return {section.id: section.parts for section in sections(data, result_tables(data), recommendations(data), "thop")}


@pytest.fixture(scope="module")
def read(files: dict[str, str]) -> Reader:
    return Reader(files[".html"])


def titles(table: Table) -> list[str]:
    return [column.title for column in table.columns]


def test_rows_come_teacher_first_then_by_parameters(data: ReportData) -> None:
    evaluated = result_tables(data)[0]
    assert list(dict.fromkeys(row.model for row in evaluated.rows)) == ["tiny", "mid", "small"]
    for table in result_tables(data)[:4]:
        sizes = [row.whole_params or 0 for row in table.rows]
        assert sizes == sorted(sizes, reverse=True), table.title


def test_costs_are_the_graphs(data: ReportData) -> None:
    graph = report_rows.graph()
    for row in (row for table in result_tables(data) for row in table.rows):
        assert row.cost == graph.cost(row.arch)
        assert row.whole_params == graph.cost(row.arch).params + report_rows.OUTSIDE


def test_an_evaluated_model_without_a_graph_is_priced_by_its_components(tmp_path: Path) -> None:
    made = report_rows.evaluate(tmp_path / "e", "small", report_rows.STUDENT, graph=None, outside_params=None)
    (row, *_) = result_tables(report_data([made]))[0].rows
    cost = report_rows.graph().cost(Architecture(frozenset(report_rows.STUDENT)))
    assert row.cost is not None
    assert (row.cost.params, row.cost.thop, row.whole_params) == (cost.params, cost.thop, cost.params + report_rows.OUTSIDE)


def test_a_students_step_is_held_against_the_teachers_of_the_same_run(tmp_path: Path) -> None:
    """Three runs on a machine that was slow, fast and slow: seconds are the teacher's, every student has its ratio."""
    runs = [
        report_rows.evaluate(tmp_path / name, name, removed, speed=speed)
        for name, removed, speed in [("tiny", [], 3.0), ("small", report_rows.STUDENT, 1.0), ("mid", ["mid_block"], 2.0)]
    ]
    found = report_data(runs)
    total = report_rows.graph().total.params
    for row in result_tables(found)[0].rows:
        plain = "int8" not in row.setting and not row.setting.startswith("step ")
        share = report_rows.graph().cost(row.arch).params / total
        assert row.latency_s == (pytest.approx(0.03) if plain and not row.arch else None), row.setting
        assert row.latency_ratio == (pytest.approx(share) if plain and row.arch else None), row.setting
    shown = model_tables.components({name: model.priced for name, model in found.models.items()}, "thop")
    assert shown is not None
    column = [c.title for c in shown.columns].index("latency, × teacher")
    for cells in shown.rows:
        arch = found.models[cells[0].value].arch if cells[0].value != "teacher" else Architecture()
        if cells[1].value == "U-Net x 1":
            assert cells[column].value == pytest.approx(report_rows.graph().cost(arch).params / total)
            assert cells[column].remark == ("" if arch else "30 ms")
    with pytest.raises(ValueError, match="not seconds of its own"):
        replace(result_tables(found)[0].rows[-1], latency_s=1.0)


def test_csv_json_and_page_say_the_same(data: ReportData, files: dict[str, str], read: Reader) -> None:
    rows = list(csv.DictReader(io.StringIO(files[".csv"])))
    content = json.loads(files[".json"])
    models = [r["model"] for r in flat(result_tables(data), "thop")]
    assert [r["model"] for r in rows] == [r["model"] for r in content["results"]] == models
    assert [float(r["fid"] or "nan") for r in rows if r["fid"]] == [r["fid"] for r in content["results"] if r["fid"] is not None]
    assert content["made_by"] == "blockprune report"
    assert content["students"]["small = kd-small = mine"]["removed"] == report_rows.STUDENT
    embedded = files[".html"].partition('id="report-data">')[2].partition("</script>")[0]
    assert json.loads(embedded)["results"] == content
    assert "NaN" not in files[".json"]


def test_nothing_from_outside_is_markup(files: dict[str, str], read: Reader) -> None:
    scripts = read.all("script")
    assert len(scripts) == 2  # the page's data and its own code
    assert not read.all("b")
    assert not any("alert(1)" in text and "<script>" not in text for text in read.texts)
    assert any(report_rows.HOSTILE in (img["alt"] or "") for img in read.all("img"))
    assert any(report_rows.HOSTILE in text for text in read.texts)
    embedded = files[".html"].partition('id="report-data">')[2].partition("</script>")[0]
    assert "<" not in embedded


def test_a_hostile_name_stays_inside_the_embedded_data(tmp_path: Path) -> None:
    name = "</script><script>alert(2)</script>"
    text = page.report_files(report_data([report_rows.evaluate(tmp_path / "e", name)]), "thop")[".html"]
    assert len(Reader(text).all("script")) == 2
    embedded = text.partition('id="report-data">')[2].partition("</script>")[0]
    assert json.loads(embedded)["results"]["results"][0]["model"] == name


def test_the_page_needs_nothing_else(files: dict[str, str], read: Reader) -> None:
    for tag, attrs in read.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attrs and tag != "a":
                assert (attrs[name] or "").startswith("data:"), (tag, attrs)
    assert all((a["href"] or "").startswith("#") for a in read.all("a"))
    assert "default-src 'none'" in files[".html"]
    assert "@import" not in files[".html"]


def test_every_image_says_what_it_shows(read: Reader) -> None:
    images = read.all("img")
    assert len(images) > 20
    assert all((img.get("alt") or "").strip() for img in images)


def test_anchors_lead_somewhere(read: Reader) -> None:
    ids = {attrs["id"] for _, attrs in read.tags if "id" in attrs}
    assert {(a["href"] or "")[1:] for a in read.all("a")} <= ids
    assert {"take", "blocks", "remove", "search", "training", "settings", "costs", "images", "asked"} <= ids


def test_every_removed_block_is_hatched_in_every_student(data: ReportData, shown: dict[str, Sequence[Any]]) -> None:
    (drawn,) = shown["remove"]
    teacher, *students = drawn.items
    assert "gone" not in teacher.svg
    for drawing, arch in zip(students, data.students, strict=True):
        for block in ElementTree.fromstring(drawing.svg).iterfind(".//*[title]"):
            tooltip, gone = block.findtext("title", "").split("\n"), "gone" in (block.get("class") or "").split()
            assert gone == (tooltip[0] in arch) == ("removed in this student" in tooltip), tooltip[0]
        assert len(drawing.words) == len({n.split(".")[0] + n.split(".")[1] if "." in n else n for n in arch})


def test_weights_are_shown_where_they_were_weighed(data: ReportData) -> None:
    table = result_tables(data)[0]
    assert "weights, MB" not in titles(results_table(table, "thop"))
    rows = [replace(row, scores={**row.scores, "weight_bytes": Score("", "", "weight_bytes", 2.5e6, 0, 0)}) for row in table.rows]
    shown = results_table(replace(table, rows=rows), "thop")
    column = titles(shown).index("weights, MB")
    assert {shown.columns[column].text(row[column]) for row in shown.rows} == {"2.50"}


def test_best_is_the_best_student(data: ReportData) -> None:
    (table,) = (t for t in result_tables(data) if t.title == "Evaluated models")
    shown = results_table(table, "thop")
    column = titles(shown).index("FID ↓")
    best = [row[0].value for row in shown.rows if row[column].best]
    assert best == ["mid"]


def test_latex_takes_everything_literally(data: ReportData, tmp_path: Path) -> None:
    text = to_latex([results_table(t, "thop") for t in result_tables(data)])
    for block in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.S):
        lines = [line for line in block[1].splitlines() if line.strip().endswith("\\\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(block[0])}
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == len(result_tables(data))
    hostile = report_rows.evaluate(tmp_path / "e", "50%_of\nit & more")
    assert r"50\%\_of it \& more &" in to_latex([results_table(t, "thop") for t in result_tables(report_data([hostile]))])


def test_macs_are_named_by_their_convention(data: ReportData) -> None:
    assert "macs_with_attention" in to_csv(flat(result_tables(data), "with_attention")).splitlines()[0]
    assert any("MACs/step (conv_linear)" in title for title in titles(results_table(result_tables(data)[0], "conv_linear")))


def test_several_runs_of_a_kind_have_a_curve_each(shown: dict[str, Sequence[Any]]) -> None:
    scores, losses = (next(p for p in shown["training"] if p.kind == kind) for kind in ("charts", "fold"))
    for svg in scores.svgs:
        curves = [e for e in ElementTree.fromstring(svg).iter("path") if "line" in (e.get("class") or "").split()]
        assert len({e.get("class") for e in curves}) == 2
    # a distillation goes by the name of the model that came of it
    assert [re.sub("<.*?>", "", svg.split("</text>")[0]) for svg in losses.parts[0].svgs] == ["small", "mid"]
    assert [p.title for p in shown["search"] if p.kind == "fold"] == ["search-80", "search-78"]


def test_nothing_is_missing_from_a_full_report(data: ReportData) -> None:
    assert missing(data) == ["`scan`: not measured: `fid` for 1 of 19 removals."]
    assert any("n = 64" in line for line in caveats(data))


def test_an_old_distillation_alone_is_a_report_that_says_what_is_missing(tmp_path: Path) -> None:
    old = report_data([report_rows.distill(tmp_path / "kd", old=True)])
    text = page.report_files(old, "thop")[".html"]
    assert "What is missing" in text
    said = "\n".join(missing(old))
    assert "No run holds the teacher's graph" in said
    assert all(f"No `{command}` run was given" in said for command in ("scan", "search", "evaluate"))
    assert "removes 2 blocks of its teacher" in text


@pytest.mark.parametrize("measures", [("eps_mse",), ("fid",), ("latency_ratio",), ()])
def test_a_scan_of_little_is_a_report(tmp_path: Path, measures: tuple[str, ...]) -> None:
    found = report_data([report_rows.scan(tmp_path / "scan", measures)])
    assert "What is missing" in page.report_files(found, "thop")[".html"]
    assert any(line.startswith("`scan`") for line in missing(found))


def test_a_search_that_has_not_ended_is_a_report(tmp_path: Path) -> None:
    found = report_data([report_rows.search(tmp_path / "search", finals=False)])
    assert "Best score so far" not in page.report_files(found, "thop")[".tex"]
    assert "`search` has no finalist that holds the budgets" in "\n".join(missing(found))


def test_rows_of_another_age_are_left_out_and_counted(tmp_path: Path) -> None:
    for make in (report_rows.scan, report_rows.search, report_rows.distill):
        folder = make(tmp_path / make.__name__)
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        for lacking in ("n", "tiers", "losses"):
            rows[1].pop(lacking, None)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = report_data([folder])
        assert f"1 of {len(rows)} rows of {folder.name!r} lack" in missing(found)[0]
        assert page.report_files(found, "thop")


def test_a_damaged_picture_is_left_out_and_named(tmp_path: Path) -> None:
    folder = report_rows.evaluate(tmp_path / "e", "tiny")
    (folder / "images" / "cfg-3-10-steps.png").write_bytes(b"no picture")
    said = missing(report_data([folder]))
    assert any("cfg-3-10-steps.png" in line and "cannot be read" in line for line in said)
    assert "`tiny` has no images." in said


def test_runs_of_other_teachers_do_not_mix(tmp_path: Path) -> None:
    runs = [report_rows.scan(tmp_path / "scan"), report_rows.scan(tmp_path / "other", teacher="fedcba987654")]
    with pytest.raises(UserError, match=r"'other' has .*fedcba987654.*'scan' has .*0123456789ab"):
        report_data(runs)


def test_protocols_that_differ_are_named_or_kept_apart(tmp_path: Path) -> None:
    a = report_rows.evaluate(tmp_path / "a", "tiny")
    b = report_rows.evaluate(tmp_path / "b", "small", report_rows.STUDENT, protocol={"hash": "b" * 12, "n_images": 32})
    with pytest.raises(UserError, match=r"n_images 64 and 32.*--allow-mismatch"):
        report_data([a, b])
    apart = report_data([a, b], allow_mismatch=True)
    assert [t.title for t in result_tables(apart)] == ["Evaluated models", "Evaluated models"]
    assert any("stand apart" in line for line in caveats(apart))


def test_prose_undoes_markdown_and_escapes_html() -> None:
    assert parts.prose("`a<b` and \\*x\\* &lt;i&gt; <b>") == "<code>a&lt;b</code> and *x* &lt;i&gt; &lt;b&gt;"


def test_every_chart_is_drawn_and_only_images_are_pixels(read: Reader) -> None:
    assert len([svg for svg in read.all("svg") if svg.get("class") == "p"]) > 10
    assert {re.match(r"data:image/(png|jpeg);", img["src"] or "") is not None for img in read.all("img")} == {True}
    assert sum(tag == "table" and attrs.get("class", "").startswith("images") for tag, attrs in read.tags) > 3


def test_the_page_says_once_how_much_was_searched_in_what_time_and_of_what_shares_are(files: dict[str, str]) -> None:
    """As many architectures in its first lines as in the finding of the section; parameters of one scope."""
    html = files[".html"]
    header = html.partition("<header>")[2].partition("</header>")[0]
    first = html.partition("</header>")[2].partition('<details class="section" id="blocks"')[0]
    n, _ = re.search(r"([\d,]+) architectures in (\d+:\d\d:\d\d)", header).groups()  # type: ignore[union-attr]
    assert f" 2 searches ({n} evaluations in all) beat the design by hand, 95 % intervals apart." in html
    assert header.count("whole pipeline") == 1 and "U-Net" in header
    assert "pipeline" not in re.sub(r"<code>.*?</code>", "", first) and "U-Net" not in first


def test_what_a_search_took_over_is_told_from_what_it_evaluated(data: ReportData) -> None:
    view = data.searches["search-80"]
    taken = [replace(e, seconds=0.0) if i < 3 else e for i, e in enumerate(view.search)]
    other = replace(view, search=taken)
    n = len(view.search)
    assert f"after {n} evaluations." in search_text.summary(view)
    assert f"after {n} evaluations, 3 of them taken over from another run." in search_text.summary(other)
    assert f"the search ({n - 3} evaluations) beats" in search_text.finding({"other": other})
    assert view.seconds - other.seconds == 3.0
