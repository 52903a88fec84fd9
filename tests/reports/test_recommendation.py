"""What is recommended at a size: laws on a few made-up models, and where names, sizes and updates come from."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import report_rows

from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.reports.model_view import ModelView, Setting
from blockprune.reports.models import Model, Reading
from blockprune.reports.recommendation import Recommendation, Size, recommendations, recommended
from blockprune.reports.report_data import report_data

SETTING = Setting("CFG 3, 10 steps", 10, 3.0, "ddim")
READING = Reading("a", SETTING, 64)
HALF = Size({"params": "50%params"}, {"params": 0.5})
SHARES = {"teacher": 1.0, "small": 0.4, "design": 0.5, "large": 0.6}


def model(
    name: str, clip: float | None, fid: float | None, design: str = "", updates: int | None = 100, half: float = 0.1
) -> Model:
    """Named like its size, with intervals of a share of the values on each side."""
    arch = Architecture() if name == "teacher" else Architecture(frozenset({f"{name}.block"}))
    known = {m: v for m, v in (("clip_score", clip), ("fid", fid)) if v is not None}
    scores = {m: Score(arch.key, name, m, v, 64, 0, v * (1 - half), v * (1 + half)) for m, v in known.items()}
    view = ModelView(
        name, {"hash": "a", "n_images": 64}, {}, "teacher", "", arch, None, None, [SETTING], {SETTING.label: scores}, [], {}, []
    )
    return Model(name, {"a": view}, design, updates=updates)


def at(*models: Model, size: Size = HALF) -> Recommendation:
    shares = {m.name: {"params": next(s for name, s in SHARES.items() if m.name.startswith(name))} for m in models}
    return recommended(size, models, READING, shares)


DESIGN = model("design", 0.5, 20.0, design="bk-sdm-small")


def taken(found: Recommendation) -> tuple[str, str, str]:
    return (found.take.name if found.take else "", found.rival.name if found.rival else "", found.verdict)


@pytest.mark.parametrize(
    ("clip", "fid", "take", "verdict", "told"),
    [
        (0.8, 10.0, "small", "better", "better in CLIP score and FID"),
        (0.8, 20.0, "small", "better", "better in CLIP score, undecided in FID (level), compared"),
        (0.51, 10.0, "small", "better", "better in FID, undecided in CLIP score (ahead)"),
        (0.8, 40.0, "small", "mixed", "better in CLIP score, worse in FID"),
        (0.51, 19.0, "design", "hand", "undecided in CLIP score (behind) and FID (behind)"),
        (0.3, 10.0, "design", "hand", "better in CLIP score, worse in FID"),
        (0.5, 40.0, "design", "hand", "better in FID, undecided in CLIP score (level)"),
        (0.3, 40.0, "design", "hand", "better in CLIP score and FID"),
    ],
)
def test_the_verdict_is_what_intervals_tell(clip: float, fid: float, take: str, verdict: str, told: str) -> None:
    found = at(model("small", clip, fid), DESIGN)
    assert taken(found) == (take, "design" if take == "small" else "small", verdict)
    assert told in found.sentence
    assert found.sentence.startswith("nothing beats this design by hand") == (verdict == "hand")
    assert found.remarks == "One training each, 100 updates; n\xa0=\xa064."


def lines(found: Recommendation) -> list[list[str]]:
    return [[column.line(cell) for column, cell in row] for row in found.table.paired()]


def test_numbers_stand_beside_those_of_the_rival() -> None:
    found = at(model("small", 0.8, 10.0), model("design", 0.5, 10.5, "bk-sdm-small"))
    assert [column.title for column in found.table.columns] == ["", "small", "design", ""]
    assert lines(found) == [
        ["CLIP score", "0.800 [0.720, 0.880]", "0.500 [0.450, 0.550]", "better"],
        ["FID", "10.0 [9.00, 11.0]", "10.5 [9.45, 11.6]", "undecided"],
    ]
    assert lines(at(DESIGN)) == [["CLIP score", "0.500 [0.450, 0.550]"], ["FID", "20.0 [18.0, 22.0]"]]
    assert found.to_json()["comparisons"] == lines(found)


def test_who_follows_captions_as_well_is_named_where_fid_decided() -> None:
    others = [model(f"small_{i}", 0.79, 20.0 + i) for i in range(3)]
    assert "Similar CLIP score, FID no better: `small_0`." in at(model("small", 0.8, 10.0), others[0], DESIGN).remarks
    assert "FID no better: `small_0`, `small_1`, …." in at(model("small", 0.8, 10.0), *others, DESIGN).remarks
    assert "Similar" not in at(model("small", 0.8, 10.0), model("small_9", 0.5, 1.0), DESIGN).remarks
    without_fid = model("design", 0.5, None, "bk-sdm-small")
    assert at(model("small", 0.8, 10.0), others[0], without_fid).remarks.startswith("One training each")
    better = model("small_8", 0.51, 19.0)  # by its value, not beyond the intervals: then a design by hand is taken
    assert "Similar" not in at(DESIGN, better, model("small_7", 0.52, 19.5)).remarks
    assert at(DESIGN, better).take is DESIGN


def test_the_order_of_models_does_not_matter_and_what_is_too_large_is_never_taken() -> None:
    models = [DESIGN, model("small", 0.7, 30.0), model("small_2", 0.71, 12.0), model("large", 0.9, 1.0), model("teacher", 0.9, 1.0)]
    assert {taken(at(*order)) for order in permutations(models)} == {("small_2", "design", "better")}
    assert taken(at(*models, size=Size({"params": "all"}, {"params": 1.0})))[0] == "large"


def test_among_those_that_captions_do_not_tell_apart_fid_decides() -> None:
    assert taken(at(model("small", 0.8, 30.0), model("small_2", 0.75, 12.0)))[0] == "small_2"
    assert taken(at(model("small", 0.8, 30.0), model("small_2", 0.6, 12.0)))[0] == "small"


def test_a_measure_that_is_missing_does_not_speak() -> None:
    assert taken(at(model("small", None, 10.0), model("design", None, 20.0, "bk-sdm-small"))) == ("small", "design", "better")
    found = at(model("small", 0.8, None), model("design", 0.5, None, "bk-sdm-small"))
    assert [row[0] for row in lines(found)] == ["CLIP score"] and "better in CLIP score, compared with" in found.sentence


def swept(name: str, fids: dict[float, float], design: str = "") -> Model:
    """A model whose images were looked at on several guidance scales, CFG 3 among them."""
    of = model(name, 0.8, 10.0, design)
    settings = {scale: replace(SETTING, label=f"CFG {scale:g}, 10 steps", cfg_scale=scale) for scale in fids}
    few = {s.label: {"fid": Score(name, name, "fid", fids[k], 32, 0, 0.9 * fids[k], 1.1 * fids[k])} for k, s in settings.items()}
    sweep = replace(of.views["a"], protocol={"hash": "b", "n_images": 32}, settings=list(settings.values()), scores=few)
    return replace(of, views={**of.views, "b": sweep})


def test_what_each_is_worth_at_its_own_best_guidance_is_said() -> None:
    """The order may be another there; nothing is said where one of the two has no second scale."""
    found = at(
        swept("small", {1.5: 30.0, 3.0: 20.0, 4.5: 18.0}), swept("design", {1.5: 14.0, 3.0: 25.0, 4.5: 60.0}, "bk-sdm-small")
    )
    assert found.take and found.take.name == "design"
    assert lines(found)[-1] == ["FID, best CFG", "14.0 [12.6, 15.4]", "18.0 [16.2, 19.8]", "better"]
    assert "Best CFG by FID: 1.5 and 4.5, n\xa0=\xa032: compare within a row." in found.remarks
    assert (
        found.verdict == "hand" and "undecided in CLIP score (level) and FID (level; ahead at best CFG), compared" in found.sentence
    )
    once = at(swept("small", {1.5: 30.0, 3.0: 20.0}), swept("design", {3.0: 25.0}, "bk-sdm-small"))
    assert len(lines(once)) == 2 and "CFG" not in once.remarks


def test_an_untrained_student_is_taken_only_where_no_trained_one_is() -> None:
    raw = model("small", 0.9, 1.0, updates=0)
    assert taken(at(raw, DESIGN)) == ("design", "", "hand")
    assert taken(at(raw)) == ("small", "", "alone")
    assert at(raw).sentence == "no design by hand of this size was evaluated."
    assert at(raw).remarks.startswith("Not trained")
    assert "Training not recorded" in at(model("small", 0.9, 1.0, updates=None)).remarks


def test_without_a_student_there_is_no_model_to_take() -> None:
    found = at(model("large", 0.9, 1.0), model("teacher", 0.9, 1.0))
    assert taken(found) == ("", "", "none")
    assert found.sentence == "no student that holds this was evaluated."


def pipeline_share(removed: list[str]) -> float:
    graph, outside = report_rows.graph(), report_rows.OUTSIDE
    return (graph.cost(Architecture(frozenset(removed))).params + outside) / (graph.total.params + outside)


def test_a_model_has_one_name_however_often_it_is_evaluated(tmp_path: Path) -> None:
    other = {"hash": "b" * 12, "n_images": 32}
    students = [
        report_rows.evaluate(tmp_path / f"small-{i}", "small", report_rows.STUDENT, protocol=p) for i, p in enumerate(({}, other))
    ]
    again = report_rows.evaluate(tmp_path / "again", "small", report_rows.STUDENT)
    namesake = report_rows.evaluate(tmp_path / "namesake", "small", ["mid_block"])
    teacher = report_rows.evaluate(tmp_path / "teacher", "tiny")
    data = report_data([*students, again, namesake, teacher], allow_mismatch=True)
    assert list(data.models) == ["tiny", "small (namesake)", "small"]
    assert data.models["small"].views.keys() == {"a" * 12, "b" * 12}
    assert [len(group) for group in data.groups.values()] == [3, 1]
    n_settings = len(report_rows.SETTINGS) + len(report_rows.CHECKPOINTS)
    assert len(data.models["small"].readings) == 2 * n_settings
    assert {m.design for m in data.models.values()} == {"", "mid-removed"}


def test_a_size_is_the_budget_of_searches(tmp_path: Path) -> None:
    searches = [report_rows.search(tmp_path / "search"), report_rows.search(tmp_path / "again")]
    (found,) = recommendations(report_data([*searches, report_rows.evaluate(tmp_path / "teacher", "tiny")]))
    assert found.size.text == "80%params" and found.size.limits == pytest.approx({"params": 0.8}, rel=1e-3)
    assert found.sentence.endswith("The search answers `mine`: distil and evaluate it.")


def test_of_two_budgets_on_one_quantity_the_smaller_one_binds(tmp_path: Path) -> None:
    search = report_rows.search(tmp_path / "search", budget="80%params")
    view = report_data([search]).searches["search"]
    teacher = report_rows.evaluate(tmp_path / "teacher", "tiny")
    data = report_data([search, teacher])
    limits = {
        "80%params": view.limits["80%params"],
        "0.1M": ("params", 0.5 * view.limits["80%params"][1]),
        "90%macs": ("macs", 1.0),
    }
    both = replace(data, searches={"search": replace(view, limits=limits)})
    (found,) = recommendations(both)
    assert found.size.texts == {"params": "0.1M", "macs": "90%macs"}


def test_a_design_that_a_budget_is_for_names_no_size_of_its_own(tmp_path: Path) -> None:
    share = pipeline_share(["mid_block"])
    mid = report_rows.evaluate(tmp_path / "mid", "mid", ["mid_block"])
    for spare, n_sizes in ((0.5, 1), (2.0, 2)):
        search = report_rows.search(tmp_path / f"search-{spare}", budget=f"{100 * share + spare:.3f}%params")
        found = recommendations(report_data([search, mid]))
        assert len(found) == n_sizes
        assert {r.take.design for r in found if r.take} == {"mid-removed"}


def test_a_size_is_that_of_a_design_by_hand_that_no_budget_is_for(tmp_path: Path) -> None:
    mid = report_rows.evaluate(tmp_path / "mid", "mid", ["mid_block"], model="runs/kd/pipeline")
    settings = [s.to_json() | {"scheduler": "ddim"} for s in report_rows.SETTINGS]
    small = report_rows.evaluate(tmp_path / "small", "small", report_rows.STUDENT, model="tiny", settings=settings)
    (found,) = recommendations(report_data([mid, small, report_rows.distill(tmp_path / "kd", ["mid_block"])]))
    assert found.take and found.size.text == found.take.design == "mid-removed"
    assert (found.take.updates, found.take.training) == (6, "kd")
    assert found.rival is None, "the other one is not trained"
    assert found.spent["params"] == found.size.limits["params"] == pipeline_share(["mid_block"])
