"""`blockprune evaluate --task img2img` as a user runs it: paired with the teacher, killed, shared; one clear line for bad input."""

from __future__ import annotations

import csv
import functools
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common_fixtures import Cli
from PIL import Image
from rich.console import Console

import blockprune as bp
from blockprune.cli import main
from blockprune.cli.console import print_evaluation
from blockprune.data import image_folder
from blockprune.data.digits import DigitScenes, caption, exchanged
from blockprune.measures import detectors, fid_kid
from blockprune.model import families
from blockprune.reports.evaluations import evaluation_view
from blockprune.runs import directory
from blockprune.stages.evaluate import run as evaluate_run
from blockprune.stages.evaluate import subject
from blockprune.stages.evaluate.inputs import inputs_of
from blockprune.stages.evaluate.plan import plan_of
from blockprune.stages.evaluate.request import EvaluateRequest

N = 4
QUICK = ["--task", "img2img", "--strength", "0.25,0.75", "--n-images", str(N), "--steps", "4", "--batch-size", "2"]
LABELS = ("strength 0.25, CFG 3, 4 steps", "strength 0.75, CFG 3, 4 steps")
SLUGS = ("strength-0.25-cfg-3-4-steps", "strength-0.75-cfg-3-4-steps")
OneLine = Callable[..., str]


def scenes(folder: Path, n: int = N + 1) -> Path:
    """A folder of digit scenes, each with a caption that says another digit in one place."""
    folder.mkdir()
    lines = ["file_name,text"]
    for i, (image, _, labels) in enumerate(DigitScenes("held-out", 3, n)):
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append(f'{i}.png,"{caption(exchanged(labels, i)[0])}"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def evaluate(*args: str | Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *map(str, args)])
    assert left.value.code == 0


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Models and judges are loaded once for all commands here, which leave them as they were."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((subject, "load_model"), (detectors, "load_detector"), (detectors, "load_scorer")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def student(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edits by a student, with those of its teacher, left undisturbed."""
    out = tmp_path_factory.mktemp("student") / "run"
    evaluate(*QUICK, "--data", data, "--arch", "bk-sdm-small", "--out", out)
    return out


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the teacher."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    evaluate(*QUICK, "--data", data, "--out", out)
    return out


def scores(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(setting, measure) => its row; each must be there once."""
    rows = [r for r in directory.read_rows(folder, "evaluate") if r["kind"] == "score"]
    found = {(r["setting"], r["measure"]): r for r in rows}
    assert len(found) == len(rows)
    return found


def assert_same_scores(one: Path, other: Path, rel: float) -> None:
    """`rel`: images drawn in other batches differ by rounding, which turns some pixels by a grey level."""
    ours, theirs = scores(one), scores(other)
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert row["value"] == pytest.approx(theirs[key]["value"], rel=rel), key


def drawn(folder: Path, slug: str) -> torch.Tensor:
    return torch.stack([image_folder.read_image(file) for file in sorted((folder / "drawn" / slug).glob("*.png"))])


def test_scores_are_those_of_the_files(student: Path, data: Path) -> None:
    found = scores(student)
    assert set(found) == {(label, m) for label in LABELS for m in ("feature_distance", "clip_score", "input_l1", "weight_bytes")}
    inputs = torch.stack([image_folder.read_image(data / f"{i}.png") for i in range(N)])
    features = detectors.load_detector("tiny-digits")
    for label, slug in zip(LABELS, SLUGS, strict=True):
        ours, theirs = drawn(student, slug), drawn(student, f"teacher-{slug}")
        assert len(ours) == len(theirs) == N
        distances = fid_kid.feature_distance(features(ours), features(theirs))
        assert found[label, "feature_distance"]["value"] == pytest.approx(distances.mean(), rel=1e-4)
        assert distances.min() > 0
        l1 = (ours.double() - inputs.double()).abs().mean() / 255
        assert found[label, "input_l1"]["value"] == pytest.approx(float(l1), rel=1e-9)
        of_teacher = (theirs.double() - inputs.double()).abs().mean() / 255
        assert found[label, "input_l1"]["delta"] == pytest.approx(float(l1 - of_teacher), rel=1e-6)
        assert found[label, "clip_score"]["delta_low"] <= found[label, "clip_score"]["delta"]
    stays = [found[label, "input_l1"]["value"] for label in LABELS]
    assert 0 < stays[0] < stays[1], "more strength, less of the input"


def test_the_run_says_how_and_shows_all(student: Path, data: Path) -> None:
    about = directory.read_run(student)
    assert (about["protocol"]["task"], about["protocol"]["strength"]) == ("img2img", [0.25, 0.75])
    assert [s["strength"] for s in about["settings"]] == [0.25, 0.75]
    with (data / "metadata.csv").open() as file:
        assert about["pictured_prompts"] == [row["text"] for row in csv.DictReader(file)][:N]
    strips = {"inputs.png", *(f"{kind}{slug}.png" for kind in ("", "teacher-") for slug in SLUGS)}
    assert {p.name for p in (student / "images").iterdir()} == strips
    with Image.open(student / "images" / "inputs.png") as strip:
        assert strip.size == (N * 32, 32)
    rows = list(csv.DictReader((student / "evaluate.csv").read_text().splitlines()))
    assert [float(row["strength"]) for row in rows] == [0.25, 0.75]
    view = json.loads((student / "evaluate.json").read_text())
    assert view["settings"][0]["scores"]["clip_score"]["delta"] == scores(student)[LABELS[0], "clip_score"]["delta"]


def test_the_hash_is_over_task_strength_and_inputs(student: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    quick = {"n_images": 2, "steps": (4,), "measures": ("input_l1",), "task": "img2img", "data": str(data), "strength": (0.5,)}
    plan = plan_of(EvaluateRequest.from_mapping(quick, "the test"))

    def hash_of(strength: tuple[float, ...], folder: Path) -> str:
        inputs = inputs_of(str(folder), 2, plan.model)
        return str(replace(plan, request=replace(plan.request, strength=strength), inputs=inputs).protocol["hash"])

    shutil.copytree(data, tmp_path / "copy")
    first = hash_of((0.5,), data)
    assert first == plan.protocol["hash"] == hash_of((0.5,), tmp_path / "copy"), "wherever the same images are"
    Image.new("RGB", (32, 32)).save(tmp_path / "copy" / "1.png")
    others = [hash_of((0.5, 0.75), data), hash_of((0.5,), tmp_path / "copy"), replace(plan, inputs=None).protocol["hash"]]
    assert len({first, *others}) == 4
    assert directory.read_run(student)["protocol"] == directory.read_run(teacher)["protocol"]


def test_the_teacher_itself_is_at_no_distance(teacher: Path) -> None:
    found = scores(teacher)
    assert [found[label, "feature_distance"]["value"] for label in LABELS] == [0, 0]
    assert not (teacher / "drawn" / f"teacher-{SLUGS[0]}").exists()


def test_an_evaluation_of_the_teacher_has_its_images(student: Path, teacher: Path, data: Path, tmp_path: Path, cli: Cli) -> None:
    args = ["evaluate", *QUICK, "--data", data, "--arch", "bk-sdm-small", "--teacher", teacher, "--out", tmp_path / "run"]
    code, _, err = cli(*args)
    assert code == 0, err
    assert_same_scores(tmp_path / "run", student, rel=1e-3)
    assert {p.name for p in (tmp_path / "run" / "drawn").iterdir()} == {*SLUGS}
    strip = f"images/teacher-{SLUGS[1]}.png"
    assert np.array_equal(*(np.asarray(Image.open(run / strip)) for run in (student, tmp_path / "run")))


class Killed(BaseException):
    """As if the process were gone."""


def test_killed_and_started_again_ends_with_the_same_scores(
    student: Path, data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the teacher draws, then while the student does."""
    args = ["evaluate", *QUICK, "--data", data, "--arch", "bk-sdm-small", "--out", tmp_path / "run"]
    real, left = directory.Run.write, [3, 7]  # files of images until the next kill

    def write(run: directory.Run, name: str, content: str | bytes) -> Path:
        if name.startswith("drawn/") and left:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        return real(run, name, content)

    monkeypatch.setattr(directory.Run, "write", write)
    for n_files in (3, 10):
        with pytest.raises(Killed):
            cli(*args)
        left.pop(0)
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("drawn/*/*.png")}
        assert len(before) == n_files
    assert cli(*args)[0] == 0
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), "an image on disk was drawn again"
    assert_same_scores(tmp_path / "run", student, rel=1e-9)


@pytest.mark.slow
def test_processes_share_a_run(student: Path, data: Path, tmp_path: Path) -> None:
    args = ["evaluate", *QUICK, "--data", str(data), "--arch", "bk-sdm-small", "--out", str(tmp_path / "run")]
    pair = [subprocess.Popen([sys.executable, "-m", "blockprune", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)]
    pair.append(subprocess.Popen([sys.executable, "-m", "blockprune", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert_same_scores(tmp_path / "run", student, rel=1e-9)


def test_what_another_process_draws_is_waited_for(
    data: Path, tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of a batch of the teacher that another process holds appear while this one waits; it draws the rest."""
    theirs = f"parts/teacher-{SLUGS[0]}/000000.safetensors"
    real = evaluate_run.Share._draw_of_teacher
    drawing: list[str] = []

    def draw(self: Any, teacher: Any, setting: Any, series: Any) -> bool:
        if series.slug == f"teacher-{SLUGS[0]}" and not drawing:  # all of it is held by the other
            drawing.append(series.slug)
            return False
        return bool(real(self, teacher, setting, series))

    def wait(seconds: float) -> None:
        shutil.copytree((student / theirs).parent, (tmp_path / "run" / theirs).parent, dirs_exist_ok=True)
        shutil.copytree(student / "drawn" / f"teacher-{SLUGS[0]}", tmp_path / "run" / "drawn" / f"teacher-{SLUGS[0]}")

    monkeypatch.setattr(evaluate_run.Share, "_draw_of_teacher", draw)
    monkeypatch.setattr(evaluate_run.time, "sleep", wait)
    one = [*QUICK[:3], "0.25", *QUICK[4:]]
    evaluate(*one, "--data", data, "--arch", "bk-sdm-small", "--out", tmp_path / "run")
    found, others = scores(tmp_path / "run"), scores(student)
    for key in found:
        assert found[key]["value"] == pytest.approx(others[key]["value"], rel=1e-9), key


def test_the_table_has_the_teachers_edits(student: Path, teacher: Path) -> None:
    """Their numbers are those of an evaluation of the teacher; a column that is the same in all rows is left out."""
    out = io.StringIO()
    print_evaluation(evaluation_view(directory.Stored(student, "evaluate")), Console(file=out, width=200))
    for label in LABELS:
        (row,) = (line.split() for line in out.getvalue().splitlines() if line.strip().startswith(f"teacher, {label}"))
        wanted = [scores(teacher)[label, m]["value"] for m in ("feature_distance", "clip_score", "input_l1")]
        assert [float(cell) for cell in row[-3:]] == pytest.approx(wanted, rel=1e-2, abs=1e-3)
    assert "weight_bytes" not in out.getvalue()


def test_a_page_has_the_grid_of_edits(student: Path, teacher: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("report", teacher, student, "--out", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert "The images in the first row, edited by the captions above them" in page
    for row in ("input", *(f"{name}, {label}" for name in ("tiny-digits", "tiny-digits without bk-sdm-small") for label in LABELS)):
        assert f'<th scope="row">{row}' in page, row
    assert "input L1 ↓" in page


def test_in_python(data: Path) -> None:
    """A pruned pipeline finds its teacher, and a run in memory draws a figure with the input on top."""
    pipe = bp.load_pipeline("tiny-digits")
    quick: dict[str, Any] = {"task": "img2img", "data": data, "n_images": 2, "steps": 2, "progress": bp.Silent()}
    result = bp.evaluate(bp.prune(pipe, "mid_block"), strength=(0.5,), **quick)
    (row,) = result.rows
    assert row["strength"] == 0.5
    assert row["feature_distance"] > 0
    view = result.view
    assert view.inputs is not None
    assert {name: len(images) for name, images in view.teacher_images.items()} == {row["setting"]: 2}
    assert result.figure("images").axes


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_models_of_the_families(kind: str, tiny_folder: Callable[[str], Path], data: Path, tmp_path: Path, cli: Cli) -> None:
    args = ["--model", tiny_folder(kind), "--n-images", "3", "--measures", "input_l1", "--data", data, *QUICK[:4]]
    code, _, err = cli("evaluate", *args, "--steps", "4", "--arch", "mid_block", "--out", tmp_path / "run")
    assert code == 0, err
    values = [row["value"] for (_, measure), row in scores(tmp_path / "run").items() if measure == "input_l1"]
    assert len(values) == 2
    assert 0 < min(values) <= max(values) < 1


def test_text_to_image_is_paired_as_well(tmp_path: Path, cli: Cli) -> None:
    quick = ["--n-images", "2", "--steps", "1", "--measures", "feature_distance", "--arch", "mid_block"]
    assert cli("evaluate", *quick, "--out", tmp_path / "run")[0] == 0
    assert scores(tmp_path / "run")["CFG 3, 1 steps", "feature_distance"]["value"] > 0
    assert "task" not in directory.read_run(tmp_path / "run")["protocol"]


def damaged(folder: Path, n_whole: int, n_broken: int) -> Path:
    scenes(folder, n_whole + n_broken)
    for i in range(n_broken):
        (folder / f"{i}.png").write_bytes(b"no image")
    return folder


def test_an_unreadable_image_is_said_and_left_out(tmp_path: Path, cli: Cli) -> None:
    data = damaged(tmp_path / "data", 2, 1)
    args = ["--task", "img2img", "--data", data, "--strength", "1", "--n-images", "2", "--steps", "1", "--measures", "input_l1"]
    code, _, err = cli("evaluate", *args, "--out", tmp_path / "run")
    assert code == 0, err
    assert "1 images of" in err
    assert "such as '0.png'" in err
    with Image.open(tmp_path / "run" / "images" / "inputs.png") as strip:
        assert np.array_equal(np.asarray(strip)[:, :32], np.asarray(Image.open(data / "1.png")))


EDIT = ["--task", "img2img", "--data", "DATA"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--task", "paint"], "unknown --task 'paint': choose from text2img, img2img"),
        (["--task", "img2img", "--strength", "0.5"], "--task img2img edits images: give --data DIR"),
        (EDIT, "--task img2img needs --strength"),
        (["--strength", "0.5"], "--strength is for images that are edited: give --task img2img"),
        (["--data", "DATA"], "--data is for images that are edited: give --task img2img"),
        ([*EDIT, "--strength", "0"], "--strength must be above 0: got 0"),
        ([*EDIT, "--strength", "0.5,1.5"], "--strength must be at most 1: got 1.5"),
        ([*EDIT, "--strength", "half"], "--strength takes numbers"),
        (
            [*EDIT, "--strength", "0.5,0.05", "--steps", "10"],
            "--strength 0.05 of --steps 10 leaves no denoising step: give at least",
        ),
        ([*EDIT, "--strength", "0.5", "--n-images", "6"], "has 5 images: give 6, or --n-images 5"),
        ([*EDIT, "--strength", "0.5", "--resolution", "32x48"], "--data needs a square resolution: got 32x48"),
        (["--task", "img2img", "--data", "BROKEN", "--strength", "0.5"], "has 2 images (3 more cannot be read, such as '0.png')"),
        (["--task", "img2img", "--data", "UNREADABLE", "--strength", "0.5"], "none of the 3 images of"),
        (["--task", "img2img", "--data", "WORDLESS", "--strength", "0.5", "--n-images", "3"], "'0.png' of --data has no caption"),
        (["--task", "img2img", "--data", "/nowhere", "--strength", "0.5"], "no folder of images at '/nowhere'"),
        (["--measures", "input_l1"], "evaluate does not measure 'input_l1': choose from"),
        (["--measures", "fid", "--teacher", "tiny-digits"], "--teacher is for a measure that compares with its images"),
    ],
)
def test_bad_options(args: list[str], says: str, data: Path, tmp_path: Path, one_line: OneLine) -> None:
    def wordless() -> Path:
        shutil.copytree(data, tmp_path / "wordless")
        (tmp_path / "wordless" / "metadata.csv").unlink()
        return tmp_path / "wordless"

    stand_ins: dict[str, Callable[[], Any]] = {
        "DATA": lambda: data,
        "BROKEN": lambda: damaged(tmp_path / "broken", 2, 3),
        "UNREADABLE": lambda: damaged(tmp_path / "unreadable", 0, 3),
        "WORDLESS": wordless,
    }
    given = [stand_ins[a]() if a in stand_ins else a for a in args]
    assert says in one_line("evaluate", *given, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_scan_has_no_input(tmp_path: Path, one_line: OneLine) -> None:
    assert "measure 'input_l1' needs input images" in one_line("scan", "--measures", "input_l1", "--out", tmp_path / "run")
    assert "unknown --objective 'input_l1'" in one_line("search", "--objective", "input_l1", "--budget", "65%params")


def test_a_model_without_such_a_pipeline(
    data: Path, tmp_path: Path, tiny_folder: Callable[[str], Path], one_line: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder("sd1"), tmp_path / "model")
    args = ["evaluate", *QUICK, "--data", data, "--out", tmp_path / "run", "--measures", "input_l1", "--model", tmp_path / "model"]
    with monkeypatch.context() as patch:
        patch.setitem(families.FAMILIES, None, replace(families.SD, img2img=None))
        assert "the models of the family 'sd', such as" in (line := one_line(*args))
    assert "have no img2img pipeline: leave out --task" in line
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionInpaintPipeline"'))
    subject.load_model.cache_clear()
    assert "holds a StableDiffusionInpaintPipeline: give a model with a StableDiffusionPipeline" in one_line(*args)


@pytest.mark.slow
def test_a_teacher_that_cannot_be_paired(
    student: Path, teacher: Path, data: Path, tmp_path: Path, tiny_folder: Callable[[str], Path], one_line: OneLine, cli: Cli
) -> None:
    """A student's folder that does not say where its teacher is, or says another; and runs of other models, or made otherwise."""
    quick = ["--task", "img2img", "--strength", "1", "--n-images", "2", "--steps", "1", "--data", data, "--detector", "tiny-digits"]
    bp.save(bp.prune(bp.load_pipeline(tiny_folder("sd1")), "mid_block"), tmp_path / "pruned")
    of_folder = ["evaluate", *quick, "--measures", "feature_distance", "--out", tmp_path / "run", "--model", tmp_path / "pruned"]
    assert "which is not here, and feature_distance is to its images: give --teacher DIR" in one_line(*of_folder)
    assert "'tiny-digits' is not the teacher of" in one_line(*of_folder, "--teacher", "tiny-digits")
    assert "is about another model" in one_line(*of_folder, "--teacher", teacher)
    code, _, err = cli(*of_folder, "--teacher", tiny_folder("sd1"))
    assert code == 0, err
    assert scores(tmp_path / "run")["strength 1, CFG 7.5, 1 steps", "feature_distance"]["value"] > 0
    masked = ["evaluate", *QUICK, "--data", data, "--arch", "mid_block", "--out", tmp_path / "masked", "--teacher"]
    assert "is not the model that is evaluated" in one_line(*masked, tiny_folder("sd1"))
    assert "is about a student" in one_line(*masked, student)
    assert "was evaluated differently (seed is 0 there, 1 asked)" in one_line(*masked, teacher, "--seed", "1")
    assert "has no setting 'strength 0.25, CFG 4, 4 steps'" in one_line(*masked, teacher, "--cfg-scale", "4")
    shutil.copytree(teacher, tmp_path / "part")
    (tmp_path / "part" / "parts" / SLUGS[1] / "000002.safetensors").unlink()
    assert f"has not all its images at {LABELS[1]!r}" in one_line(*masked, tmp_path / "part")
    assert not (tmp_path / "masked").exists()
