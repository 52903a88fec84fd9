"""`blockprune distill` as a user runs it: from a search to a pipeline, killed and resumed, and one clear line for bad input."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from as_user import run
from common_fixtures import Cli
from diffusers import StableDiffusionPipeline

import blockprune
from blockprune import load_pipeline
from blockprune.data import encoded
from blockprune.data.training_data import Reader, source_of
from blockprune.model.architecture import Architecture
from blockprune.model.surgery import architecture_of, skeleton
from blockprune.runs import directory
from blockprune.stages.train import checkpoints

QUICK = ["--train-batch-size", "2", "--n-images", "4", "--steps", "1", "--max-train-steps", "6", "--checkpointing-steps", "2"]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the built-in model, left undisturbed."""
    out = tmp_path_factory.mktemp("distill") / "run"
    run("distill", "--arch", "bk-sdm-small", *QUICK, "--ema", "--validation-steps", "4", "--out", str(out))
    return out


def losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [(row["step"], row["losses"]) for row in directory.read_rows(folder) if row["kind"] == "train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "student" / "pruned_unet.safetensors")


def test_outputs_are_all_there(distilled: Path) -> None:
    names = {p.name for p in distilled.iterdir()}
    assert {"run.json", "rows.jsonl", "checkpoints", "student", "pipeline", "card.json", "losses.svg", "validation.svg"} <= names
    assert sorted(p.name for p in (distilled / "checkpoints").iterdir()) == [f"step-000000{i}" for i in (2, 4, 6)]
    rows = directory.read_rows(distilled)
    assert [step for step, _ in losses(distilled)] == list(range(1, 7))
    assert {"loss", "task", "output", "feature", "feature/down_blocks.0"} <= set(losses(distilled)[0][1])
    validated = {(row["step"], row["score"]["measure"]) for row in rows if row["kind"] == "validation"}
    assert {(4, "fid"), (4, "clip_score"), (6, "fid"), (6, "is")} <= validated
    assert len(list((distilled / "images").iterdir())) == 2
    card = (distilled / "pipeline" / "README.md").read_text()
    assert "tiny-digits" in card
    assert "mid_block" in card


def test_the_pipeline_is_stock_and_draws(distilled: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(distilled / "pipeline", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("bold upright: three top left", num_inference_steps=2).images[0].size == (32, 32)
    assert sum(p.numel() for p in pipe.unet.parameters()) < 1_300_000


def test_same_command_again_changes_nothing(distilled: Path, cli: Cli) -> None:
    before = (distilled / "rows.jsonl").read_bytes()
    args = ["distill", "--arch", "bk-sdm-small", *QUICK, "--ema", "--validation-steps", "4", "--out", distilled]
    code, out, _ = cli(*args)
    assert code == 0
    assert "already" in out
    assert (distilled / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_and_started_again_is_the_undisturbed_run(distilled: Path, tmp_path: Path) -> None:
    args = ["--arch", "bk-sdm-small", *QUICK, "--ema", "--validation-steps", "4", "--out", str(tmp_path / "run")]
    for n_rows in (1, 4):
        command = [sys.executable, "-m", "blockprune", "distill", *args]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(directory.read_rows(tmp_path / "run")) < n_rows:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run("distill", *args)
    assert losses(tmp_path / "run") == losses(distilled)
    ours, theirs = weights(tmp_path / "run"), weights(distilled)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(distilled: Path, tmp_path: Path) -> None:
    shared = [x if x != "2" or QUICK[i - 1] != "--train-batch-size" else "1" for i, x in enumerate(QUICK)]
    args = [
        "--arch",
        "bk-sdm-small",
        *shared,
        "--ema",
        "--validation-steps",
        "4",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # accelerate's own is for GPUs or MPI
    command = [sys.executable, *launch, "-m", "blockprune", "distill", *args]
    out = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-2000:]
    for (step, one), (same, two) in zip(losses(distilled), losses(tmp_path / "run"), strict=True):
        assert step == same
        assert two == pytest.approx(one, rel=1e-4)
    whole = weights(distilled)
    for name, w in weights(tmp_path / "run").items():
        assert w.sub(whole[name]).abs().max() < 1e-4, name


@pytest.mark.slow
def test_killed_after_the_last_update_the_run_still_ends(distilled: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(distilled, tmp_path / "run")
    for name in ("pipeline", "student"):
        shutil.rmtree(tmp_path / "run" / name)
    args = ["distill", "--arch", "bk-sdm-small", *QUICK, "--ema", "--validation-steps", "4", "--out", tmp_path / "run"]
    assert cli(*args)[0] == 0
    assert directory.read_rows(tmp_path / "run") == directory.read_rows(distilled)
    ours, theirs = weights(tmp_path / "run"), weights(distilled)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert (tmp_path / "run" / "pipeline").is_dir()


def test_a_torn_checkpoint_falls_back(distilled: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(distilled, tmp_path / "run")
    for name in ("pipeline", "student"):
        shutil.rmtree(tmp_path / "run" / name)
    file = tmp_path / "run" / "checkpoints" / "step-0000006" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    args = ["distill", "--arch", "bk-sdm-small", *QUICK, "--ema", "--validation-steps", "4", "--out", tmp_path / "run"]
    code, _, err = cli(*args)
    assert code == 0, err
    assert "step-0000006" in err
    assert "going back" in err
    assert losses(tmp_path / "run") == losses(distilled)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(distilled: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["distill", "--arch", "bk-sdm-small", *QUICK, "--ema", "--validation-steps", "4", "--out", tmp_path / "run"]
    real = checkpoints.save_file

    def save(tensors: Any, path: Path) -> None:
        if "step-0000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", save)
        code, _, err = cli(*args)
    assert code == 2
    assert "error: the disk is full" in err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]
    assert cli(*args)[0] == 0
    assert losses(tmp_path / "run") == losses(distilled)


@pytest.mark.slow
@pytest.mark.usefixtures("drifting_clock")
def test_from_scan_to_pipeline(tmp_path: Path, cli: Cli) -> None:
    """The whole path in miniature, as the README shows it."""
    small = ["--n-images", "4", "--steps", "2", "--eps-samples", "8", "--batch-size", "8"]
    assert cli("scan", "--unit", "stage", *small, "--measures", "guided_mse", "--out", tmp_path / "scan")[0] == 0
    search = ["--unit", "stage", "--budget", "75%params", "--trials", "12", *small, "--from-scan", tmp_path / "scan"]
    assert cli("search", *search, "--final-factor", "1", "--finalists", "1", "--out", tmp_path / "search")[0] == 0
    best = tmp_path / "search" / "best.json"
    code, _, err = cli("distill", "--arch", best, *QUICK, "--max-train-steps", "2", "--out", tmp_path / "distill")
    assert code == 0, err
    pipe = load_pipeline(tmp_path / "distill" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    arch = Architecture.from_json(json.loads(best.read_text()))
    assert len(arch) > 0
    assert pipe("thin upright: one top left", num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.slow
def test_training_starts_from_what_is_fitted(tmp_path: Path, cli: Cli) -> None:
    command = ["distill", "--arch", "bk-sdm-small", *QUICK, "--max-train-steps", "2"]
    assert cli(*command, "--out", tmp_path / "plain")[0] == 0
    assert cli(*command, "--fit", "linear", "--out", tmp_path / "fitted")[0] == 0
    first = {name: losses(tmp_path / name)[0][1] for name in ("plain", "fitted")}
    assert first["fitted"]["output"] < first["plain"]["output"] / 2
    found = weights(tmp_path / "fitted")
    assert {key for key in found if ".fit." in key} and found.keys() > weights(tmp_path / "plain").keys()
    pipe = load_pipeline(tmp_path / "fitted" / "pipeline")
    assert {kind for _, kind in architecture_of(pipe.unet).fits} == {"linear"}
    before = (tmp_path / "fitted" / "rows.jsonl").read_bytes()
    assert cli(*command, "--fit", "linear", "--out", tmp_path / "fitted")[0] == 0
    assert (tmp_path / "fitted" / "rows.jsonl").read_bytes() == before


def test_phases_remove_more_and_change_the_teacher(tmp_path: Path, cli: Cli, tiny_folder: Callable[[str], Path]) -> None:
    first, second = tiny_folder("sd1"), tmp_path / "other"
    shutil.copytree(first, second)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'taps = "layers"\n[[phases]]\nsteps = 2\narch = "bk-sdm-base"\n[[phases]]\nteacher = "{second}"\n')
    data = _folder(tmp_path / "data", 6)
    args = ["--teacher", first, "--recipe", recipe, "--data", data, *QUICK, "--random-flip", "--out", tmp_path / "run"]
    code, _, err = cli("distill", "--arch", "bk-sdm-small", *args)
    assert code == 0, err
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 7))
    phases = json.loads((tmp_path / "run" / "run.json").read_text())["asked"]["phases"]
    assert [(p["first"], p["last"]) for p in phases] == [(0, 2), (2, 6)]
    tapped = [{k for k in terms if k.startswith("feature/mid_block")} for _, terms in losses(tmp_path / "run")]
    assert tapped[0]
    assert not tapped[-1]


def _folder(folder: Path, n: int) -> Path:
    """A folder of `n` pictures with BK-SDM's metadata.csv."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,picture number {i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_a_cache_trains_as_the_images_do(tmp_path: Path, cli: Cli, tiny_folder: Callable[[str], Path]) -> None:
    model, data = tiny_folder("sd1"), _folder(tmp_path / "data", 5)
    assert cli("cache", "--model", model, "--data", data, "--out", tmp_path / "cache")[0] == 0
    rows = []
    for source in (data, tmp_path / "cache"):
        out = tmp_path / f"run-{source.name}"
        args = ["--arch", "mid-removed", "--teacher", model, "--data", source, *QUICK, "--max-train-steps", "3", "--out", out]
        code, _, err = cli("distill", *args)
        assert code == 0, err
        rows.append(losses(out))
    for (_, live), (_, cached) in zip(*rows, strict=True):
        assert cached == pytest.approx(live, rel=1e-4)


@pytest.mark.slow
def test_a_teacher_is_trained_on_its_own_data_or_on_what_is_given(
    tmp_path: Path, cli: Cli, one_line: Callable[..., str], tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_folder("sd1"), tmp_path / "model"))
    distil = [
        "distill",
        "--arch",
        "mid-removed",
        "--teacher",
        model,
        *QUICK[:6],
        "--max-train-steps",
        "1",
        "--out",
        tmp_path / "run",
    ]
    search = ["search", "--model", model, "--budget", "90%params", "--recover", "1", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("blockprune.model.pretrained.load", lambda *args: pytest.fail("the model is loaded first"))
        for command, option in ((distil, "--data"), (search, "--train-data"), (["cache", "--model", model], "--data")):
            line = one_line(*command)
            assert f"no training data, and {str(model)!r} has none of its own: give {option}" in line
    assert not (tmp_path / "run").exists()
    _folder(model / "pictures", 5)
    (model / "blockprune.json").write_text('{"data": "pictures"}')
    code, _, err = cli(*distil)
    assert code == 0, err
    ours = Reader(source_of(str(model / "pictures"), 16)).source.identity
    assert json.loads((tmp_path / "run" / "run.json").read_text())["asked"]["data"] == encoded.identity_of_pairs(ours, 16)


def test_a_diverging_run_stops_with_one_line(tmp_path: Path, one_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from blockprune.stages.train.distill import Distiller

    real = Distiller._optimise

    def broken(self: Any) -> dict[str, float]:
        return real(self) | ({"loss": math.nan} if self.step == 3 else {})

    monkeypatch.setattr(Distiller, "_optimise", broken)
    monkeypatch.setattr("blockprune.progress.Bars.say", lambda *a: None)
    line = one_line("distill", "--arch", "mid-removed", *QUICK, "--out", tmp_path / "run")
    assert "the loss is nan at step 4" in line
    assert "step-0000002" in line


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--arch", "mid_blok"], "did you mean mid_block"),
        (["--arch", "nowhere.json"], "no architecture file"),
        (["--arch", "mid-removed", "--recipe", "nope"], "no recipe 'nope'"),
        (["--arch", "mid-removed", "--data", "/nowhere"], "/nowhere"),
        (["--arch", "mid-removed", "--teacher", "no-such-model"], "no-such-model"),
        (["--arch", "mid-removed", "--max-train-steps", "0"], "--max-train-steps must be at least 1"),
        (["--arch", "mid-removed", "--train-batch-size", "0"], "--train-batch-size must be at least 1"),
        (["--arch", "mid-removed", "--validation-steps", "0"], "--validation-steps must be at least 1"),
        (["--arch", "mid-removed", "--learning-rate", "-1"], "--learning-rate must be above 0"),
        (["--arch", "mid-removed", "--mixed-precision", "fp8"], "unknown --mixed-precision 'fp8'"),
        (["--arch", "mid-removed", "--report-to", "paper"], "unknown --report-to 'paper'"),
        (["--arch", "mid-removed", "--resolution", "33"], "multiple of"),
        (["--arch", "mid-removed", "--device", "meta"], "give cpu or cuda"),
        (["--arch", "mid-removed", "--device", "cpu", "--mixed-precision", "fp16"], "--mixed-precision fp16 on a processor"),
        ([], "no architecture: give --arch"),
    ],
)
def test_bad_options(one_line: Callable[..., str], tmp_path: Path, args: list[str], says: str) -> None:
    assert says in one_line("distill", *args, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_weights_that_cannot_be_put_together(
    one_line: Callable[..., str], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    monkeypatch.setattr(Accelerator, "is_fsdp2", False)
    assert "FSDP 2: got " + kind in one_line(
        "distill", "--arch", "bk-sdm-small", *QUICK, "--device", "cpu", "--out", tmp_path / "run"
    )


def test_the_fsdp_configuration_is_one() -> None:
    file = Path(__file__).parents[2] / "studies" / "fsdp-sdxl.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type == "FSDP"
    layers = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    unet = skeleton(
        json.loads((Path(blockprune.__file__).parent / "assets/configs/sdxl/unet/config.json").read_text()), Architecture()
    )
    assert set(layers) < {type(module).__name__ for module in unet.modules()}


@pytest.mark.slow
def test_trackers_hear_the_losses(tmp_path: Path, cli: Cli, one_line: Callable[..., str]) -> None:
    args = ["distill", "--arch", "mid-removed", *QUICK[:6], "--max-train-steps", "2", "--out", tmp_path / "run"]
    assert cli(*args, "--report-to", "tensorboard")[0] == 0
    assert list((tmp_path / "run").rglob("events*"))
    assert "needs its package: pip install wandb" in one_line(*args, "--report-to", "wandb")


def test_another_recipe_in_the_same_directory(distilled: Path, one_line: Callable[..., str]) -> None:
    line = one_line("distill", "--arch", "bk-sdm-small", *QUICK, "--ema", "--learning-rate", "1", "--out", distilled)
    assert "recipe is" in line


def test_training_pairs_are_the_models_own_or_named(
    tmp_path: Path, one_line: Callable[..., str], tiny_folder: Callable[[str], Path]
) -> None:
    line = one_line("distill", "--arch", "mid-removed", "--teacher", tiny_folder("sd1"), *QUICK, "--out", tmp_path / "run")
    assert "no training data" in line and "give --data" in line
    assert not (tmp_path / "run").exists()


def test_phases_that_do_not_add_up(tmp_path: Path, one_line: Callable[..., str]) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[[phases]]\nsteps = 2\n[[phases]]\nsteps = 3\n")
    assert "does not match the recipe's phases" in one_line("distill", "--arch", "mid-removed", "--recipe", recipe, *QUICK)
    recipe.write_text('[[phases]]\nsteps = 2\narch = "bk-sdm-base"\n[[phases]]\n')
    line = one_line("distill", "--arch", "mid_block", "--recipe", recipe, *QUICK)
    assert "phase 2 puts back" in line
