"""The made-up runs that the report's tests read are of the form that the commands write: held against miniature real runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import report_rows
from common_fixtures import Cli

from blockprune.reports.html.page import report_files
from blockprune.reports.notes import missing
from blockprune.reports.recommendation import recommendations
from blockprune.reports.report_data import report_data
from blockprune.runs.directory import read_rows, read_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The same as the report's tests make them up."""
    folder = tmp_path_factory.mktemp("made")
    return {
        "scan": report_rows.scan(folder / "scan"),
        "search": report_rows.search(folder / "search"),
        "distill": report_rows.distill(folder / "distill"),
        "evaluate": report_rows.evaluate(folder / "evaluate", "mid", ["mid_block"]),
        "checkpoints": report_rows.evaluate(folder / "checkpoints", "mid", ["mid_block"]),
    }


def form(value: Any) -> Any:
    """What a record is made of, without its numbers: keys in their order, and the kinds of values."""
    if isinstance(value, Mapping):
        return {key: form(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [form(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def rows_by_kind(folder: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """A row of each kind, and of each measure where a row is a score."""
    return {(row.get("kind", "score"), row.get("measure", "")): row for row in read_rows(folder)}


@pytest.mark.parametrize("name", ["scan", "search", "distill", "evaluate"])
def test_rows_have_the_form_of_real_ones(real: Mapping[str, Path], made: Mapping[str, Path], name: str) -> None:
    ours, theirs = rows_by_kind(made[name]), rows_by_kind(real[name])
    assert {kind for kind, _ in ours} <= {kind for kind, _ in theirs}
    for key in ours.keys() & theirs.keys():
        a, b = dict(ours[key]), dict(theirs[key])
        for entry in ("params", "losses", "over", "removed") if key[0] not in ("component", "score") else ():
            if isinstance(a.get(entry), Mapping | list):  # names of blocks, budgets and taps: a model's own
                assert type(a.pop(entry)) is type(b.pop(entry)), (key, entry)
        assert form(a) == form(b), key


@pytest.mark.parametrize("name", ["scan", "search", "distill", "evaluate"])
def test_run_json_says_what_real_ones_say(real: Mapping[str, Path], made: Mapping[str, Path], name: str) -> None:
    ours, theirs = read_run(made[name]), read_run(real[name])
    assert ours.keys() == theirs.keys()
    assert ours["asked"].keys() <= theirs["asked"].keys()
    assert ours["made_with"].keys() <= theirs["made_with"].keys()
    for key in ours.keys() - {"asked", "made_with", "archs", "graph", "protocol", "request"}:
        assert form(ours[key]) == form(theirs[key]), key
    assert ours.get("protocol", {}).keys() <= theirs.get("protocol", {}).keys()
    assert ours.get("request", {}).keys() <= theirs.get("request", {}).keys()


def test_labels_and_pictures_are_named_as_real_ones_are(real: Mapping[str, Path], made: Mapping[str, Path]) -> None:
    for run in (real, made):
        settings = [s["label"] for s in read_run(run["checkpoints"])["settings"] if s["checkpoint"]]
        assert settings
        assert all(label.startswith("step ") for label in settings)
        assert {row["score"]["label"] for row in read_rows(run["distill"]) if row["kind"] == "validation"} <= {
            "step 2",
            "step 3",
            "step 6",
        }
    found = {kind: [report_data([run[kind]]) for run in (real, made)] for kind in made}
    for kind, both in found.items():
        for data in both:
            (view,) = data.runs.values()
            assert view.images, kind
            assert not data.unread


def test_real_runs_are_a_report(real: Mapping[str, Path], cli: Cli, tmp_path: Path) -> None:
    data = report_data(list(real.values()), allow_mismatch=True)
    assert not data.unread
    assert {m.name: (m.design, m.training, m.updates) for m in data.models.values()} == {
        "tiny-digits": ("", "", 0),
        "mid-removed": ("mid-removed", "", 0),
        "found": ("", "distill", 2),
    }
    assert {r.verdict for r in recommendations(data)} == {"alone"}, "the design by hand is not trained"
    said = missing(data)
    assert not any("lack" in line or "No run" in line for line in said), said
    assert all(report_files(data, "thop").values())
