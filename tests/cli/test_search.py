"""`blockprune search` as a user runs it: outputs, resuming, many workers, a real PostgreSQL, and one clear line for bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from as_user import run, run_in_own_process, workers_of
from common_fixtures import Cli
from small_search import BY_ERROR, N_TRIALS, QUICK, SMALL, scored

from blockprune.cost import latency
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.trace import trace
from blockprune.reports.searches import search_view
from blockprune.reports.table import number
from blockprune.runs import directory

pytestmark = pytest.mark.usefixtures("drifting_clock")


def test_outputs_are_all_there(searched: Path) -> None:
    names = {p.name for p in searched.iterdir()}
    assert {"best.json", "finalists.csv", "report.md", "history.svg", "front.svg", "unet-best.svg", "grid.png"} <= names
    best = json.loads((searched / "best.json").read_text())
    assert Architecture.from_json(best).removed
    assert best["cost"]["pipeline_params"] <= 0.75 * best["teacher_cost"]["pipeline_params"]
    assert set(best["cost"]["macs"]) == {"thop", "conv_linear", "with_attention"}
    (own,) = (s for s in best["scores"] if s["measure"] == "guided_mse")
    assert own["n"] == 8
    assert own["seed"] != best["score_in_search"]["seed"]
    assert own["low"] < own["value"] < own["high"]
    table = list(csv.DictReader((searched / "finalists.csv").read_text().splitlines()))
    assert table[0]["label"] == best["label"]
    assert {"bk-sdm-small", "bk-sdm-tiny", "bk-sdm-base"} <= {row["label"] for row in table}
    values = [float(row["guided_mse"]) for row in table]
    assert values == sorted(values)
    report = (searched / "report.md").read_text()
    assert "What is removed" in report
    assert "bk-sdm-small" in report
    assert len(scored(searched)) == N_TRIALS
    assert len(scored(searched, "random")) == 3


def test_same_command_again_adds_nothing(searched: Path, cli: Cli) -> None:
    before = (searched / "rows.jsonl").read_bytes()
    code, out, _ = cli("search", *QUICK, "--random", "3", "--out", searched)
    assert code == 0
    assert "best.json" in out
    best = json.loads((searched / "best.json").read_text())
    assert f"{best['label']}: " in out  # which tools load the student
    assert "diffusers loads it" in out or "only blockprune.load_pipeline loads it" in out
    assert "parameters, whole pipeline" in out
    assert (searched / "rows.jsonl").read_bytes() == before


def test_captions_stand_beside_the_objective(searched: Path, cli: Cli) -> None:
    """On the terminal, in finalists.csv and in report.md: what the teacher and every finalist have, and over how many images."""
    code, out, _ = cli("search", *QUICK, "--random", "3", "--out", searched)
    assert code == 0
    seen = {row["label"]: row["scores"] for row in directory.read_rows(searched) if row["kind"] == "seen"}
    captions = {label: s for label, scores in seen.items() for s in scores if s["measure"] == "clip_score"}
    report = (searched / "report.md").read_text()
    table = {row["label"]: row for row in csv.DictReader((searched / "finalists.csv").read_text().splitlines())}
    assert captions.keys() == {"full", *table}
    assert list(next(iter(table.values())))[:14].index("clip_score") > list(next(iter(table.values()))).index("guided_mse")
    for text in (out, report):
        assert "clip_score ↑, n = 4" in text
    for label, s in captions.items():
        name = "teacher" if label == "full" else label
        for text in (out, report):
            (line,) = (x for x in text.splitlines() if re.match(rf"[|\s]*[-\d]+[|\s]+`?{re.escape(name)}`?[|\s]", x))
            assert f"{number(s['value'])} [{number(s['low'])}" in line, (name, line)
        if label != "full":
            assert float(table[label]["clip_score"]) == s["value"]
            assert float(table[label]["clip_score_delta_high"]) == s["delta_high"]


def test_the_best_is_an_architecture_for_other_commands(searched: Path, cli: Cli) -> None:
    code, out, _ = cli("cost", "--arch", searched / "best.json", "--json")
    assert code == 0
    best = json.loads((searched / "best.json").read_text())
    assert json.loads(out)["unet"]["params"] == best["cost"]["params"]


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_scores(searched: Path, tmp_path: Path) -> None:
    args = [*QUICK, "--random", "3", "--out", str(tmp_path / "run")]
    for n_rows in (3, 14):
        process = subprocess.Popen(
            [sys.executable, "-m", "blockprune", "search", *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(directory.read_rows(tmp_path / "run")) < n_rows:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run("search", *args)
    again = scored(tmp_path / "run")
    first = {key: value for key, value in scored(searched).items() if key in again}
    assert {key: again[key] for key in first} == first
    planned = [
        row for row in directory.read_rows(searched) if row["kind"] == "search" and row["source"] in ("scan", "exact", "preset")
    ]
    assert {row["tiers"][-1]["arch"] for row in planned} <= first.keys()
    assert len(scored(tmp_path / "run")) == N_TRIALS
    assert _best(tmp_path / "run")["holds_budget"] == "True"


def _best(folder: Path) -> dict[str, str]:
    return next(csv.DictReader((folder / "finalists.csv").read_text().splitlines()))


def test_more_trials_go_on_from_what_there_is(searched: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(searched, tmp_path / "run")
    before = scored(searched)
    args = [*QUICK, "--trials", str(N_TRIALS + 2), "--study-name", "run", "--out", tmp_path / "run"]
    assert cli("search", *args)[0] == 0
    after = scored(tmp_path / "run")
    assert len(after) == N_TRIALS + 2
    assert after.items() >= before.items()


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["none", "linear"])
def test_scores_of_a_scan_are_taken_over(tmp_path: Path, cli: Cli, fit: str) -> None:
    scan = ["scan", "--unit", "stage", *SMALL[:8], "--measures", "guided_mse", "--fit", fit, "--out", tmp_path / "scan"]
    assert cli(*scan)[0] == 0
    if fit == "none":
        code, out, _ = cli("search", *QUICK, "--from-scan", tmp_path / "scan", "--solve-only")
        assert code == 0
        assert "removed" in out
    take = ["search", *QUICK, "--from-scan", tmp_path / "scan"]
    assert cli(*take, "--score-fit", fit, "--out", tmp_path / "run")[0] == 0
    rows = {row["label"].partition("~")[0]: row["value"] for row in directory.read_rows(tmp_path / "scan")}
    found = [row for row in directory.read_rows(tmp_path / "run") if row["kind"] == "search" and row["source"] == "scan"]
    assert {row["tiers"][-1]["label"]: row["tiers"][-1]["value"] for row in found} == rows
    assert all(row["seconds"] == 0 for row in found)
    other, kind = ("linear", "linear fits (scan --fit linear") if fit == "none" else ("none", "")
    code, _, err = cli(*take, "--score-fit", other, "--trials", "12", "--finalists", "1", "--out", tmp_path / "other")
    assert code == 0 and f"has no guided_mse{' with ' if kind else ''}{kind}" in err


@pytest.mark.slow
def test_two_workers_share_a_search(tmp_path: Path) -> None:
    run_in_own_process("search", *QUICK, "--workers", "2", "--out", str(tmp_path / "run"))
    assert len(scored(tmp_path / "run")) == N_TRIALS
    assert _best(tmp_path / "run")["holds_budget"] == "True"


@pytest.mark.slow
def test_a_front(tmp_path: Path, cli: Cli) -> None:
    args = ["--pareto", "params", "--unit", "stage", "--trials", "14", *SMALL, *BY_ERROR, "--finalists", "1", "--score-fit", "none"]
    assert cli("search", *args, "--out", tmp_path / "run")[0] == 0
    front = json.loads((tmp_path / "run" / "pareto.json").read_text())["front"]
    shares = [point["share_of_teacher"] for point in front]
    losses = [point["score"]["value"] for point in front]
    assert shares == sorted(shares)
    assert losses == sorted(losses, reverse=True)
    assert len(front) >= 3
    assert not (tmp_path / "run" / "best.json").exists()  # among all sizes none is the best
    assert not (tmp_path / "run" / "unet-best.svg").exists()
    lines = list(csv.DictReader((tmp_path / "run" / "finalists.csv").read_text().splitlines()))
    assert [line["label"] for line in lines if line["on_front"] == "True"] == [point["label"] for point in front]
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"{len(front)} of {len(lines)} finalists are on the front" in report
    assert "best.json" not in report
    assert cli("report", tmp_path / "run", "--out", tmp_path / "page.html")[0] == 0


@pytest.mark.slow
def test_a_front_within_a_budget_has_a_best(tmp_path: Path, cli: Cli) -> None:
    args = ["--pareto", "macs", "--budget", "75%params", "--unit", "stage", "--trials", "20", *SMALL]
    assert cli("search", *args, "--out", tmp_path / "run")[0] == 0
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["cost"]["pipeline_params"] <= 0.75 * best["teacher_cost"]["pipeline_params"]
    assert json.loads((tmp_path / "run" / "pareto.json").read_text())["front"]


LATENCY = ["--budget", "90%latency", *QUICK[:2], "--trials", str(N_TRIALS), *SMALL, *BY_ERROR]


@pytest.mark.slow
def test_a_latency_budget_is_measured(tmp_path: Path, cli: Cli) -> None:
    """On a machine that slows down by half again and again, where a step takes as long as it has parameters."""
    code, out, err = cli("search", *LATENCY, "--out", tmp_path / "run")
    assert code == 0, err
    rows = directory.read_rows(tmp_path / "run")
    timed = {row["label"]: row["value"] for row in rows if row["kind"] == "timing" and row["measure"] == "latency_ratio"}
    view = search_view(directory.Stored(tmp_path / "run"))
    best = json.loads((tmp_path / "run" / "best.json").read_text())["label"]
    assert {"calibration 0", "calibration 11", "mid_block", best} <= timed.keys()
    for e in view.finals:
        truth = view.cost(e).params / view.graph.total.params
        assert timed[e.score.label] == pytest.approx(truth), e.score.label
        assert view.holds(e) == (truth <= 0.9), e.score.label
    assert timed[best] <= 0.9
    milliseconds = view.graph.total.params / 10**9
    assert view.limits["90%latency"][1] == pytest.approx(0.9 * milliseconds)
    (line,) = (x for x in out.splitlines() if x.split()[:2] == ["1", best])
    assert f"{timed[best]:.3f}" in line


def test_a_latency_budget_out_of_reach_is_said(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose steps all take the same time, whatever is removed."""
    monkeypatch.setattr(latency, "_cpu_step", lambda unet, inputs: 0.01)
    code, _, err = cli("search", *LATENCY, "--out", tmp_path / "run")
    assert code == 2
    assert "Traceback" not in err
    assert "%latency" in err
    assert not (tmp_path / "run" / "best.json").exists()
    assert not (tmp_path / "run" / "finalists.csv").exists()


@pytest.mark.slow
def test_a_second_measure_bounds_what_is_chosen(tmp_path: Path, cli: Cli) -> None:
    """The winner holds the bound on fresh seeds; one that nobody reaches is said, with what was reached."""
    args = [*QUICK[:4], "--trials", "6", *SMALL, "--n-images", "2", "--finalists", "1", "--score-fit", "none", "--out"]
    code, _, _ = cli("search", *args, tmp_path / "held", "--objective", "guided_mse,clip_score>=0.1")
    assert code == 0
    rows = [row for row in directory.read_rows(tmp_path / "held") if "tiers" in row]
    measured = [row for row in rows if row.get("bounds")]
    assert {row["kind"] for row in measured} == {"search", "final"}
    for row in measured:
        assert row["bounds"][0]["text"] == "clip_score>=0.1"
        assert row["bounds"][0]["excess"] == pytest.approx((0.1 - row["bounds"][0]["score"]["value"]) / 0.1)
    best = json.loads((tmp_path / "held" / "best.json").read_text())
    (won,) = (row for row in measured if row["kind"] == "final" and row["tiers"][-1]["label"] == best["label"])
    assert won["bounds"][0]["score"]["value"] >= 0.1
    assert "with clip_score>=0.1" in (tmp_path / "held" / "report.md").read_text()
    code, _, err = cli("search", *args, tmp_path / "missed", "--trials", "4", "--objective", "guided_mse,clip_score>=0.99")
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert re.search(r"no finalist holds the budgets and clip_score>=0.99 \(\d tried, the best clip_score is 0\.\d+\)", line)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["guided_mse", "eps_mse", "clip_score"])
def test_finalists_recover_before_the_choice(tmp_path: Path, cli: Cli, objective: str) -> None:
    few = ["--trials", "8", *SMALL, "--finalists", "1", "--score-fit", "none"]
    args = [*QUICK[:4], *few, "--objective", objective, "--recover", "1,2", "--recover-batch-size", "2"]
    code, _, err = cli("search", *args, "--out", tmp_path / "run")
    assert code == 0, err
    assert "updates, at most" in err
    rows = [row for row in directory.read_rows(tmp_path / "run") if row["kind"] == "recovered"]
    first, second = ({row["tiers"][-1]["arch"]: row["tiers"] for row in rows if row["updates"] == n} for n in (1, 2))
    final = scored(tmp_path / "run", "final")
    better = max if objective == "clip_score" else min
    values = {key: tiers[0]["value"] for key, tiers in first.items()}
    assert final.keys() == first.keys() and all(values[key] != final[key] for key in final)
    assert better(values, key=values.__getitem__) in second  # the best third goes on
    assert 0 < len(second) <= -(-len(first) // 3)
    assert all(tiers[0] == first[key][0] and tiers[1] != tiers[0] for key, tiers in second.items())
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["score_recovered"]["value"] == better(tiers[1]["value"] for tiers in second.values())
    assert "Kendall τ of the one-shot order" in (tmp_path / "run" / "report.md").read_text()
    n = len(directory.read_rows(tmp_path / "run"))
    assert cli("search", *args, "--out", tmp_path / "run")[0] == 0
    assert len(directory.read_rows(tmp_path / "run")) == n


@pytest.mark.slow
def test_a_fit_may_stand_in_for_what_goes(tmp_path: Path, cli: Cli) -> None:
    few = ["--trials", "25", *SMALL, "--finalists", "1"]
    args = [*QUICK[:4], *few, "--fit", "linear", "--objective", "eps_mse", "--recover", "1", "--recover-batch-size", "2"]
    code, _, err = cli("search", *args, "--out", tmp_path / "run")
    assert code == 0, err
    graph = trace(pretrained.configs("tiny-digits").unet, (16, 16), pretrained.configs("tiny-digits").n_tokens)
    rows = [row for row in directory.read_rows(tmp_path / "run") if row["kind"] == "search"]
    fitted = [row for row in rows if any(term.endswith("~linear") for term in row["removed"])]
    assert 0 < len(fitted) < len(rows)
    for row in rows:
        arch = graph.check(Architecture(frozenset(row["removed"])))
        assert row["costs"]["params"] == graph.cost(arch).params
        assert row["costs"]["macs_thop"] == graph.cost(arch).thop
    values = {row["removed"][0]: row["tiers"][-1]["value"] for row in rows if len(row["removed"]) == 1}
    assert values["mid_block~linear"] < values["mid_block"]
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert Architecture.from_json(best).fits
    assert best["cost"]["pipeline_params"] <= 0.75 * best["teacher_cost"]["pipeline_params"]
    before = (tmp_path / "run" / "rows.jsonl").read_bytes()
    assert cli("search", *args, "--out", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == before


def test_kept_blocks_stay(tmp_path: Path, cli: Cli) -> None:
    few = ["--trials", "12", "--finalists", "1"]
    assert cli("search", *QUICK, *few, "--keep", "mid_block,down_blocks.1.resnets.1", "--out", tmp_path / "run")[0] == 0
    for row in directory.read_rows(tmp_path / "run"):
        if row["kind"] == "search":
            arch = Architecture(frozenset(row["removed"]))
            assert "mid_block" not in arch
            assert "down_blocks.1.resnets.1" not in arch


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--budget", "plenty"], "cannot read the budget 'plenty'"),
        (["--budget", "5%params"], "the least to be had is"),
        (["--budget", "1%macs"], "GMACs for a U-Net step"),
        ([], "no budget: give --budget"),
        (["--budget", "65%params", "--objective", "vibes"], "unknown --objective 'vibes'"),
        (["--budget", "65%params", "--sampler", "cma"], "unknown --sampler 'cma'"),
        (["--budget", "65%params", "--trials", "0"], "--trials must be at least 1"),
        (["--budget", "65%params", "--workers", "0"], "--workers must be at least 1"),
        (["--budget", "65%params", "--finalists", "0"], "--finalists must be at least 1"),
        (["--budget", "65%params", "--random", "-1"], "--random must be at least 0"),
        (["--budget", "65%params", "--recover", "0"], "--recover must be at least 1"),
        (["--budget", "65%params", "--recover", "50,20"], "--recover must rise from each number of updates to the next: got 50,20"),
        (["--budget", "65%params", "--recover", "50,fast"], "--recover"),
        (["--budget", "65%params", "--scope", "all"], "unknown --scope 'all'"),
        (["--budget", "65%params", "--macs", "flops"], "unknown --macs"),
        (["--budget", "65%params", "--unit", "brick"], "unknown unit 'brick'"),
        (["--budget", "65%params", "--unit", "layer", "--keep", "*attentions*,mid_block"], "nothing is left to remove"),
        (["--budget", "65%params", "--keep", "mid_blok"], "did you mean mid_block"),
        (["--budget", "75%params", "--arch", "up_blocks.1.resnets.1"], "--arch up_blocks.1.resnets.1 exceeds 75%params by"),
        (["--budget", "75%params", "--arch", "bk-sdm-tiny,mid_blok"], "did you mean mid_block"),
        (["--budget", "75%params", "--keep", "mid_block", "--arch", "bk-sdm-tiny,down_blocks.0.resnets.0"], "what --keep"),
        (["--pareto", "beauty"], "unknown --pareto 'beauty'"),
        (["--budget", "65%params", "--from-scan", "/nowhere"], "is not a run directory"),
        (["--budget", "65%params", "--solve-only", "--from-scan", "/nowhere"], "is not a run directory"),
        (["--budget", "65%params", "--solve-only", "--from-scan", "x", "--arch", "bk-sdm-tiny"], "leave out one of them"),
        (["--budget", "65%params", "--workers", "2", "--storage", "sqlite:///x.db"], "SQLite lets two workers take one trial"),
        (["--budget", "65%params", "--storage", "postgresql://u:secret@127.0.0.1:1/db"], "cannot open the storage"),
        (["--budget", "65%params", "--storage", "nonsense"], "cannot open the storage (could not parse)"),
        (["--budget", "65%params", "--model", "sd-v1-4"], "download"),
        (["--budget", "65%params", "--objective", "fid", "--reference", "/nowhere"], "no reference at '/nowhere'"),
    ],
)
def test_bad_options(one_line: Callable[..., str], tmp_path: Path, args: list[str], says: str) -> None:
    line = one_line("search", *args, "--out", tmp_path / "run")
    assert says in line
    assert "secret" not in line
    assert not (tmp_path / "run").exists()


def test_another_protocol_in_the_same_directory(searched: Path, one_line: Callable[..., str]) -> None:
    line = one_line("search", *QUICK, "--eps-samples", "16", "--out", searched)
    assert "eps_samples is 4 there, 16 asked" in line


def test_a_scan_of_another_protocol(searched: Path, one_line: Callable[..., str], tmp_path: Path) -> None:
    line = one_line("search", *QUICK, "--eps-samples", "16", "--from-scan", searched, "--out", tmp_path / "run")
    assert "of another protocol (eps_samples is 4 there, 16 asked)" in line


def test_a_measure_without_its_judge(one_line: Callable[..., str], cli: Cli, tiny_folder: Callable[[str], Path]) -> None:
    assert cli("graph", "--model", tiny_folder("sd1"))[0] == 0
    line = one_line("search", "--model", tiny_folder("sd1"), "--budget", "80%params", "--objective", "fid")
    assert "needs a reference: give --reference" in line


@pytest.mark.parametrize("kind", [pytest.param("sd1-v", marks=pytest.mark.slow), "sdxl"])
def test_other_families(cli: Cli, tiny_folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    args = ["--model", tiny_folder(kind), "--unit", "pair", "--budget", "80%params", "--trials", "5", *SMALL]
    code, out, err = cli("search", *args, "--out", tmp_path / "run")
    assert code == 0, err
    assert "best.json" in out


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The URL of a server of its own on loopback; skipped where Debian's postgresql is not installed."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    home = tmp_path_factory.mktemp("postgresql")
    home.chmod(0o777)
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(home, "postgres")
        for parent in home.parents[:3]:
            parent.chmod(parent.stat().st_mode | 0o055)

    def run(tool: str, *args: str) -> None:
        subprocess.run([*as_user, str(binaries[-1] / tool), *args], check=True, capture_output=True, timeout=120)

    run("initdb", "-D", str(home / "data"), "-A", "trust", "-U", "me")
    port = 20000 + os.getpid() % 20000
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={home}"
    run("pg_ctl", "-D", str(home / "data"), "-o", options, "-l", str(home / "log"), "-w", "start")
    try:
        yield f"postgresql://me@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", str(home / "data"), "-m", "immediate", "stop")


@pytest.mark.slow
def test_workers_on_postgresql_two_of_them_killed(postgresql: str, searched: Path, tmp_path: Path) -> None:
    """Two hosts of two workers each, as one shared search over the same candidates; two workers die in mid-trial."""
    rows = [row for row in directory.read_rows(searched) if row["kind"] == "search"]
    n = str(len([row for row in rows if row["source"] in ("scan", "exact", "preset")]))
    args = [
        "--unit",
        "stage",
        "--budget",
        "75%params",
        "--trials",
        n,
        *SMALL,
        *BY_ERROR,
        "--study-name",
        "shared",
        "--storage",
        postgresql,
    ]
    command = [sys.executable, "-m", "blockprune", "search", *args, "--workers", "2"]
    outs = [tmp_path / "host-a", tmp_path / "host-b"]
    hosts = [subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for out in outs]
    for host, out in zip(hosts, outs, strict=True):
        while host.poll() is None and len(directory.read_rows(out) if (out / "run.json").exists() else []) < 2:
            time.sleep(0.05)
        victim = next(iter(workers_of(host.pid)), None)
        assert victim, host.communicate()[0]
        os.kill(victim, signal.SIGKILL)
    texts = [host.communicate(timeout=600)[0].decode() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], texts
    assert all("died" in text for text in texts)
    found = scored(outs[0])
    assert len(found) == int(n)
    assert found == scored(outs[1])
    planned = {Architecture(frozenset(row["removed"])).key for row in rows if row["source"] in ("scan", "preset")}
    assert planned <= found.keys()
    alone = {key: value for key, value in scored(searched).items() if key in found}
    assert len(alone) >= int(n) - 1  # a trial less is an exact solution less; a proposal takes its place
    assert {key: found[key] for key in alone} == pytest.approx(alone)
    assert min(alone, key=alone.__getitem__) == min(alone, key=found.__getitem__)
