"""`blockprune evaluate` as a user runs it: killed, shared, over grids, on checkpoints and exports; one clear line for bad input."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from as_user import pictures, run
from common_fixtures import Cli
from PIL import Image
from safetensors.numpy import load_file
from small_evaluation import QUICK, SLUG, N, scores, teacher_config, values
from stand_ins import save_pytorch_fid

from blockprune.assets import ASSETS
from blockprune.data import image_folder
from blockprune.data.image_files import file_bytes
from blockprune.measures import detectors, fid_kid
from blockprune.measures.fid_kid import Stats
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.presets import parse, preset
from blockprune.model.trace import trace
from blockprune.runs import directory
from blockprune.stages.evaluate.protocol import read_protocol

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small evaluation of the built-in model, left undisturbed."""
    out = tmp_path_factory.mktemp("evaluate") / "run"
    run("evaluate", *QUICK, "--out", str(out))
    return out


def indices(folder: Path, slug: str = SLUG) -> list[int]:
    """The image numbers of all parts."""
    parts = [p for p in (folder / "parts" / slug).glob("*.safetensors") if not p.name.startswith(".")]
    return sorted(i for part in parts for i in load_file(part)["index"].tolist())


def test_outputs_are_all_there(evaluated: Path) -> None:
    assert {"run.json", "rows.jsonl", "evaluate.csv", "evaluate.json", "images", "parts", "drawn"} <= {
        p.name for p in evaluated.iterdir()
    }
    found = scores(evaluated)
    label = "CFG 3, 2 steps"
    assert set(found) == {(label, m) for m in ("fid", "kid", "is", "clip_score", "weight_bytes")}
    for measure in ("fid", "kid", "is", "clip_score"):
        row = found[label, measure]
        assert (row["n"], row["label"], row["arch"]) == (N, "tiny-digits", Architecture().key)
        assert row["low"] < row["value"] < row["high"]
    assert indices(evaluated) == list(range(N))
    assert [p.name for p in sorted((evaluated / "drawn" / SLUG).iterdir())] == [f"{i:06d}.png" for i in range(N)]
    with Image.open(evaluated / "images" / f"{SLUG}.png") as strip:
        assert strip.size == (6 * 32, 32)
    (row,) = csv.DictReader((evaluated / "evaluate.csv").read_text().splitlines())
    assert (row["model"], row["setting"], float(row["fid"])) == ("tiny-digits", label, found[label, "fid"]["value"])
    view = json.loads((evaluated / "evaluate.json").read_text())
    assert view["settings"][0]["scores"]["fid"]["value"] == found[label, "fid"]["value"]


def test_run_json_says_what_a_report_needs(evaluated: Path) -> None:
    said = directory.read_run(evaluated)
    assert (said["command"], said["label"], said["model"], said["teacher"], said["arch"]) == (
        "evaluate",
        "tiny-digits",
        "tiny-digits",
        "",
        [],
    )
    assert BlockGraph.from_json(said["graph"]).total.params == 2_280_884
    assert said["outside_params"] == 138_688 + 97_667
    protocol = said["protocol"]
    assert len(protocol["hash"]) == 12
    named = {"name": "clean", "n_images": N, "seed": 0, "image": "png", "resize": 0, "fid": "clean", "latent": [16, 16]}
    named |= {"detector": "tiny-digits", "clip": "tiny-digits", "device_type": "cpu", "dtype": "float32"}
    assert {name: protocol[name] for name in named} == named
    assert {"reference", "n_reference", "prompts"} <= protocol.keys()
    (setting,) = said["settings"]
    assert setting == {
        "label": "CFG 3, 2 steps", "steps": 2, "cfg_scale": 3.0, "scheduler": "dpm++", "quantize": "", "checkpoint": None
    }  # fmt: skip
    assert len(said["pictured_prompts"]) == 6


def test_scores_are_those_of_the_files(evaluated: Path) -> None:
    files = sorted((evaluated / "drawn" / SLUG).iterdir())
    images = torch.stack([image_folder.read_image(f) for f in files])
    detector = detectors.load_detector("tiny-digits")
    found, probs = detector.features_and_probs(images)
    reference = image_folder.read_reference(detectors.BUILT_IN / "reference.npz", detector)
    seen = {m: row["value"] for (_, m), row in scores(evaluated).items()}
    assert seen["fid"] == pytest.approx(fid_kid.fid(found, reference), rel=1e-4)
    assert seen["kid"] == pytest.approx(fid_kid.kid(found, reference.features), rel=1e-4)
    assert seen["is"] == pytest.approx(fid_kid.inception_score(probs), rel=1e-5)
    assert seen["weight_bytes"] == 4 * 2_280_884


def test_same_command_again_adds_nothing(evaluated: Path, cli: Cli) -> None:
    before = {p: p.stat().st_mtime_ns for p in (evaluated / "drawn").rglob("*")}, (evaluated / "rows.jsonl").read_bytes()
    code, out, _ = cli("evaluate", *QUICK, "--out", evaluated)
    assert code == 0
    assert "CFG 3, 2 steps" in out
    assert before == ({p: p.stat().st_mtime_ns for p in (evaluated / "drawn").rglob("*")}, (evaluated / "rows.jsonl").read_bytes())


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_scores(evaluated: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blockprune", "evaluate", *QUICK, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "run").glob("drawn/*/0*.png"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("drawn/*/0*.png")}
    assert len(first) >= 3
    run("evaluate", *QUICK, "--out", str(tmp_path / "run"))
    assert values(tmp_path / "run") == values(evaluated)
    assert all(p.stat().st_mtime_ns == at for p, at in first.items()), "an image on disk was drawn again"
    for file in (evaluated / "drawn" / SLUG).iterdir():
        assert (tmp_path / "run" / "drawn" / SLUG / file.name).read_bytes() == file.read_bytes()


WATCHED = """
import os, sys
from blockprune.runs import directory
from blockprune.cli import main
real = directory.Run.write
def write(self, name, content):
    if name.startswith("drawn/"):
        with open(sys.argv[1], "a") as log:
            log.write(f"{os.getpid()} {name}\\n")
    return real(self, name, content)
directory.Run.write = write
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_processes_share_a_run_and_draw_no_image_twice(tmp_path: Path, evaluated: Path) -> None:
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "log"), "evaluate", *QUICK, "--out", str(tmp_path / "run")]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert sorted(line.split()[1] for line in lines) == [f"drawn/{SLUG}/{i:06d}.png" for i in range(N)]
    assert indices(tmp_path / "run") == list(range(N))
    assert all("CFG 3, 2 steps" in out for out, _ in outputs)
    assert values(tmp_path / "run") == values(evaluated)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_batch_size_changes_no_score(evaluated: Path, tmp_path: Path, cli: Cli, batch_size: int) -> None:
    code, _, err = cli("evaluate", *QUICK[:-1], batch_size, "--no-save-images", "--seed", "0", "--out", tmp_path / "run")
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith("warning: FID of 6 images with 64 features")]
    for key, (value, *_) in values(tmp_path / "run").items():  # rounding, by batch size, turns some pixels by a grey level
        assert value == pytest.approx(values(evaluated)[key][0], rel=1e-3), key
    assert directory.read_run(tmp_path / "run")["protocol"] == directory.read_run(evaluated)["protocol"]


def test_images_may_stay_in_memory(tmp_path: Path, cli: Cli) -> None:
    args = ["--n-images", "8", "--steps", "1", "--batch-size", "4", "--measures", "clip_score"]
    assert cli("evaluate", *args, "--no-save-images", "--out", tmp_path / "run")[0] == 0
    assert len(list((tmp_path / "run" / "drawn").rglob("*.png"))) == 6  # those of the pictures
    assert indices(tmp_path / "run", "cfg-3-1-steps") == list(range(8))
    assert set(load_file(tmp_path / "run" / "parts" / "cfg-3-1-steps" / "000000.safetensors")) == {"image", "text", "index"}


def test_a_copied_protocol_stores_small_jpegs(evaluated: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "mine.toml").write_text('image = "jpeg"\nresize = 24\nmeasures = ["fid", "clip_score"]\n')
    code, _, err = cli("evaluate", *QUICK, "--protocol", tmp_path / "mine.toml", "--out", tmp_path / "run")
    assert code == 0, err
    files = sorted((tmp_path / "run" / "drawn" / SLUG).iterdir())
    for ours, whole in zip(files, sorted((evaluated / "drawn" / SLUG).iterdir()), strict=True):
        assert ours.read_bytes() == file_bytes(image_folder.read_image(whole), read_protocol(str(tmp_path / "mine.toml")))
    protocol = directory.read_run(tmp_path / "run")["protocol"]
    assert (protocol["name"], protocol["image"], protocol["resize"]) == ("mine", "jpeg, quality 75", 24)
    assert protocol["hash"] != directory.read_run(evaluated)["protocol"]["hash"]


def test_grids_of_settings_have_one_protocol(evaluated: Path, tmp_path: Path, cli: Cli) -> None:
    grid = [
        "--steps",
        "1",
        "--steps",
        "2",
        "--cfg-scale",
        "1.5,3",
        "--scheduler",
        "dpm++",
        "--quantize",
        "none",
        "--quantize",
        "int8",
    ]
    args = ["--n-images", str(N), "--batch-size", "6", "--measures", "clip_score,is", *grid, "--latency", "--rounds", "3"]
    code, out, err = cli("evaluate", *args, "--out", tmp_path / "run")
    assert code == 0, err
    found = scores(tmp_path / "run")
    labels = {label for label, _ in found}
    assert len(labels) == len(list((tmp_path / "run" / "images").iterdir())) == 8
    assert "CFG 1.5, 1 steps, dpm++" in out
    assert len({found[label, "clip_score"]["value"] for label in labels}) > 4
    full, small = (found[f"CFG 3, 2 steps, dpm++{end}", "weight_bytes"]["value"] for end in ("", ", int8"))
    assert small < 0.8 * full
    assert all({(label, m) for m in ("latency", "latency_ratio", "memory")} <= found.keys() for label in labels)
    assert found["CFG 3, 2 steps, dpm++", "latency_ratio"]["value"] == pytest.approx(1, abs=0.5)
    said = directory.read_run(tmp_path / "run")
    assert said["settings"][-1]["quantize"] == "int8"
    same = {k: v for k, v in said["protocol"].items() if k not in ("hash", "reference", "n_reference")}
    assert same == {k: v for k, v in directory.read_run(evaluated)["protocol"].items() if k in same}
    first, again = scores(evaluated)["CFG 3, 2 steps", "clip_score"], found["CFG 3, 2 steps, dpm++", "clip_score"]
    assert again["value"] == pytest.approx(first["value"], rel=1e-3)  # drawn again: rounding turns some pixels by a grey level


@pytest.mark.slow
def test_components_stand_side_by_side(tmp_path: Path, cli: Cli) -> None:
    quick = ["--n-images", "2", "--steps", "2", "--measures", "clip_score"]
    args = ["--arch", "bk-sdm-small", *quick, "--components", "--rounds", "3"]
    code, out, err = cli("evaluate", *args, "--out", tmp_path / "run")
    assert code == 0, err
    rows = {(r["who"], r["name"]): r for r in directory.read_rows(tmp_path / "run") if r["kind"] == "component"}
    names = ["text encoder", "U-Net x 1", "U-Net x 2", "VAE decoder", "whole"]
    assert set(rows) == {(who, name) for who in ("teacher", "student") for name in names}
    graph = trace(teacher_config(), n_tokens=BlockGraph.from_json(directory.read_run(tmp_path / "run")["graph"]).n_tokens)
    for who, cost in (("teacher", graph.total), ("student", graph.cost(preset("bk-sdm-small")))):
        one, many, whole = (rows[who, name] for name in ("U-Net x 1", "U-Net x 2", "whole"))
        assert (one["params"], one["macs"]["thop"], many["macs"]["thop"]) == (cost.params, cost.thop, 2 * cost.thop)
        assert whole["macs"]["with_attention"] > many["macs"]["with_attention"]
        assert set(one["macs"]) == {"thop", "conv_linear", "with_attention"}
        assert min(row["latency_s"] for row in (one, many, whole)) > 0
    assert re.search(r"MACs \(thop\) +teacher +student", out)
    said = directory.read_run(tmp_path / "run")
    assert (said["label"], said["teacher"]) == ("tiny-digits without bk-sdm-small", "tiny-digits")
    assert said["arch"] == list(preset("bk-sdm-small"))
    again = cli("evaluate", *args, "--out", tmp_path / "run")
    assert again[0] == 0
    assert len([r for r in directory.read_rows(tmp_path / "run") if r["kind"] == "component"]) == 10


@pytest.mark.slow
def test_maps_are_fitted_before_the_images(tmp_path: Path, cli: Cli) -> None:
    """In place of the blocks of a design: the weights that they cost, and images nearer to the teacher's."""
    kept, drawn = {}, {}
    for arch in ("full", "bk-sdm-small", "bk-sdm-small~linear"):
        args = ["--arch", arch, "--n-images", "4", "--steps", "2", "--measures", "clip_score", "--out", tmp_path / arch]
        code, _, err = cli("evaluate", *args)
        assert code == 0, err
        kept[arch] = scores(tmp_path / arch)["CFG 3, 2 steps", "weight_bytes"]["value"]
        files = sorted((tmp_path / arch / "drawn" / SLUG).glob("*.png"))
        drawn[arch] = np.stack([np.asarray(Image.open(file), dtype=np.float64) for file in files])
    graph = BlockGraph.from_json(directory.read_run(tmp_path / "bk-sdm-small")["graph"])
    more = graph.cost(parse("bk-sdm-small~linear", graph)) - graph.cost(preset("bk-sdm-small"))
    assert kept["bk-sdm-small~linear"] - kept["bk-sdm-small"] == 4 * more.params > 0
    plain, fitted = (np.square(drawn[arch] - drawn["full"]).mean() for arch in ("bk-sdm-small", "bk-sdm-small~linear"))
    assert fitted < 0.9 * plain


def coco(folder: Path, n: int) -> Path:
    """A folder laid out as the COCO protocol wants it, of pictures of several shapes."""
    for i in range(n):
        pictures(folder / "val2014", 1, 40 + 4 * i)
        (folder / "val2014" / "000.png").rename(folder / "val2014" / f"{i}.png")
        with Image.open(folder / "val2014" / f"{i}.png") as image:
            image.crop((0, 0, 40, 40 + 4 * i)).save(folder / "val2014" / f"{i}.jpg")
        (folder / "val2014" / f"{i}.png").unlink()
    lines = [f"{i}.jpg,bold upright: {word} top left" for i, word in enumerate(("one", "two", "three", "four", "five"))]
    (folder / "metadata.csv").write_text("file_name,text\n" + "\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_the_coco_protocol_in_miniature(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small numbers in a copy of the file; JPEG, resizing, pytorch-fid's Inception and the split score as in the original."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = (ASSETS / "protocols" / "bksdm-coco30k.toml").read_text()
    small = {"n_images = 30000": "n_images = 4", "n_reference = 40504": "n_reference = 5", "is_splits = 10": "is_splits = 2"}
    small |= {"resize = 256": "resize = 24", "steps = 25": "steps = 1", 'resolution = "512"': 'resolution = "32"'}
    for old, new in small.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "mini.toml").write_text(text)
    save_pytorch_fid(tmp_path / "weights.pth")
    folder = coco(tmp_path / "coco", 5)
    args = ["--protocol", tmp_path / "mini.toml", "--reference", folder, "--clip", "tiny-digits"]
    code, _, err = cli(
        "evaluate", *args, "--inception-weights", tmp_path / "weights.pth", "--batch-size", "4", "--out", tmp_path / "run"
    )
    assert code == 0, err
    protocol = directory.read_run(tmp_path / "run")["protocol"]
    assert (protocol["fid"], protocol["detector"], protocol["n_reference"], protocol["is_splits"]) == (
        "legacy_pytorch",
        "pytorch-fid",
        5,
        2,
    )
    detector = detectors.load_detector("pytorch-fid", weights=tmp_path / "weights.pth")
    real = []
    for i in range(5):
        with Image.open(folder / "val2014" / f"{i}.jpg") as image:
            image.resize((24, 24)).save(tmp_path / "small.jpg")
        real.append(image_folder.read_image(tmp_path / "small.jpg"))
    drawn = [image_folder.read_image(f) for f in sorted((tmp_path / "run" / "drawn" / "cfg-7.5-1-steps").glob("*.jpg"))]
    found, probs = detector.features_and_probs(torch.stack(drawn))
    seen = {m: row["value"] for (_, m), row in scores(tmp_path / "run").items()}
    assert seen["fid"] == pytest.approx(fid_kid.fid(found, Stats.of(detector(torch.stack(real)))), rel=1e-3)
    assert seen["is"] == pytest.approx(fid_kid.inception_score(probs, 2), rel=1e-4)
    assert np.isfinite(seen["clip_score"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--protocol", "nope"], "no protocol 'nope': choose from bksdm-coco30k, clean"),
        (["--n-images", "0"], "n-images must be at least 1"),
        (["--n-images", "1"], "need at least 2 images: got --n-images 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--steps", "two"], "--steps takes whole numbers"),
        (["--cfg-scale", "3,x"], "--cfg-scale takes numbers"),
        (["--cfg-scale", "-1"], "cfg-scale must be at least 0"),
        (["--scheduler", "x"], "unknown --scheduler 'x': choose from ddim"),
        (["--scheduler", "ddim,"], "--scheduler has an empty entry"),
        (["--quantize", "int3"], "unknown --quantize 'int3': choose from none, int8"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--latency", "--rounds", "1"], "--rounds must be at least 3"),
        (["--measures", "fid,eps_mse"], "evaluate does not measure 'eps_mse'"),
        (["--measures", ""], "--measures is empty"),
        (["--model", "no-such-model"], "no model 'no-such-model'"),
        (["--model", "SD1"], "measure 'fid' needs a reference: give --reference"),
        (["--model", "SD1", "--measures", "clip_score"], "measure 'clip_score' needs a scorer: give --clip"),
        (["--reference", "/nowhere"], "no reference at '/nowhere'"),
        (["--detector", "pytorch-fid"], "the detector is 'inception': got 'pytorch-fid'"),
        (["--arch", "mid_blok"], "did you mean mid_block"),
        (["--checkpoints", "/nowhere"], "is not a run directory"),
        (["--protocol", "bksdm-coco30k"], "DIR/val2014/ with 40504 images and DIR/metadata.csv"),
        (["--protocol", "bksdm-coco30k", "--reference", "COCO"], "has 3 images: this protocol takes --reference DIR"),
        (["--protocol", "bksdm-coco30k", "--reference", "EMPTY"], "has 0 images: this protocol takes --reference DIR"),
        (["--protocol", "bksdm-coco30k", "--reference", "NPZ", "--prompts", "CSV"], "each of 30,000 images: got 5 prompts"),
        (["--protocol", "MINE"], "unknown key 'imgae'"),
        (["--detector", "DINO", "--reference", "COCO"], "DINO"),
    ],
)
def test_bad_options(
    one_line: Callable[..., str],
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    args: list[str],
    says: str,
) -> None:
    (tmp_path / "mine.toml").write_text("imgae = 'png'")
    stand_ins: dict[str, Callable[[], Any]] = {
        "SD1": lambda: tiny_folder("sd1"),
        "COCO": lambda: coco(tmp_path / "coco", 3),
        "EMPTY": lambda: tmp_path,
        "CSV": lambda: coco(tmp_path / "coco", 1) / "metadata.csv",
        "NPZ": lambda: detectors.BUILT_IN / "reference.npz",
        "MINE": lambda: tmp_path / "mine.toml",
    }
    given = [stand_ins[a]() if a in stand_ins else a for a in args]
    assert says in one_line("evaluate", *given, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_request_in_the_same_directory(evaluated: Path, one_line: Callable[..., str]) -> None:
    assert "holds a run of 'evaluate'" in one_line("evaluate", "--checkpoints", evaluated)
    assert "settings is" in one_line("evaluate", *QUICK, "--cfg-scale", "5", "--out", evaluated)
    assert "protocol is" in one_line("evaluate", *QUICK, "--seed", "5", "--out", evaluated)
    assert "holds a evaluate run" in one_line("scan", "--arch", "mid_block", *QUICK, "--eps-samples", "2", "--out", evaluated)


def test_a_broken_model_is_a_failed_row(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.break_mid(monkeypatch)
    args = ["--arch", "mid_block", "--n-images", "2", "--steps", "1", "--measures", "clip_score", "--out", tmp_path / "run"]
    for _ in range(2):
        code, out, _ = cli("evaluate", *args)
        assert code == 0
        assert "not finite" in out
    row = scores(tmp_path / "run")["CFG 3, 1 steps", "clip_score"]
    assert row["value"] is None
    assert "not finite" in row["error"]
