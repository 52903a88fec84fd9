"""`blockprune search --solve-only`: other budgets from known scores, exactly and without a pass; and stock students alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from common_fixtures import Cli
from small_search import SMALL

from blockprune.export.stock_config import Stock, expressible
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.trace import trace
from blockprune.runs import directory


def test_other_budgets_are_solved_without_forward_passes(
    searched: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockprune.model import pretrained

    monkeypatch.setattr(pretrained, "load", lambda *a, **k: pytest.fail("weights were loaded"))
    found = []
    for i, budget in enumerate(("70%params", "90%macs")):
        args = ["--unit", "stage", "--budget", budget, "--solve-only", "--from-scan", searched]
        for _ in range(2):  # the same again finds the same
            code, out, _ = cli("search", *args, "--out", tmp_path / str(i))
            assert code == 0
            assert "solutions.json" in out
        data = json.loads((tmp_path / str(i) / "solutions.json").read_text())["solutions"]
        found.append([s["architecture"]["removed"] for s in data])
        sums = [s["predicted"]["guided_mse"] for s in data]
        assert sums == sorted(sums)
        assert all(excess <= 0 for s in data for excess in s["over_budget"].values())
        scores = {
            row["tiers"][-1]["label"]: row["tiers"][-1]["value"] for row in directory.read_rows(searched) if row["kind"] == "search"
        }
        first = Architecture.from_json(json.loads((tmp_path / str(i) / "best.json").read_text()))
        units = [u for u in scores if u in stages() and stages()[u] <= first]
        assert sums[0] <= sum(scores[u] for u in units) * (1 + 1e-9)
        assert "predicted guided_mse" in out
        assert (tmp_path / str(i) / "solution-2.json").exists()
        code, out, _ = cli("cost", "--arch", tmp_path / str(i) / "best.json", "--json")
        assert code == 0
        assert json.loads(out)["unet"]["params"] == data[0]["cost"]["params"]
    assert found[0] != found[1]


def test_a_budget_may_be_a_design(searched: Path, cli: Cli, tmp_path: Path, one_line: Callable[..., str]) -> None:
    """Then its parameters and its MACs must hold, whichever unit either is said in."""
    args = ["--unit", "stage", "--solve-only", "--from-scan", searched]
    for scope in ("pipeline", "unet"):
        out = tmp_path / scope
        assert cli("search", *args, "--budget", "bk-sdm-small", "--scope", scope, "--out", out)[0] == 0
        best = json.loads((out / "best.json").read_text())
        design = json.loads(cli("cost", "--arch", "bk-sdm-small", "--json")[1])["unet"]
        assert best["over_budget"].keys() == {"parameters of bk-sdm-small", "MACs of bk-sdm-small"}
        assert best["cost"]["params"] <= design["params"]
        assert best["cost"]["macs"]["thop"] <= design["macs"]["thop"]
    assert "cannot read the budget 'bk-sdm-smal': did you mean bk-sdm-small" in one_line("search", *args, "--budget", "bk-sdm-smal")
    assert "preset 'ssd-1b' is for another U-Net" in one_line("search", *args, "--budget", "ssd-1b")


@pytest.mark.slow
@pytest.mark.usefixtures("drifting_clock")
def test_a_search_may_be_held_to_what_stock_diffusers_loads(tmp_path: Path, cli: Cli, one_line: Callable[..., str]) -> None:
    """Scored, and solved on the scores of single blocks, which add up to those of the pairs that must go together."""
    config = pretrained.configs("tiny-digits").unet
    scan, budget = tmp_path / "scan", ["--budget", "bk-sdm-small", "--stock-only", "--objective", "eps_mse"]
    assert cli("scan", "--measures", "eps_mse", "--eps-samples", "8", "--batch-size", "8", "--out", scan)[0] == 0
    solving = ["search", *budget, "--solve-only", "--from-scan", scan, "--out", tmp_path / "solved"]
    assert cli(*solving)[0] == 0
    best = tmp_path / "solved" / "best.json"
    first = Architecture.from_json(json.loads(best.read_text()))
    assert isinstance(expressible(config, first), Stock)
    few = ["--trials", "6", "--finalists", "1", "--final-factor", "1"]
    code, out, _ = cli("search", *budget, *SMALL[:8], *few, "--out", tmp_path / "searched")
    assert code == 0
    assert "any diffusers loads it" in out
    for wrong in (["--fit", "linear"], ["--unit", "component"]):
        assert "no stock configuration has" in one_line("search", *budget, *wrong)
    assert "all of it is kept" in one_line("search", *budget, "--keep", "*")


def stages() -> dict[str, Architecture]:
    config = pretrained.configs("tiny-digits")
    return trace(config.unet, config.latent(None), config.n_tokens).units("stage")


def test_a_single_unit_may_be_the_solution(searched: Path, cli: Cli, tmp_path: Path) -> None:
    """A unit that was scored alone is known, and still the best within a loose budget."""
    args = ["--unit", "stage", "--budget", "99%params", "--solve-only", "--from-scan", searched, "--out", tmp_path / "run"]
    assert cli("search", *args)[0] == 0
    solutions = json.loads((tmp_path / "run" / "solutions.json").read_text())["solutions"]
    units = set(stages().values())
    assert any(Architecture.from_json(s["architecture"]) in units for s in solutions)


def test_solving_says_what_it_needs_and_overwrites_nothing(searched: Path, one_line: Callable[..., str], tmp_path: Path) -> None:
    args = ["--unit", "stage", "--budget", "70%params", "--solve-only"]
    assert "give --from-scan" in one_line("search", *args, "--out", tmp_path / "run")
    before = {p.name: p.read_bytes() for p in searched.iterdir() if p.is_file()}
    assert "holds a search run" in one_line("search", *args, "--from-scan", searched, "--out", searched)
    assert {p.name: p.read_bytes() for p in searched.iterdir() if p.is_file()} == before
    assert "has clip_score of no unit 'stage'" in one_line("search", *args, "--from-scan", searched, "--objective", "clip_score")


def test_solving_on_a_scan_leaves_out_what_it_lacks(searched: Path, cli: Cli, one_line: Callable[..., str]) -> None:
    args = ["--solve-only", "--from-scan", searched]
    code, out, _ = cli("search", "--unit", "stage,block", "--budget", "80%params", *args)
    assert code == 0
    assert out.startswith("left out, for want of guided_mse in")
    assert "down_blocks.0.resnets.0" in out.splitlines()[0]
    line = one_line("search", "--unit", "layer", "--budget", "99%params", *args)
    assert "has guided_mse of no unit 'layer'" in line
