"""`blockprune evaluate` of students: along training, and of exported folders, whether or not these name their teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from common_fixtures import Cli
from small_evaluation import QUICK, scores, teacher_config, values

from blockprune.measures import detectors
from blockprune.model.presets import preset
from blockprune.model.trace import trace
from blockprune.runs import directory

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


@pytest.mark.slow
def test_checkpoints_along_training(distilled: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("evaluate", "--checkpoints", distilled, *QUICK, "--out", tmp_path / "run")
    assert code == 0, err
    said, found = directory.read_run(tmp_path / "run"), values(tmp_path / "run")
    assert [s["checkpoint"] for s in said["settings"]] == [2, 3]
    assert (said["teacher"], said["label"]) == ("tiny-digits", "run")
    assert said["arch"] == list(preset("bk-sdm-small"))
    assert {row["arch"] for row in scores(tmp_path / "run").values()} == {preset("bk-sdm-small").key}
    assert found["step 2, CFG 3, 2 steps", "clip_score"] != found["step 3, CFG 3, 2 steps", "clip_score"]
    # the last is what was exported, which finds judges, prompts and reference of its teacher by itself
    code, _, err = cli("evaluate", "--model", distilled / "pipeline", *QUICK, "--out", tmp_path / "pipeline")
    assert code == 0, err
    exported, pipeline = values(tmp_path / "pipeline"), directory.read_run(tmp_path / "pipeline")
    for measure in ("fid", "kid", "is", "clip_score", "weight_bytes"):
        ours, theirs = exported["CFG 3, 2 steps", measure][0], found["step 3, CFG 3, 2 steps", measure][0]
        assert ours == pytest.approx(theirs, rel=1e-3), measure
    assert pipeline["protocol"] == said["protocol"]
    assert pipeline["graph"] == said["graph"]
    assert (pipeline["teacher"], pipeline["teacher_id"], pipeline["arch"]) == ("tiny-digits", said["teacher_id"], said["arch"])
    assert pipeline["label"] == "run"


@pytest.mark.slow
def test_averaged_weights_are_taken(distilled: Path) -> None:
    from blockprune.stages.train.finished import Finished

    trained = Finished.of(distilled)
    place = distilled / "checkpoints" / "step-0000002"
    from safetensors.torch import load_file as load

    plain, averaged = load(place / "student.safetensors"), load(place / "ema.safetensors")
    unet = trained.unet(2, teacher_config(), torch.device("cpu"), torch.float32)
    state = unet.state_dict()
    assert all(torch.equal(state[name], averaged[name]) for name in plain)
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    ["mid-removed", "down_blocks.1.resnets.0,up_blocks.1.attentions.2"],
    ids=["stock", "slots"],
)
def test_an_exported_folder_that_does_not_name_its_teacher(
    arch: str, tmp_path: Path, cli: Cli, tiny_folder: Callable[[str], Path]
) -> None:
    from blockprune.export import pipeline
    from blockprune.model import presets, pretrained, surgery

    pipe = pretrained.load(str(tiny_folder("sd1")))
    removed = presets.parse(arch, trace(pipe.unet.config, n_tokens=tiny.N_TOKENS))
    pipeline.export_pipeline(pipe, surgery.prune(pipe.unet, removed), removed, tmp_path / "model", {})
    quick = ["--n-images", "2", "--steps", "1", "--measures", "clip_score", "--clip", "tiny-digits"]
    for gone in (False, True):
        if gone:
            (tmp_path / "model" / "pruning" / "teacher.json").unlink()
        out = tmp_path / f"run-{gone}"
        code, _, err = cli(
            "evaluate", "--model", tmp_path / "model", *quick, "--latency", "--components", "--rounds", "3", "--out", out
        )
        assert code == 0, err
        said = directory.read_run(out)
        assert (said["teacher"], said["arch"], said["label"]) == ("", list(removed), "model")
        stock = arch == "mid-removed"
        assert (said["graph"] is None) == (gone and stock)
        who = {row["who"] for row in directory.read_rows(out) if row["kind"] == "component"}
        assert who == ({"student"} if gone and stock else {"teacher", "student"})


def test_an_export_names_its_teacher_but_no_path(
    tmp_path: Path, cli: Cli, tiny_folder: Callable[[str], Path], distilled: Path
) -> None:
    from blockprune.model.identity import identity

    said = json.loads((distilled / "pipeline" / "pruning" / "teacher.json").read_text())
    assert (said["model"], said["identity"]) == ("tiny-digits", identity("tiny-digits"))
    assert said["unet"]["block_out_channels"] == teacher_config()["block_out_channels"]
    shutil.copytree(distilled / "student", tmp_path / "student")
    assert cli("export", tmp_path / "student", "--teacher", detectors.BUILT_IN, "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "pruning" / "teacher.json").read_text())["model"] == "tiny-digits"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--checkpoints", "RUN", "--arch", "mid_block"], "--checkpoints says what is removed"),
        (["--checkpoints", "RUN", "--model", "SD1"], "is not the teacher of the run"),
        (["--model", "RUN", "--arch", "mid_block"], "is pruned already"),
    ],
)
def test_what_does_not_go_with_a_trained_student(
    distilled: Path, tiny_folder: Callable[[str], Path], one_line: Callable[..., str], tmp_path: Path, args: list[str], says: str
) -> None:
    places = {"RUN": distilled, "SD1": tiny_folder("sd1")}
    assert says in one_line("evaluate", *(places.get(a, a) for a in args), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
