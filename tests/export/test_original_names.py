"""The names of other tools, and a student as one file in them: diffusers' own converter reads both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from common_fixtures import Cli
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

import blockprune as bp
from blockprune.errors import UserError
from blockprune.export.original_names import OriginalNames, kohya
from blockprune.export.pipeline import save_student
from blockprune.export.single_file import write_single_file
from blockprune.export.stock_config import Stock
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.presets import preset

NO_STOCK = Architecture(frozenset({"down_blocks.1.resnets.0"}))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_weight_has_the_name_that_diffusers_converts_back(kind: str) -> None:
    unet = tiny.unet(kind)
    names = OriginalNames(unet.config)
    renamed = names.rename(unet.state_dict())
    again = convert_ldm_unet_checkpoint(dict(renamed), dict(unet.config))
    assert again.keys() == unet.state_dict().keys()
    assert all(torch.equal(again[key], t) for key, t in unet.state_dict().items())


@pytest.mark.parametrize(
    ("name", "original", "place"),
    [
        ("conv_in", "input_blocks.0.0", "IN00"),
        ("down_blocks.1.attentions.0", "input_blocks.4.1", "IN04"),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight", "IN03"),
        ("down_blocks.3.resnets.1.conv2.bias", "input_blocks.11.0.out_layers.3.bias", "IN11"),
        ("mid_block.resnets.1", "middle_block.2", "M00"),
        ("mid_block", "middle_block", "M00"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight", "OUT02"),
        ("up_blocks.1.upsamplers.0", "output_blocks.5.2", "OUT05"),
        ("up_blocks.3.attentions.2.transformer_blocks.0.attn1", "output_blocks.11.1.transformer_blocks.0.attn1", "OUT11"),
        ("time_embedding.linear_2.weight", "time_embed.2.weight", ""),
    ],
)
def test_names_of_sd_v1(name: str, original: str, place: str) -> None:
    """As in the published checkpoint, whose lists of weights by block run from IN00 over M00 to OUT11."""
    of = OriginalNames(tiny.config("sd1"))
    assert of(name) == original
    assert kohya(original) == place


def test_what_the_original_has_not() -> None:
    of = OriginalNames(tiny.config("sdxl"))
    assert of("up_blocks.0") is None
    assert of("time_proj") is None
    assert of("add_embedding.linear_1.weight") == "label_emb.0.0.weight"
    with pytest.raises(UserError, match="no stage like 'AttnDownBlock2D'"):
        OriginalNames(tiny.config("sd1") | {"down_block_types": ("AttnDownBlock2D",)})
    with pytest.raises(UserError, match=r"'odd\.weight' has no name"):
        of.rename({"odd.weight": torch.zeros(1)})


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return {k.removeprefix("blockprune."): json.loads(v) for k, v in (file.metadata() or {}).items() if k != "format"}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_stock_student_loads_in_diffusers(kind: str, tmp_path: Path) -> None:
    student, path = surgery.prune(tiny.unet(kind), preset("bk-sdm-small")), tmp_path / "student.safetensors"
    found = write_single_file(student, preset("bk-sdm-small"), path)
    assert isinstance(found, Stock)
    about = metadata(path)
    assert Architecture.from_json(about["architecture"]) == preset("bk-sdm-small")
    assert about["layout"] == "stock"
    (tmp_path / "folder" / "unet").mkdir(parents=True)
    (tmp_path / "folder" / "unet" / "config.json").write_text(json.dumps(about["config"]))
    loaded = UNet2DConditionModel.from_single_file(
        str(path), config=str(tmp_path / "folder"), subfolder="unet", local_files_only=True
    )
    inputs = tiny.inputs(kind)
    with torch.no_grad():
        here, there = student(**inputs).sample, loaded(**inputs).sample
    assert torch.allclose(here, there, atol=1e-5 * float(here.abs().max()))


def test_a_student_without_stock_form_keeps_its_places(tmp_path: Path) -> None:
    teacher, path = tiny.unet("sd1"), tmp_path / "student.safetensors"
    student = surgery.prune(teacher, NO_STOCK)
    assert isinstance(write_single_file(student, NO_STOCK, path), str)
    tensors, of = load_file(path), OriginalNames(teacher.config)
    assert tensors.keys() == {f"model.diffusion_model.{of(key)}" for key in student.state_dict()}
    assert metadata(path)["layout"] == "slots"
    assert not any(key.startswith("model.diffusion_model.input_blocks.4.0.in_layers") for key in tensors)


def test_the_command(tmp_path: Path, cli: Cli, one_line: Callable[..., str]) -> None:
    save_student(surgery.prune(tiny.unet("sd1"), NO_STOCK), NO_STOCK, tmp_path / "student")
    args = ["export", tmp_path / "student", "--format", "ldm", "--out"]
    code, out, err = cli(*args, tmp_path / "one.safetensors")
    assert code == 0, err
    assert "no stock configuration" in out
    assert load_file(tmp_path / "one.safetensors")
    assert "is there already" in one_line(*args, tmp_path / "one.safetensors")
    assert "must be a .safetensors file" in one_line(*args, tmp_path / "model.ckpt")
    (tmp_path / "folder").mkdir()
    assert one_line(*args, tmp_path / "folder")
    assert "unknown --format 'onyx'" in one_line(*args[:2], "--format", "onyx", "--out", tmp_path / "x")


@pytest.mark.slow
def test_names_of_an_exported_student_are_its_teachers(
    tiny_folder: Callable[[str], Path], tmp_path: Path, cli: Cli, one_line: Callable[..., str]
) -> None:
    """Its folder, and a run directory with it as pipeline/, say by themselves what --arch says."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    folder = tmp_path / "run" / "pipeline"
    bp.save(bp.prune(bp.load_pipeline(tiny_folder("sd1")), "bk-sdm-small"), folder)
    _, wanted, _ = cli("names", "--model", tiny_folder("sd1"), "--arch", "bk-sdm-small", "--json")
    for model in (folder, tmp_path / "run"):
        code, out, err = cli("names", "--model", model, "--json")
        assert code == 0, err
        assert json.loads(out) == json.loads(wanted) | {"model": str(model)}
    assert "is pruned already: leave out --arch" in one_line("names", "--model", tmp_path / "run", "--arch", "mid_block")


def test_names_as_a_table_and_as_json(cli: Cli) -> None:
    code, out, _ = cli("names", "--model", "sd-v1-5", "--arch", "bk-sdm-small")
    assert code == 0
    (row,) = (line for line in out.splitlines() if " up_blocks.0.resnets.2 " in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("up_blocks.0.resnets.2", "output_blocks.2.0", "OUT02", "", "up_blocks.0.resnets.1")
    ]
    code, out, _ = cli("names", "--model", "sdxl", "--json")
    assert code == 0
    blocks = json.loads(out)["blocks"]
    assert blocks["mid_block.attentions.0.transformer_blocks.9"] == {
        "ldm": "middle_block.1.transformer_blocks.9",
        "single_file": "model.diffusion_model.middle_block.1.transformer_blocks.9",
        "comfyui": "diffusion_model.middle_block.1.transformer_blocks.9",
        "gguf": "middle_block.1.transformer_blocks.9",
        "kohya": "M00",
    }
    assert {row["kohya"] for row in blocks.values()} == {
        *(f"IN{i:02}" for i in range(1, 9)),
        "M00",
        *(f"OUT{i:02}" for i in range(9)),
    }
