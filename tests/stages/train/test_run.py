"""`bp.distill` as a notebook calls it: with a loaded pipeline, any dataset, in memory or to a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image

import blockprune as bp
from blockprune.errors import UserError
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.model import Model, load_model
from blockprune.model.presets import preset
from blockprune.stages.train.recover import Recovery
from blockprune.stages.train.samples import provider_of

QUICK: dict[str, Any] = {"steps": 2, "train_batch_size": 2, "n_images": 2, "denoising_steps": 1, "progress": bp.Silent()}
PAIRS = [(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8), f"picture number {i}") for i in range(5)]


@pytest.fixture
def pipe(tiny_folder: Callable[[str], Path]) -> Any:
    return pretrained.load(str(tiny_folder("sd1")))


def state(pipe: Any) -> dict[str, Any]:
    """All that a pipeline has that training could change: weights, precision, memory layout, modes, hooks."""
    found: dict[str, Any] = {"unet": pipe.unet}
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(pipe, name)
        for key, p in part.named_parameters():
            found[f"{name}.{key}"] = (p.dtype, p.device, p.stride(), p.requires_grad, p.detach().double().sum().item())
        for key, module in part.named_modules():
            found[f"{name}.{key}()"] = (id(module), module.training, len(module._forward_hooks))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_pipeline_stays_as_it_was_and_nothing_is_written(
    pipe: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe.to(dtype)
    pipe.vae.train()
    pipe.unet.conv_in.weight.requires_grad_(True)
    before = state(pipe)
    trained = bp.distill(pipe, preset("bk-sdm-small"), data=PAIRS, mixed_precision="bf16", **QUICK)
    assert state(pipe) == before
    assert not os.listdir(tmp_path)
    assert [row.step for row in trained.rows] == [1, 2]
    assert trained.student.dtype == torch.float32 and trained.pipeline.unet.dtype == dtype
    assert trained.pipeline is not pipe and trained.pipeline.vae is pipe.vae
    assert trained.pipeline("a picture", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


def test_a_pipeline_is_left_alone_by_a_run_that_is_stopped(pipe: Any) -> None:
    class Stop(bp.Silent):
        def tick(self, step: str, n: int) -> None:
            raise KeyboardInterrupt

    before = state(pipe)
    with pytest.raises(KeyboardInterrupt):
        bp.distill(pipe, "mid-removed", data=PAIRS, **QUICK | {"progress": Stop()})
    assert state(pipe) == before


def test_a_name_and_a_loaded_pipeline_train_alike(pipe: Any, tiny_folder: Callable[[str], Path]) -> None:
    by_name = bp.distill(tiny_folder("sd1"), "mid-removed", data=PAIRS, **QUICK)
    loaded = bp.distill(pipe, "mid-removed", data=PAIRS, **QUICK)
    for one, two in zip(by_name.rows, loaded.rows, strict=True):
        assert two.losses == pytest.approx(dict(one.losses), rel=1e-4)


@pytest.mark.slow
def test_a_dataset_a_folder_and_a_cache_train_alike(
    pipe: Any, tmp_path: Path, cli: Any, tiny_folder: Callable[[str], Path]
) -> None:
    (tmp_path / "data").mkdir()
    for i, (pixels, _) in enumerate(PAIRS):
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
    lines = [f"{i}.png,{caption}" for i, (_, caption) in enumerate(PAIRS)]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    args = ["cache", "--model", tiny_folder("sd1"), "--data", tmp_path / "data", "--out", tmp_path / "cache"]
    assert cli(*args)[0] == 0
    runs = [bp.distill(pipe, "mid-removed", data=data, **QUICK) for data in (PAIRS, tmp_path / "data", tmp_path / "cache")]
    for run in runs[1:]:
        for one, two in zip(runs[0].rows, run.rows, strict=True):
            assert two.losses == pytest.approx(dict(one.losses), rel=1e-4)


def test_a_result_is_drawn_and_saved(pipe: Any, tmp_path: Path) -> None:
    trained = bp.distill(pipe, "mid-removed", data=PAIRS, **QUICK)
    assert trained.figure().startswith("<svg")
    with pytest.raises(UserError, match="no figure 'nope' here: choose from losses"):
        trained.figure("nope")
    said = trained.save(tmp_path / "out")
    assert "any diffusers loads it" in said
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"card.json", "losses.svg", "pipeline"}
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline", safety_checker=None)
    ours = trained.student.state_dict()
    assert sum(p.numel() for p in again.unet.parameters()) == sum(p.numel() for p in ours.values())
    assert "already" in trained.save(tmp_path / "out")


def test_a_run_in_a_directory_goes_on_from_its_checkpoint(pipe: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {**QUICK, "steps": 4, "checkpointing_steps": 2, "data": PAIRS}
    whole = bp.distill(pipe, "mid-removed", **how)

    class Stop(bp.Silent):
        n = 0

        def tick(self, step: str, n: int) -> None:
            self.n += 1
            if self.n == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bp.distill(pipe, "mid-removed", out=tmp_path / "run", **how | {"progress": Stop()})
    resumed = bp.distill(pipe, "mid-removed", out=tmp_path / "run", **how)
    assert [row.step for row in resumed.rows] == [1, 2, 3, 4]
    for one, two in zip(whole.rows, resumed.rows, strict=True):
        assert two.losses == pytest.approx(dict(one.losses), rel=1e-4)
    done = bp.distill(pipe, "mid-removed", out=tmp_path / "run", **how)
    ours, theirs = done.student.state_dict(), resumed.student.state_dict()
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())


@pytest.mark.slow
def test_precision_may_change_from_call_to_call_and_others_accelerators_stay(pipe: Any) -> None:
    mine = Accelerator(cpu=True, gradient_accumulation_steps=3)
    for precision in ("no", "bf16"):
        bp.distill(pipe, "mid-removed", data=PAIRS, mixed_precision=precision, gradient_accumulation_steps=2, **QUICK)
    assert mine.mixed_precision == "no" and mine.gradient_accumulation_steps == 3


def test_what_contradicts_itself(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two teachers"):
        bp.distill(pipe, "mid-removed", teacher=("tiny-digits",))
    with pytest.raises(UserError, match="give --out"):
        bp.distill(pipe, "mid-removed", data=PAIRS, report_to="tensorboard", **QUICK)
    with pytest.raises(UserError, match="no architecture"):
        bp.distill(pipe, data=PAIRS)
    with pytest.raises(UserError, match="no training data"):
        bp.distill(pipe, "mid-removed", **QUICK)


@pytest.mark.slow
def test_a_recovery_trains_each_finalist_alike_and_leaves_the_model(tiny_folder: Callable[[str], Path]) -> None:
    model: Model = load_model(str(tiny_folder("sd1")))
    before = state(model.pipe)
    recovery = Recovery(model, "digits", 2, seed=0)
    one, two = (recovery.student(preset("bk-sdm-small"), 2) for _ in range(2))
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    start = model.network.state_dict()
    assert any(not torch.equal(t, start[name]) for name, t in one.state_dict().items())
    assert state(model.pipe) == before
    assert recovery.student(Architecture(), 1).state_dict().keys() == start.keys()


def test_a_recovery_goes_on_exactly_from_its_checkpoint(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model: Model = load_model(str(tiny_folder("sd1")))
    arch, other = preset("bk-sdm-small"), preset("bk-sdm-base")
    whole = Recovery(model, "digits", 2, seed=0).student(arch, 5).state_dict()
    Recovery(model, "digits", 2, 0, tmp_path).student(arch, 2)
    again = Recovery(model, "digits", 2, 0, tmp_path)
    assert all(torch.equal(t, whole[name]) for name, t in again.student(arch, 5).state_dict().items())
    assert [path.name for path in (tmp_path / arch.key).iterdir()] == ["step-0000005"]
    again.student(other, 1)
    again.keep([other])
    assert [path.name for path in tmp_path.iterdir()] == [other.key]
    assert again.seconds() > 0


def test_a_model_without_data_of_its_own_needs_some(tiny_folder: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_folder("sd1")))
    with pytest.raises(UserError, match="give --train-data"):
        Recovery(model, None, 1, 0).student(preset("bk-sdm-small"), 1)
    assert len(provider_of(model, PAIRS)) == len(PAIRS)
