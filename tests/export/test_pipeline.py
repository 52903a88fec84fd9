"""Students as whole pipeline folders: both kinds and both ways of loading, the model card, the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import blockprune
from blockprune.errors import UserError
from blockprune.export import pipeline
from blockprune.export.model_card import in_words, model_card
from blockprune.export.pipeline import export_pipeline, load_pipeline, read_block_map, save_student
from blockprune.export.stock_config import BlockMap, Stock, expressible
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import same_outputs
from blockprune.model.presets import expand, preset

Folder = Callable[[str], Path]
OneLine = Callable[..., str]


def arch(*patterns: str) -> Architecture:
    return Architecture(frozenset(name for pattern in patterns for name in expand(pattern)))


def run(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs, return_dict=False)[0]


Exported = tuple[Path, UNet2DConditionModel]
NO_STOCK = arch("down_blocks.1.resnets.0", "up_blocks.1.attentions.2")


@pytest.fixture(scope="module")
def exported(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Architecture], Exported]:
    """(kind, architecture) => an exported folder, which tests must not write to, and its student."""
    made: dict[tuple[str, str], Exported] = {}

    def get(kind: str, a: Architecture) -> Exported:
        if (kind, a.key) not in made:
            pipe = pretrained.load(str(tiny_folder(kind)))
            student = surgery.prune(pipe.unet, a)
            folder = tmp_path_factory.mktemp("exports") / "model"
            export_pipeline(pipe, student, a, folder, {"teacher": kind})
            made[kind, a.key] = folder, student
        return made[kind, a.key]

    return get


LOAD_PLAINLY = """
import sys
sys.modules["blockprune"] = None
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe, x = DiffusionPipeline.from_pretrained(folder), load_file(folder + "-inputs.safetensors")
    added = {k: x.pop(k) for k in ("text_embeds", "time_ids") if k in x}
    with torch.no_grad():
        sample = pipe.unet(**x, added_cond_kwargs=added or None).sample
    image = torch.from_numpy(pipe("a 3", num_inference_steps=2, output_type="np").images)
    save_file({"sample": sample, "image": image.contiguous()}, out)
"""
PLAIN = [("sd1", "bk-sdm-tiny"), ("sd1-v", "mid-removed"), ("sdxl", "ssd-1b")]


@pytest.mark.slow
def test_a_process_without_this_package_loads_stock_students(exported: Callable[..., Exported], tmp_path: Path) -> None:
    args = []
    for kind, label in PLAIN:
        folder, _ = exported(kind, preset(label))
        x = tiny.inputs(kind)
        added = x.pop("added_cond_kwargs", {})
        save_file({k: t.contiguous() for k, t in (x | added).items()}, f"{folder}-inputs.safetensors")
        args += [str(folder), str(tmp_path / kind)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD_PLAINLY, *args], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, label in PLAIN:
        out = load_file(tmp_path / kind)
        student = exported(kind, preset(label))[1]
        assert same_outputs(out["sample"], run(student, tiny.inputs(kind)), student)
        assert out["image"].shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("kind", "a"),
    [("sd1", preset("bk-sdm-small")), pytest.param("sdxl", preset("koala-700m"), marks=pytest.mark.slow), ("sd1", NO_STOCK)],
)
def test_load_pipeline_loads_both_kinds(kind: str, a: Architecture, exported: Callable[..., Exported], tmp_path: Path) -> None:
    folder, student = exported(kind, a)
    pipe = blockprune.load_pipeline(folder)
    assert type(pipe) is type(pretrained.load(str(folder)) if a is not NO_STOCK else pipe)
    assert same_outputs(run(pipe.unet, tiny.inputs(kind)), run(student, tiny.inputs(kind)), student)
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    assert pipe("a 3", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    assert load_pipeline(str(folder), dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert Architecture.from_json(json.loads((folder / "pruning" / "architecture.json").read_text())) == a
    assert read_block_map(folder).removed == a.removed
    assert len({p.stat().st_mode for p in folder.rglob("*") if p.is_file()}) == 1
    if a is NO_STOCK:
        with pytest.raises(UserError, match="save_pretrained cannot save"):
            pipe.save_pretrained(tmp_path)
    else:
        pipe.save_pretrained(tmp_path)
        again = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
        weights, kept = again.from_pretrained(tmp_path).unet.state_dict(), pipe.unet.state_dict()
        assert weights.keys() == kept.keys() and all(torch.equal(t, weights[k]) for k, t in kept.items())
    assert "_name_or_path" not in json.loads((folder / "model_index.json").read_text())


def test_plain_diffusers_says_what_to_do_where_there_is_no_stock_form(exported: Callable[..., Exported], tmp_path: Path) -> None:
    folder, student = exported("sd1", NO_STOCK)
    for load in (DiffusionPipeline.from_pretrained, StableDiffusionPipeline.from_pretrained):
        with pytest.raises(OSError, match=r"load its pipeline with blockprune\.load_pipeline"):
            load(folder)
    save_student(student, NO_STOCK, tmp_path)
    for bare, options in ((folder / "unet", {}), (tmp_path, {"use_safetensors": True}), (tmp_path, {"low_cpu_mem_usage": False})):
        with pytest.raises(OSError, match=r"a bare one with blockprune\.export\.pipeline\.load_student"):
            UNet2DConditionModel.from_pretrained(bare, **options)
    with pytest.raises(UserError, match="holds a pruned U-Net"):
        pretrained.load(str(folder))


@pytest.mark.parametrize("a", [pytest.param(preset("mid-removed"), marks=pytest.mark.slow), NO_STOCK], ids=["stock", "slots"])
def test_half_precision_and_a_masked_teacher(a: Architecture, tiny_folder: Folder, tmp_path: Path) -> None:
    pipe = pretrained.load(str(tiny_folder("sd1")), dtype=torch.bfloat16)
    with surgery.removed(pipe.unet, a):
        export_pipeline(pipe, pipe.unet, a, tmp_path / "new" / "x", {})
    again, student = load_pipeline(tmp_path / "new" / "x").unet.state_dict(), surgery.prune(pipe.unet, a).state_dict()
    blocks = read_block_map(tmp_path / "new" / "x")
    assert all(torch.equal(again[str(blocks.new_name(k))], t.float()) for k, t in student.items())
    assert {t.dtype for t in load_file(next((tmp_path / "new" / "x" / "unet").glob("*.safetensors"))).values()} == {torch.bfloat16}
    assert pipe.unet.state_dict().keys() == tiny.unet("sd1").state_dict().keys()


@pytest.mark.parametrize("a", [pytest.param(preset("bk-sdm-base"), marks=pytest.mark.slow), NO_STOCK], ids=["stock", "slots"])
def test_rounding_refuses_no_student(a: Architecture, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kernels give other last bits: here by another memory layout, and by an error of the size that processors make."""
    pipe = pretrained.load(str(tiny_folder("sd1")))
    pipe.unet.to(memory_format=torch.channels_last)
    export_pipeline(pipe, surgery.prune(pipe.unet, a), a, tmp_path / "channels-last", {})
    real = pipeline.load_pipeline

    def loaded(error: float) -> Callable[[Path], DiffusionPipeline]:
        def load(folder: Path) -> DiffusionPipeline:
            again = real(folder)
            noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            again.unet.register_forward_hook(lambda module, args, out: (out[0] * (1 + error * noise),))
            return again

        return load

    monkeypatch.setattr(pipeline, "load_pipeline", loaded(1e-6))
    export_pipeline(pipe, surgery.prune(pipe.unet, a), a, tmp_path / "rounded", {})
    monkeypatch.setattr(pipeline, "load_pipeline", loaded(1e-4))
    with pytest.raises(UserError, match=r"it computes something else, .* of the output's size apart"):
        export_pipeline(pipe, surgery.prune(pipe.unet, a), a, tmp_path / "wrong", {})


@pytest.mark.slow
def test_an_export_that_is_not_the_student_leaves_nothing(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, a = pretrained.load(str(tiny_folder("sd1"))), preset("mid-removed")
    student = surgery.prune(pipe.unet, a)
    found = expressible(pipe.unet.config, a)
    assert isinstance(found, Stock)

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            export_pipeline(pipe, student, a, tmp_path / "x", {})
        monkeypatch.undo()

    swapped = {f"up_blocks.0.resnets.{i}": f"up_blocks.0.resnets.{1 - i}" for i in range(2)}
    monkeypatch.setattr(pipeline, "expressible", lambda *args: replace(found, blocks=BlockMap(swapped, a.removed)))
    refused("computes something else")
    for fits in ({"attention_head_dim": 4}, {"norm_num_groups": 2}, {"norm_eps": 1e-6}):
        monkeypatch.setattr(pipeline, "expressible", lambda *args, fits=fits: replace(found, config={**found.config, **fits}))
        refused("came back with other settings")
    real = pipeline.load_pipeline

    def off_by_the_last_bit(folder: Path) -> DiffusionPipeline:
        again = real(folder)
        weight = again.unet.conv_out.weight.view(-1)
        weight[7] = torch.nextafter(weight[7], torch.tensor(9.0))
        return again

    monkeypatch.setattr(pipeline, "load_pipeline", off_by_the_last_bit)
    refused(r"'conv_out\.weight' came back with other values")
    with torch.no_grad():
        student.conv_in.bias[0] = torch.nan
    refused(r"not finite in float32, 'conv_in\.bias' first")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_belong_together_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    pipe, a = pretrained.load(str(tiny_folder("sd1"))), preset("mid-removed")
    student = surgery.prune(pipe.unet, a)
    with pytest.raises(UserError, match="46 tensors beyond its architecture"):
        export_pipeline(pipe, surgery.prune(pipe.unet, preset("bk-sdm-base")), preset("bk-sdm-small"), tmp_path / "x", {})
    other = pretrained.load(str(tiny_folder("sd2")))
    with pytest.raises(UserError, match="differ in attention_head_dim, use_linear_projection"):
        export_pipeline(other, student, a, tmp_path / "x", {})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="is there already"):
        export_pipeline(pipe, student, a, tmp_path / "taken", {})
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


CARD = {
    "teacher": "CompVis/stable-diffusion-v1-4",
    "license": "openrail++",
    "data": "10,274 pairs | a <b>folder</b>",
    "steps": 50_000,
    "recipe": {"lr": 5e-05},
    "costs": {"teacher": {"params": 859_520_964, "macs": {"thop": 338_749_194_240}}, "student": {"params": 482_346_884}},
    "scores": {"teacher": {"fid": 13.05}, "student": {"fid": 15.76, "clip_score": 0.2878}},
}


def test_a_card_says_what_is_known_and_no_more() -> None:
    text = model_card(preset("bk-sdm-tiny"), "StableDiffusionPipeline", "", CARD)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "openrail++"
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    for line in (
        "| teacher | CompVis/stable-diffusion-v1-4 |",
        "| training data | 10,274 pairs \\| a &lt;b>folder&lt;/b> |",
        "| training steps | 50,000 |",
        '| recipe | {"lr": 5e-05} |',
        "| U-Net parameters | 859,520,964 | 482,346,884 |",
        "| MACs of a U-Net step (thop) | 338,749,194,240 |  |",
        "|  | fid | clip_score |",
        "| teacher | 13.05 |  |",
        "- `down_blocks.1`: attention 1, ResNet 1 of the down stage 1",
        "- `mid_block`: the whole mid stage",
        'pipe = StableDiffusionPipeline.from_pretrained("FOLDER")',
    ):
        assert line in body.splitlines(), line
    bare = model_card(preset("mid-removed"), "StableDiffusionPipeline", "a reason", {})
    assert not any(word in bare for word in ("license", "base_model", "## Costs", "## Scores", "## How", "None"))
    assert "from blockprune import load_pipeline" in bare and "(a reason)" in bare
    rows = [{"measure": "fid", "value": 15.76}, {"measure": "is", "n": 30_000}]
    assert "| is |  | 30,000 |" in model_card(Architecture(), "P", "", {"scores": rows})


def test_removed_layers_in_words() -> None:
    assert in_words(arch("up_blocks.0.attentions.1.transformer_blocks.{1,4,5,6}", "up_blocks.0.resnets.1")) == [
        "`up_blocks.0`: ResNet 1, transformer layers 1, 4-6 of attention 1 of the up stage 0"
    ]


def test_a_student_that_is_pruned_again_lacks_both(exported: Callable[[str, Architecture], Exported], tmp_path: Path) -> None:
    """A stock U-Net counts its blocks anew: a pair, a layer and a ResNet with a convolution are found at their teacher's."""
    folder, _ = exported("sd1", preset("bk-sdm-tiny"))
    more = arch("up_blocks.1.{resnets,attentions}.1", "down_blocks.0.attentions.0.transformer_blocks.0", "down_blocks.1.resnets.0")
    student = blockprune.prune(load_pipeline(folder), more)
    blockprune.save(student, tmp_path / "again")
    of_teacher = arch(
        "up_blocks.2.{resnets,attentions}.2", "down_blocks.0.attentions.0.transformer_blocks.0", "down_blocks.1.resnets.0"
    )
    assert pipeline.read_architecture(tmp_path / "again" / "pruning") == preset("bk-sdm-tiny") | of_teacher
    inputs, again = pipeline._probe(student.unet.config), load_pipeline(tmp_path / "again").unet
    assert same_outputs(run(student.unet, inputs), run(again, inputs), again)


@pytest.mark.parametrize("card", [{"costs": [1]}, {"costs": {"student": 3}}, {"scores": 3}, {"scores": [3]}])
def test_a_card_of_another_form_is_refused(card: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the card's (costs|scores) are like"):
        model_card(Architecture(), "P", "", card)


@pytest.fixture
def saved(tiny_folder: Folder, tmp_path: Path) -> Path:
    """A run directory with a student of the tiny SD v1."""
    pipe, a = pretrained.load(str(tiny_folder("sd1"))), preset("bk-sdm-base")
    save_student(surgery.prune(pipe.unet, a), a, tmp_path / "run" / "student")
    asked = {"teacher_model": str(tiny_folder("sd1"))}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"format": 1, "command": "distill", "asked": asked}))
    (tmp_path / "run" / "card.json").write_text(json.dumps({"steps": 77}))
    return tmp_path / "run"


def test_command_exports_a_run(saved: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "x").mkdir()  # an empty folder is free to use
    code, out, err = cli("export", saved, "--out", tmp_path / "x")
    assert code == 0, err
    assert "load it with diffusers" in out
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "x")
    student = pipeline.load_student(saved / "student")
    assert same_outputs(run(pipe.unet, tiny.inputs("sd1")), run(student, tiny.inputs("sd1")), student)
    card = (tmp_path / "x" / "README.md").read_text()
    assert str(tmp_path) not in card and "base_model" not in card
    assert "| training steps | 77 |" in card and f"{student.num_parameters():,}" in card


@pytest.mark.slow
def test_command_exports_a_bare_student(tiny_folder: Folder, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    pipe = pretrained.load(str(tiny_folder("sdxl")))
    a = arch("down_blocks.1.attentions.0")
    save_student(surgery.prune(pipe.unet, a), a, tmp_path / "s")
    code, out, err = cli("export", tmp_path / "s", "--out", tmp_path / "x", "--teacher", tiny_folder("sdxl"))
    assert code == 0, err
    assert "no stock configuration: down_blocks.1 lacks attentions.0 but keeps resnets.0" in out
    assert blockprune.load_pipeline(tmp_path / "x").unet.num_parameters() < pipe.unet.num_parameters()


def test_command_says_what_is_wrong(saved: Path, tmp_path: Path, tiny_folder: Folder, one_line: OneLine) -> None:
    out = tmp_path / "x"
    assert "no student in" in one_line("export", tmp_path / "nowhere", "--out", out)
    assert "give --teacher" in one_line("export", saved / "student", "--out", out)
    assert "is there already" in one_line("export", saved, "--out", saved)
    assert "no model 'nothing'" in one_line("export", saved, "--out", out, "--teacher", "nothing")
    assert "another teacher" in one_line("export", saved, "--out", out, "--teacher", tiny_folder("sd2"))
    assert "a file stands where a folder should be" in one_line("export", saved, "--out", saved / "run.json" / "x")
    (saved / "card.json").write_text("[]")
    assert "card.json': $: expected object, got array" in one_line("export", saved, "--out", out)
    (saved / "card.json").write_text("{")
    assert "cannot read" in one_line("export", saved, "--out", out)
    (saved / "card.json").write_text('{"scores": 1}')
    assert "the card's scores" in one_line("export", saved, "--out", out)
    (saved / "card.json").unlink()
    (saved / "run.json").write_text('{"format": 1, "command": "distill", "asked": {}}')
    assert "give --teacher" in one_line("export", saved, "--out", out)
    (saved / "student" / "architecture.json").write_text("{")
    assert "cannot read" in one_line("export", saved, "--out", out, "--teacher", tiny_folder("sd1"))
    assert not out.exists()


def test_damaged_exports_are_named(exported: Callable[..., Exported], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("sd1", NO_STOCK)[0], tmp_path / "x"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "OtherPipeline"}))
    with pytest.raises(UserError, match="holds a OtherPipeline"):
        load_pipeline(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="cannot load the pipeline"):
        load_pipeline(folder)
    (folder / "pruning" / "block_map.json").unlink()
    with pytest.raises(UserError, match=r"no pruning/block_map\.json"):
        read_block_map(folder)
