"""`blockprune personalise` as a user runs it: all weights or a LoRA, of any student, resumed, and one line for bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from as_user import pictures
from common_fixtures import Cli
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import blockprune as bp
from blockprune.cost import latency
from blockprune.errors import UserError
from blockprune.measures.detectors import Vision
from blockprune.measures.subject import Subject
from blockprune.runs import directory
from blockprune.stages.personalise.dataset import BENCHMARKS
from blockprune.stages.train import recorded
from blockprune.stages.train.checkpoints import read_snapshot

PROMPT = "a photo of sks cat"
QUICK = ["--max-train-steps", "4", "--checkpointing-steps", "2", "--n-images", "2", "--steps", "1", "--learning-rate", "1e-3"]
PRIOR = ["--with-prior-preservation", "--class-prompt", "a photo of a cat", "--num-class-images", "5"]


@pytest.fixture
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of an update, which takes several to measure, is that of `test_scores_of_the_built_in_model` alone."""
    monkeypatch.setattr(latency, "_cpu_peak", lambda step: 0)


@pytest.fixture
def command(subject: Path, tiny_folder: Callable[[str], Path], no_peak: None) -> list[str | Path]:
    model = tiny_folder("sd1")
    return ["personalise", "--model", model, "--instance-data-dir", subject, "--instance-prompt", PROMPT, *QUICK]


def losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [(row["step"], row["losses"]) for row in directory.read_rows(folder) if row["kind"] == "train"]


def predicted(unet: torch.nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 24, 8, generator=g)
    with torch.inference_mode():
        return unet(sample, 500, text).sample


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.slow
def test_all_weights_beside_the_class(
    command: list[str | Path], tiny_folder: Callable[[str], Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that breaks off after its first checkpoint goes on as if nothing had been, and draws no class image twice."""
    args = [*command, *PRIOR, "--class-data-dir", tmp_path / "cats", "--validation-steps", "2"]
    code, out, err = cli(*args, "--out", tmp_path / "whole")
    assert code == 0, err
    assert "train_time" in out
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cats").glob("*.png")}
    assert sorted(files) == [f"class-{i:06d}.png" for i in range(5)]
    real = recorded.Recorded._log
    with monkeypatch.context() as patch:
        patch.setattr(recorded.Recorded, "_log", lambda self, state: real(self, state) if state.step < 4 else _break())
        assert cli(*args, "--out", tmp_path / "run")[0] == 2
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]
    assert cli(*args, "--out", tmp_path / "run")[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert set(losses(tmp_path / "run")[0][1]) == {"task", "prior", "loss"}
    parts = [read_snapshot(tmp_path / name / "checkpoints")[0] for name in ("run", "whole")]
    assert parts[0] and parts[1]
    assert all(torch.equal(t, parts[1].parts["student"][name]) for name, t in parts[0].parts["student"].items())
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cats").glob("*.png")} == files
    before, after = bp.load_pipeline(tiny_folder("sd1")), bp.load_pipeline(tmp_path / "run" / "pipeline")
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)
    texts = [pipe.text_encoder.state_dict() for pipe in (before, after)]
    assert all(torch.equal(t, texts[1][name]) for name, t in texts[0].items())
    rows = (tmp_path / "run" / "rows.jsonl").read_bytes()
    code, out, _ = cli(*args, "--out", tmp_path / "run")
    assert code == 0
    assert "already" in out
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == rows


@pytest.mark.slow
def test_a_stock_student_stays_a_student(
    command: list[str | Path], tiny_folder: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    """Its own network is whole by its configuration: what is known of its teacher is carried over, and what it learnt is said."""
    student, learnt = tmp_path / "student", tmp_path / "run" / "pipeline"
    bp.save(bp.prune(bp.load_pipeline(tiny_folder("sd1")), "mid_block"), student)
    code, _, err = cli(*command, "--model", student, "--max-train-steps", "1", "--out", tmp_path / "run")
    assert code == 0, err
    for name in ("architecture.json", "block_map.json", "teacher.json"):
        assert (learnt / "pruning" / name).read_text() == (student / "pruning" / name).read_text()
    before, card = ((folder / "README.md").read_text() for folder in (student, learnt))
    kept = [line for line in before.splitlines() if line.startswith(("- `mid_block`", "| teacher |", "| U-Net", "| MACs"))]
    assert len(kept) == 6
    assert set(kept) < {*card.splitlines()}
    assert f"| {bp.graph(tiny_folder('sd1')).total.thop:,} | {bp.graph(student).total.thop:,} |" in card
    asked = {
        "personalised from": "student",
        "trained, all weights": "unet",
        "subject": "sks",
        "instance prompt": PROMPT,
        "updates": 1,
    }
    assert {f"| {name} | {value} |" for name, value in asked.items()} < {*card.splitlines()}


def _break() -> None:
    raise UserError("the power is gone: try again")


def plain_name(key: str) -> str:
    """peft's name of what diffusers calls lora.down or, in text encoders, lora_linear_layer.down."""
    key = key.replace(".lora_linear_layer.", ".lora.")
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


@pytest.mark.slow
@pytest.mark.usefixtures("no_peak")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_lora_of_a_slot_keeping_student(
    kind: str, subject: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    """What load_lora_weights reads is what was trained, scale and all; a checkpoint holds only adapters."""
    student = tmp_path / "student"
    bp.save(bp.prune(bp.load_pipeline(tiny_folder(kind)), "mid_block.resnets.1,down_blocks.1.attentions.0"), student)
    args = ["personalise", "--model", student, "--instance-data-dir", subject, "--instance-prompt", PROMPT, *QUICK]
    code, out, err = cli(*args, "--rank", "2", "--train-text-encoder", "--out", tmp_path / "run")
    assert code == 0, err
    assert "the LoRA is in" in out
    snapshot, _ = read_snapshot(tmp_path / "run" / "checkpoints")
    assert snapshot is not None
    trained = snapshot.parts["student"]
    texts = ["text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])]
    assert all(".lora_" in name for name in trained)
    assert {name.partition(".")[0] for name in trained} == {"unet", *texts}
    moved = {name.partition(".")[0] for name, t in trained.items() if ".lora_B." in name and t.abs().max() > 0}
    assert moved == {"unet", *texts}
    saved = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    named = {plain_name(key): t for key, t in saved.items()}
    assert named.keys() == {name.replace(".default.", ".") for name in trained}
    assert all(torch.equal(t, named[name.replace(".default.", ".")]) for name, t in trained.items())
    pipe = bp.load_pipeline(student)
    # what transformers reads of text encoders depends on peft's version
    with safe_open(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    of_unet = {key: t for key, t in saved.items() if key.startswith("unet.")}
    pipe.load_lora_into_unet(of_unet, network_alphas=None, unet=pipe.unet, metadata=metadata)
    loaded = {name: p for name, p in pipe.unet.named_parameters() if ".lora_" in name}
    assert len(loaded) == sum(name.startswith("unet.") for name in saved)
    for name, p in loaded.items():
        assert torch.equal(p, named["unet." + re.sub(r"\.default[^.]*\.", ".", name)]), name
    scales = {scale for module in pipe.unet.modules() for scale in getattr(module, "scaling", {}).values()}
    assert scales == {27 / 16}


def test_a_lora_loads_as_any_other(command: list[str | Path], tiny_folder: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli(*command, "--rank", "4", "--lora-alpha", "2", "--out", tmp_path / "run")
    assert code == 0, err
    assert "pipe.load_lora_weights loads it" in out
    pipe, plain = bp.load_pipeline(tiny_folder("sd1")), bp.load_pipeline(tiny_folder("sd1"))
    pipe.load_lora_weights(tmp_path / "run" / "lora")
    difference = apart(predicted(pipe.unet), predicted(plain.unet))
    assert difference > 1e-6
    pipe.unet.disable_lora()
    assert apart(predicted(pipe.unet), predicted(plain.unet)) < difference / 10


@pytest.mark.usefixtures("no_peak")
def test_a_pipeline_that_is_given_stays(subject: Path, tiny_folder: Callable[[str], Path]) -> None:
    """Whether its weights or its text encoder learn; and all of the student's weights are found in the pipeline that comes out."""
    pipe = bp.prune(bp.load_pipeline(tiny_folder("sd1")), "mid_block.resnets.1")
    before = {name: {k: t.clone() for k, t in getattr(pipe, name).state_dict().items()} for name in ("unet", "text_encoder")}
    quick = {"steps": 1, "n_images": 1, "denoising_steps": 1, "learning_rate": 1e-2, "progress": bp.Silent()}
    found = bp.personalise(pipe, subject, PROMPT, train_text_encoder=True, **quick)
    for name, tensors in before.items():
        now, learnt = getattr(pipe, name).state_dict(), getattr(found.pipeline, name).state_dict()
        assert now.keys() == tensors.keys() == learnt.keys()
        assert all(torch.equal(now[k], t) for k, t in tensors.items())
        assert any(not torch.equal(learnt[k], t) for k, t in tensors.items())
    assert not any(p.requires_grad for p in found.pipeline.unet.parameters())


@pytest.mark.slow
def test_class_images_are_the_teachers_and_depend_on_their_number(
    command: list[str | Path], tiny_folder: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    cats = tmp_path / "cats"
    args = [*command, *PRIOR, "--class-data-dir", cats, "--max-train-steps", "1"]
    assert cli(*args, "--teacher", tiny_folder("sd2"), "--out", tmp_path / "a")[0] == 0
    first = {p.name: p.read_bytes() for p in cats.glob("*.png")}
    (cats / "class-000001.png").unlink()
    (cats / "class-000004.png").unlink()
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(cats / "mine.png")  # one of the user's own stands for number 4
    assert cli(*args, "--teacher", tiny_folder("sd2"), "--out", tmp_path / "b")[0] == 0
    assert {p.name for p in cats.glob("*.png")} == {*(f"class-{i:06d}.png" for i in range(4)), "mine.png"}
    assert (cats / "class-000001.png").read_bytes() == first["class-000001.png"]
    (tmp_path / "cats.txt").write_text("a photo of a cat\na cat\n")
    shutil.copytree(cats, tmp_path / "mixed", ignore=lambda *_: ["class_images.json"])
    several = [*args, "--class-prompt", tmp_path / "cats.txt", "--class-data-dir", tmp_path / "mixed"]
    code, _, err = cli(*several, "--out", tmp_path / "d")
    assert code == 2
    assert "which of several class prompts is theirs is not known" in err
    code, _, err = cli(*args, "--out", tmp_path / "c")
    assert code == 2
    assert "were drawn otherwise (model is" in err


@pytest.mark.slow
def test_scores_of_the_built_in_model(tmp_path: Path, cli: Cli, subject: Path) -> None:
    """They are measures like all others: `evaluate` takes them, too, and gives the same for the same images."""
    args = ["--instance-data-dir", subject, "--token", "three", "--dino", "tiny-digits"]
    prompt = "bold upright: three top left"
    code, _, err = cli("personalise", *args, "--instance-prompt", prompt, *QUICK[:-1], "1e-9", "--out", tmp_path / "run")
    assert code == 0, err
    scores = {s["measure"]: s["value"] for s in json.loads((tmp_path / "run" / "scores.json").read_text())}
    assert set(scores) == {"dino", "clip_i", "clip_t", "train_time", "train_memory"}
    assert scores["train_memory"] > 4 * 2_280_884 * 4  # weights, gradients and two moments
    (tmp_path / "prompts.txt").write_text(prompt + "\n")
    drawn = ["--n-images", "2", "--steps", "1", "--prompts", tmp_path / "prompts.txt", "--measures", "dino,clip_i,clip_t"]
    assert cli("evaluate", *args, *drawn, "--out", tmp_path / "evaluate")[0] == 0
    rows = [row for row in directory.read_rows(tmp_path / "evaluate") if row["kind"] == "score"]
    again = {row["measure"]: row["value"] for row in rows if row["measure"] in scores}
    assert again == pytest.approx({name: scores[name] for name in again}, rel=1e-3)
    assert len(again) == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--dataset", "dreambooth"], "--dataset and --subjects are a protocol's"),
        (["--instance-prompt", "a photo of a cat"], "does not name the subject by its token 'sks'"),
        (["--instance-prompt", "a photo of asks cat"], "does not name the subject by its token 'sks'"),
        (["--token", "<|endoftext|>", "--instance-prompt", "<|endoftext|> cat"], "splits the token '<|endoftext|>' to nothing"),
        (["--instance-prompt", "a " * 30 + "sks"], "the token 'sks' is cut off"),
        (["--instance-data-dir", "/nowhere"], "no folder of images at '/nowhere'"),
        (["--with-prior-preservation"], "give --class-data-dir and --class-prompt"),
        (["--lora-alpha", "8"], "goes with --rank"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--teacher", "no-such-model", *PRIOR, "--class-data-dir", "cats"], "no-such-model"),
    ],
)
def test_bad_options(
    command: list[str | Path],
    one_line: Callable[..., str],
    tmp_path: Path,
    args: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in one_line(*command, *args, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_images(command: list[str | Path], subject: Path, one_line: Callable[..., str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(subject, tmp_path / "few"))
    (folder / "000.png").unlink()
    assert "a subject needs at least 3 images" in one_line(*command, "--instance-data-dir", folder, "--out", tmp_path / "run")
    (folder / "000.png").write_bytes((subject / "000.png").read_bytes()[:60])
    assert f"'000.png' in {str(folder)!r} cannot be read (" in one_line(
        *command, "--instance-data-dir", folder, "--out", tmp_path / "run"
    )
    assert "no subject: give --instance-data-dir" in one_line("personalise", "--out", tmp_path / "run")
    assert "no prompt" in one_line("personalise", "--instance-data-dir", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


LIST = """Classes

subject_name,class
vase,vase
cat2,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} with a hat'.format(unique_token, class_token)
]
"""


@pytest.fixture
def benchmark(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> list[str | Path]:
    """A benchmark of two subjects, two prompts each, and the command that runs it."""
    for name in ("vase", "cat2"):
        pictures(tmp_path / "data" / "dataset" / name, 3)
    (tmp_path / "data" / "dataset" / "prompts_and_classes.txt").write_text(LIST)
    rules = (BENCHMARKS / "dreambooth.toml").read_text()
    for old, new in {"n_subjects = 30": "n_subjects = 2", "n_prompts = 25": "n_prompts = 2", "_prompt = 4": "_prompt = 1"}.items():
        rules = rules.replace(old, new)
    rules = "\n".join(line for line in rules.splitlines() if not line.startswith(("clip =", "dino =")))
    (tmp_path / "two.toml").write_text(rules)
    data, model = tmp_path / "data", "tiny-digits"
    few = ["--max-train-steps", "1", "--steps", "1", "--learning-rate", "1e-3"]
    return [
        "personalise",
        "--model",
        model,
        "--protocol",
        tmp_path / "two.toml",
        "--dataset",
        data,
        *few,
        "--out",
        tmp_path / "run",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("no_peak")
def test_a_benchmark_learns_every_subject_once(benchmark: list[str | Path], tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli(*benchmark)
    assert code == 0, err
    assert all(f"| {name} |" in out for name in ("vase", "cat2"))
    subjects = json.loads((tmp_path / "run" / "subjects.json").read_text())
    values = [{s["measure"]: s["value"] for s in subjects[name]} for name in ("vase", "cat2")]
    mean = {s["measure"]: (s["value"], s["n"]) for s in json.loads((tmp_path / "run" / "scores.json").read_text())}
    for name in ("dino", "clip_i", "clip_t"):
        assert mean[name] == (pytest.approx((values[0][name] + values[1][name]) / 2), 2)
    asked = json.loads((tmp_path / "run" / "subjects" / "cat2" / "run.json").read_text())
    assert asked["pictured_prompts"] == ["a sks cat in the snow", "a sks cat with a hat"]
    assert asked["instance_prompt"] == "a photo of sks cat"
    assert not (tmp_path / "run" / "subjects" / "cat2" / "checkpoints").exists()
    rows = (tmp_path / "run" / "rows.jsonl").read_text()
    assert cli(*benchmark)[0] == 0
    assert (tmp_path / "run" / "rows.jsonl").read_text() == rows


def test_what_a_dataset_lacks_is_said(benchmark: list[str | Path], tmp_path: Path, one_line: Callable[..., str]) -> None:
    data = tmp_path / "data" / "dataset"
    (data / "vase" / "000.png").unlink()
    shutil.rmtree(data / "cat2")
    assert "lacks images of 2 of its 2 subjects, at least 3 each: vase, cat2" in one_line(*benchmark)
    assert "the dataset knows no subject 'dog'" in one_line(*benchmark, "--subjects", "dog")
    (data / "prompts_and_classes.txt").write_text(LIST.replace("cat2,cat\n", ""))
    assert "names 1 subjects, and the protocol has 2" in one_line(*benchmark)
    (data / "prompts_and_classes.txt").write_text(LIST.replace("'a red {0} {1}'.format(unique_token, class_token)\n", ""))
    assert "lists 1 under Object Prompts, and the protocol has 2" in one_line(*benchmark)
    (data / "prompts_and_classes.txt").write_text("nothing")
    assert "is not laid out as google/dreambooth has it" in one_line(*benchmark)
    (data / "prompts_and_classes.txt").unlink()
    assert "no prompts_and_classes.txt in" in one_line(*benchmark)
    assert "leave out --instance-prompt" in one_line(*benchmark, "--instance-prompt", "sks")
    assert "needs its dataset" in one_line("personalise", "--protocol", "dreambooth")
    assert not (tmp_path / "run").exists()


def test_dinos_embedding_is_its_cls_token(tmp_path: Path) -> None:
    """As facebook/dino-vits16 is published: without a pooling layer."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cls = model(images.float() / 127.5 - 1).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(cls, dim=-1).numpy()
    np.testing.assert_allclose(Vision(tmp_path)(images), expected, rtol=1e-4, atol=1e-5)


def test_cosines_by_hand(tmp_path: Path) -> None:
    """Of two subject images and one drawn one, with embeddings that are known."""

    class Known:
        def image(self, images: torch.Tensor) -> np.ndarray:
            return np.stack([[np.cos(x), np.sin(x)] for x in images[:, 0, 0, 0].numpy() / 100])

        __call__ = image

        def text(self, prompts: list[str]) -> np.ndarray:
            assert prompts == ["a cat, red"]
            return np.array([[0.0, 1.0]])

    def picture(angle: float) -> torch.Tensor:
        return torch.full((1, 3, 4, 4), angle)

    judge = Subject([picture(0), picture(50)], "sks", Known(), Known())  # type: ignore[arg-type]
    drawn = picture(100)
    seen = judge.look(drawn, ["a SKS cat, red"], {"image": Known().image(drawn)})
    expected = {"dino": (np.cos(1) + np.cos(0.5)) / 2, "clip_i": (np.cos(1) + np.cos(0.5)) / 2, "clip_t": np.sin(1)}
    assert {name: float(value[0]) for name, value in seen.items()} == pytest.approx(expected)
