"""`blockprune scan` and `stats` as a user runs them: outputs, resuming after a kill, and one clear line for bad input."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from as_user import pictures, run, workers_of
from common_fixtures import Cli

from blockprune.measures import fid_kid
from blockprune.model.sampling import MAX_SEED
from blockprune.reports.figures import tradeoff
from blockprune.reports.scans import scan_view
from blockprune.runs import directory
from blockprune.stages.search.proposals import SAMPLERS, sampler_of
from blockprune.stages.search.run import scores_in

SHAPE = ["--n-images", "4", "--steps", "2", "--eps-samples", "4", "--batch-size", "4"]
MEASURED = "params,macs,eps_mse,guided_mse,fid,kid,is,clip_score,feature_distance"  # not what is timed, for it takes longest
QUICK = ["--unit", "stage", *SHAPE, "--measures", MEASURED]
IMAGES = "eps_mse,fid,clip_score,params"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows, without the numbers that are timings."""
    return [r for r in directory.read_rows(folder) if not r["measure"].startswith(("latency", "memory"))]


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small scan of the built-in model with every measure but those of a step, left undisturbed."""
    out = tmp_path_factory.mktemp("scan") / "run"
    run("scan", *QUICK, "--out", out)
    return out


def test_outputs_are_all_there(scanned: Path) -> None:
    names = {p.name for p in scanned.iterdir()}
    assert {"run.json", "rows.jsonl", "scan.csv", "scan.json", "report.md", "unet.svg", "grid.png", "tradeoff.svg"} <= names
    table = list(csv.DictReader((scanned / "scan.csv").read_text().splitlines()))
    data = json.loads((scanned / "scan.json").read_text())
    assert [row["label"] for row in table] == [row["label"] for row in data["ranking"]]
    assert table[0]["label"] == "full"
    assert len(table) == 11
    assert all(row["fid"] and row["clip_score"] and row["kid"] and row["is"] for row in table)
    assert "unet.svg" in (scanned / "report.md").read_text()


@pytest.mark.slow
def test_all_that_can_be_measured_is_where_nothing_is_named(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("scan", "--arch", "mid_block", *SHAPE, "--out", tmp_path / "run")
    assert code == 0, err
    rows = {row["measure"]: row for row in directory.read_rows(tmp_path / "run") if row["label"] == "mid_block"}
    assert rows.keys() >= {"latency_ratio", "memory", *MEASURED.split(",")}
    assert rows["memory"]["value"] > 4 * rows["params"]["value"]


def test_same_command_again_adds_nothing(scanned: Path, cli: Cli) -> None:
    before = (scanned / "rows.jsonl").read_bytes()
    code, out, _ = cli("scan", *QUICK, "--out", scanned)
    assert code == 0
    assert "mid_block" in out
    assert (scanned / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_rows(scanned: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blockprune", "scan", *QUICK, "--out", str(tmp_path / "run")]
    for n_rows in (24, 60):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(directory.read_rows(tmp_path / "run")) < n_rows:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run("scan", *QUICK, "--out", str(tmp_path / "run"))
    assert rows_of(tmp_path / "run") == rows_of(scanned)


@pytest.mark.slow
def test_workers_share_a_scan_two_of_them_killed(scanned: Path, tmp_path: Path) -> None:
    """Two workers of three die at their work; the third takes over, and the rows are those of a single process, within rounding."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "blockprune", "scan", *QUICK, "--workers", "3", "--out", str(out)]
    scan = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while scan.poll() is None and not any(out.glob("parts/*/*.safetensors")):
        time.sleep(0.05)
    for victim in workers_of(scan.pid)[:2]:
        os.kill(victim, signal.SIGKILL)
    text, _ = scan.communicate(timeout=1200)
    assert scan.returncode == 0, text
    assert text.count("others take over its work") == 2
    ours, theirs = ({(r["label"], r["measure"]): r for r in rows_of(folder)} for folder in (out, scanned))
    assert len(ours) == len(rows_of(out))
    assert ours.keys() == theirs.keys()
    for key, row in theirs.items():
        assert ours[key]["value"] == pytest.approx(row["value"], rel=1e-3, abs=1e-6), key
        assert ours[key]["n"] == row["n"]


def test_a_raced_scan_says_so_and_a_search_takes_none_of_its_scores(cli: Cli, one_line: Callable[..., str], tmp_path: Path) -> None:
    """A removal that draws clean digits and one that draws noise are told apart by the first images."""
    measured = ["--racing", "feature_distance", "--measures", "feature_distance,clip_score"]
    args = ["--arch", "mid_block.resnets.1", "--arch", "up_blocks.3.resnets.2", "--n-images", "16", "--steps", "2", *measured]
    code, _, err = cli("scan", *args, "--out", tmp_path / "run")
    assert code == 0, err
    n = {(row["label"], row["measure"]): row["n"] for row in directory.read_rows(tmp_path / "run")}
    assert set(n.values()) == {8, 16}
    assert {label for (label, _), images in n.items() if images == 16} == {"full"}
    assert "Removals got images as long as their rank by feature" in (tmp_path / "run" / "report.md").read_text()
    searched = ["--budget", "75%params", "--objective", "feature_distance", "--n-images", "16", "--steps", "2"]
    line = one_line("search", *searched, "--from-scan", tmp_path / "run", "--out", tmp_path / "search")
    assert "was raced, so its feature_distance is not of all images: scan without --racing" in line


def test_another_protocol_in_the_same_directory(scanned: Path, one_line: Callable[..., str]) -> None:
    changed = [*QUICK, "--batch-size", "2", "--cfg-scale", "5.5", "--out", scanned]
    line = one_line("scan", *changed)
    assert "cfg_scale is" in line
    assert "5.5 asked" in line
    assert "batch" not in line


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        ("mid_blok", "did you mean mid_block"),
        ("ssd-1b", "preset 'ssd-1b' is for another U-Net"),
        ("down_blocks.0.downsamplers.0", "changes the resolution"),
        ("-conv_in", "no path around it"),
        ("mid_block,+mid_block", "removes nothing"),
        ("nowhere.json", "no architecture file"),
    ],
)
def test_bad_architectures(one_line: Callable[..., str], tmp_path: Path, arch: str, says: str) -> None:
    assert says in one_line("scan", "--arch", arch, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--measures", "fidd"], "unknown measure 'fidd'"),
        (["--unit", "blok"], "unknown --unit 'blok'"),
        (["--scheduler", "x"], "unknown --scheduler 'x'"),
        (["--n-images", "0"], "n-images must be at least 1"),
        (["--device", "cuda:99"], "device"),
        (["--dtype", "int3"], "unknown --dtype"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "sd-v2-1"], "download"),
        (["--reference", "/nowhere"], "no reference at '/nowhere'"),
        (["--clip", "/nowhere"], "/nowhere"),
        (["--detector", "inception"], "--inception-weights"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--resolution", "33"], "multiple of"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--racing", "vibes"], "unknown measure 'vibes'"),
        (["--racing", "fid"], "--racing cannot go by fid: choose from kid, feature_distance, clip_score"),
        (["--racing", "eps_mse"], "--racing cannot go by eps_mse"),
        (["--racing", "kid", "--measures", "kid,fid"], "measure 'fid' is biased by the number of images"),
        (["--racing", "kid", "--measures", "clip_score"], "--racing kid goes by what is measured: add kid to --measures"),
    ],
)
def test_bad_options(one_line: Callable[..., str], tmp_path: Path, args: list[str], says: str) -> None:
    assert says in one_line("scan", *args, "--out", tmp_path / "run")


def test_prompts_file_without_prompts(one_line: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n  \n")
    assert "p.txt" in one_line("scan", "--prompts", tmp_path / "p.txt")


def test_missing_and_corrupt_weights(one_line: Callable[..., str], tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("sd1"), tmp_path / "m")
    weights = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "diffusion_pytorch_model.safetensors" in one_line("scan", "--model", tmp_path / "m")
    weights.unlink()
    assert "unet" in one_line("scan", "--model", tmp_path / "m")


def test_unreadable_reference_images_are_counted(cli: Cli, one_line: Callable[..., str], tmp_path: Path) -> None:
    folder = pictures(tmp_path / "real", 20)
    whole = (folder / "000.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    code, out, _ = cli("stats", folder, tmp_path / "real.npz", "--detector", "tiny-digits")
    assert code == 0
    assert "20 images, 2 unreadable images skipped" in out
    for i in range(15):
        (folder / f"bad-{i}.png").write_bytes(b"not an image")
    assert "more than 10 images" in one_line("scan", "--reference", folder, "--detector", "tiny-digits")


@pytest.mark.slow
def test_stats_of_a_folder_are_a_reference(cli: Cli, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "real", 12)
    assert cli("stats", folder, tmp_path / "real.npz", "--detector", "tiny-digits")[0] == 0
    scores = []
    for reference in (folder, tmp_path / "real.npz"):
        out = tmp_path / f"run-{reference.suffix or 'dir'}"
        args = ["--arch", "mid_block", "--measures", "fid,kid", *SHAPE, "--detector", "tiny-digits"]
        assert cli("scan", *args, "--reference", reference, "--out", out)[0] == 0
        scores.append([(r["label"], r["measure"], round(r["value"], 4)) for r in rows_of(out)])
    assert scores[0] == scores[1]
    assert len(scores[0]) == 4


def test_prompts_in_a_file_and_an_architecture_in_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\none\ntwo\n")
    (tmp_path / "mine.json").write_text('{"format": 1, "removed": ["mid_block"]}')
    args = ["--arch", tmp_path / "mine.json", "--arch", "bk-sdm-small,+mid_block", "--prompts", tmp_path / "p.csv"]
    assert cli("scan", *args, *SHAPE, "--measures", "eps_mse,params", "--out", tmp_path / "run")[0] == 0
    assert {r["label"] for r in rows_of(tmp_path / "run")} == {"full", "mine", "bk-sdm-small,+mid_block"}


@pytest.mark.slow
def test_fits_stand_beside_what_they_are_fitted_for(cli: Cli, tmp_path: Path) -> None:
    command = ["scan", "--arch", "mid_block", "--arch", "up_blocks.3.resnets.2", "--fit", "none,channel,linear"]
    command += ["--measures", "eps_mse,clip_score", *SHAPE, "--eps-samples", "16", "--out", str(tmp_path / "run")]
    assert cli(*command)[0] == 0
    rows = rows_of(tmp_path / "run")
    errors = {row["label"]: row["value"] for row in rows if row["measure"] == "eps_mse"}
    assert set(errors) == {f"{name}{fit}" for name in ("mid_block", "up_blocks.3.resnets.2") for fit in ("", "~channel", "~linear")}
    assert errors["up_blocks.3.resnets.2~linear"] < errors["up_blocks.3.resnets.2"] / 2
    archs = json.loads((tmp_path / "run" / "run.json").read_text())["archs"]
    assert archs["mid_block~linear"] == ["mid_block~linear"]
    ranking = {row["label"]: row for row in json.loads((tmp_path / "run" / "scan.json").read_text())["ranking"]}
    assert ranking["mid_block~channel"]["params"] == ranking["mid_block"]["params"] + 2 * 64
    assert ranking["mid_block~linear"]["params"] == ranking["mid_block"]["params"] + 64 * 64 + 64
    before = (tmp_path / "run" / "rows.jsonl").read_bytes()
    assert cli(*command)[0] == 0 and (tmp_path / "run" / "rows.jsonl").read_bytes() == before
    assert {label for label, _, _ in scores_in(tmp_path / "run", "eps_mse")} == set(errors)  # a search takes those that it scores


def test_around_a_base_and_by_timestep(cli: Cli, tmp_path: Path) -> None:
    """Differences are paired, restored and removed blocks are named, and every number by timestep is a mean of sample errors."""
    shape = ["--unit", "pair", "--measures", "eps_mse,guided_mse", "--eps-samples", "16", "--batch-size", "8", "--by-timestep"]
    command = ["scan", "--base", "bk-sdm-small", *shape, "--out", tmp_path / "run"]
    code, _, err = cli(*command)
    assert code == 0, err
    ranking = {row["label"]: row for row in json.loads((tmp_path / "run" / "scan.json").read_text())["ranking"]}
    base = ranking["bk-sdm-small"]
    assert {label[0] for label in ranking if label not in ("full", "bk-sdm-small")} == {"+", "-"}
    for label, row in ranking.items():
        if label[0] in "+-":
            assert (row["params"] > base["params"]) == (label[0] == "+")
    rows = {(r["label"], r["measure"]): r for r in directory.read_rows(tmp_path / "run")}
    for label in ("+down_blocks.3.pair.1", "-innermost"):
        row, of_base = rows[label, "guided_mse"], rows["bk-sdm-small", "guided_mse"]
        assert row["delta"] == pytest.approx(row["value"] - of_base["value"])
        assert row["delta_low"] < row["delta"] < row["delta_high"]
        assert row["delta_high"] - row["delta_low"] < row["high"] - row["low"]  # what both share cancels
    assert rows["bk-sdm-small", "eps_mse"]["delta"] == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The next to go from `bk-sdm-small`" in report
    put_back = report.split("Worth most to put back into `bk-sdm-small`")[1].split("\n")[0]
    assert put_back.split("`")[3] == min((r for r in ranking if r[0] == "+"), key=lambda r: ranking[r]["guided_mse"])
    table = list(csv.DictReader((tmp_path / "run" / "timesteps.csv").read_text().splitlines()))
    for measure in ("eps_mse", "guided_mse"):
        means = [float(r["mean"]) for r in table if r["label"] == "bk-sdm-small" and r["measure"] == measure]
        assert len(means) == 10
        assert min(means) < base[measure] < max(means)
    edges = [(int(r["from_timestep"]), int(r["to_timestep"])) for r in table[:10]]
    assert all(a <= b < c for (a, b), (c, _) in pairwise(edges))
    assert (tmp_path / "run" / "timesteps.png").stat().st_size > 1000
    before = (tmp_path / "run" / "rows.jsonl").read_bytes()
    assert cli(*command)[0] == 0 and (tmp_path / "run" / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_around_a_base_with_fits(cli: Cli, tmp_path: Path) -> None:
    shape = ["--unit", "stage", "--measures", "eps_mse", "--eps-samples", "8", "--batch-size", "8", "--fit", "linear"]
    assert cli("scan", "--base", "bk-sdm-small", *shape, "--out", tmp_path / "run")[0] == 0
    rows = {r["label"]: r for r in directory.read_rows(tmp_path / "run") if r["measure"] == "eps_mse"}
    base, other = rows["bk-sdm-small~linear"], rows["+mid_block~linear"]
    assert other["delta"] == pytest.approx(other["value"] - base["value"])
    assert "Worth most to put back into `bk-sdm-small~linear`" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--base", "bk-sdm-huge"], "no preset or block 'bk-sdm-huge'"),
        (["--base", "bk-sdm-small", "--arch", "bk-sdm-base"], "--base bk-sdm-small and --arch bk-sdm-base: give one of them"),
        (["--by-timestep", "--measures", "fid"], "--by-timestep shows eps_mse and guided_mse: got --measures fid"),
    ],
)
def test_a_base_that_is_none(args: list[str], says: str, one_line: Callable[..., str], tmp_path: Path) -> None:
    assert says in one_line("scan", *args, "--out", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1-v", "sd2", "sdxl"])
def test_other_families(cli: Cli, tiny_folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    args = ["--model", tiny_folder(kind), "--unit", "stage", *SHAPE, "--out", tmp_path / "run", "--measures", IMAGES]
    reference = pictures(tmp_path / "real", 8, 16)
    code, out, err = cli("scan", *args, "--detector", "tiny-digits", "--clip", "tiny-digits", "--reference", reference)
    assert code == 0, err
    assert "mid_block" in out


def test_a_full_disk_loses_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["scan", "--arch", "mid_block", *SHAPE, "--measures", IMAGES, "--out", tmp_path / "run"]
    real, written = os.write, []

    def write(fd: int, data: bytes) -> int:
        written.append(fd)
        if len(written) > 3:
            real(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(directory.os, "write", write)
        code, _, err = cli(*args)
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("error")] == [
        "error: the disk is full: free some space and run the same command again"
    ]
    assert len(directory.read_rows(tmp_path / "run")) == 3
    assert cli(*args)[0] == 0
    assert len(directory.read_rows(tmp_path / "run")) == 7


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['blockprune', 'scan', '--help']\nfrom blockprune.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--cfg-scale" in result.stdout


def test_nan_images_are_failed_rows_and_the_scan_goes_on(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.break_mid(monkeypatch)
    args = ["--arch", "mid_block", "--arch", "up_blocks.1.attentions.0", *SHAPE, "--measures", "eps_mse,fid"]
    assert cli("scan", *args, "--out", tmp_path / "run")[0] == 0
    values = {(r["label"], r["measure"]): r for r in rows_of(tmp_path / "run")}
    assert "not finite" in values["mid_block", "fid"]["error"]
    assert values["mid_block", "eps_mse"]["value"] is None
    assert values["up_blocks.1.attentions.0", "fid"]["value"] > 0


def test_a_removals_latency_is_the_ratio_that_was_timed_in_turn(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that slows down by half again and again, whatever a user reads is the ratio, and seconds are the teacher's."""
    tiny.drifting_clock(monkeypatch)
    out, page = tmp_path / "run", tmp_path / "page.html"
    code, shown, err = cli("scan", "--unit", "stage", "--measures", "eps_mse,latency", *SHAPE, "--out", out)
    assert code == 0, err
    view = scan_view(directory.Stored(out))
    truth = {label: view.graph.cost(arch).params / view.graph.total.params for label, arch in view.archs.items()}
    del truth["full"]
    for row in csv.DictReader((out / "scan.csv").read_text().splitlines()):
        assert float(row["latency_ratio"] or 0) == pytest.approx(truth.get(row["label"], 0)), row["label"]
        assert bool(row["latency"]) == (row["label"] == "full")
    for row in json.loads((out / "scan.json").read_text())["ranking"][1:]:
        assert row["latency_ratio"] == pytest.approx(truth[row["label"]])
        assert row["latency"] is None
    milliseconds = f"{view.graph.total.params / 10**6:.3g} ms"
    for text in (shown, (out / "report.md").read_text()):
        assert text.count(" ms") == text.count(milliseconds) == 1
        for label, ratio in truth.items():
            (line,) = (line for line in text.splitlines() if re.match(rf"\W*\d+\W+{re.escape(label)}\W* ", line))
            assert f" {ratio:.3f} [" in line, label
    assert "Not measured" not in (out / "report.md").read_text()
    assert cli("report", out, "--out", page)[0] == 0
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert [bool(r["latency_s"]) for r in results] == [not r["removed"] for r in results]
    assert {r["model"].removeprefix("without "): r["latency_ratio"] for r in results[1:]} == pytest.approx(truth)
    cells = re.findall(r"<td[^>]*>\s*([^<]*)", page.read_text())
    assert all(f"{ratio:.3f}" in {c.strip() for c in cells} for ratio in truth.values())
    drawn = {round(mark.x, 6) for mark in tradeoff(view, "eps_mse").plots[2].marks}
    assert drawn == {round(100 * (1 - ratio), 6) for ratio in truth.values()}


def test_seconds_of_students_in_runs_of_earlier_versions_are_not_shown(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.drifting_clock(monkeypatch)
    args = ["--arch", "mid_block", "--measures", "latency", *SHAPE, "--out", tmp_path / "run"]
    assert cli("scan", *args)[0] == 0
    (row,) = (r for r in directory.read_rows(tmp_path / "run") if r["label"] == "mid_block")
    with (tmp_path / "run" / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row | {"measure": "latency", "value": 7.0}) + "\n")
    view = scan_view(directory.Stored(tmp_path / "run"))
    assert view.value("mid_block", "latency") is None
    assert view.value("mid_block", "latency_ratio") == pytest.approx(row["value"])


@pytest.mark.slow
def test_the_largest_seed_is_one_for_every_generator(cli: Cli, tmp_path: Path) -> None:
    args = [
        "--arch",
        "mid_block",
        "--n-images",
        "3",
        "--steps",
        "2",
        "--scheduler",
        "ddpm",
        "--eps-samples",
        "2",
        "--batch-size",
        "2",
    ]
    code, _, err = cli("scan", *args, "--seed", MAX_SEED, "--out", tmp_path / "run")
    assert code == 0, err
    for name in SAMPLERS:
        sampler_of(name, MAX_SEED + 10**9)
    features = np.random.default_rng(0).normal(size=(8, 3))
    fid_kid.kid(features, features, n_subsets=2, subset_size=4, seed=MAX_SEED)
