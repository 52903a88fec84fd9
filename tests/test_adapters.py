"""A teacher's LoRA on its student: which weights arrive, under which names, and what of it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blockprune import checkpoints, surgery
from blockprune.adapters import METADATA, check_fits, map_lora
from blockprune.arch import Architecture
from blockprune.compare import same_outputs
from blockprune.errors import UserError
from blockprune.export import export_pipeline, load_pipeline
from blockprune.presets import expand, preset
from blockprune.stock import BlockMap, Stock, expressible, slots

Folder = Callable[[str], Path]
Cli = Callable[..., tuple[int, str, str]]
TARGETS = ["to_q", "to_v", "conv1", "conv_in"]
SLOTS = Architecture(frozenset({"down_blocks.1.attentions.1", "down_blocks.1.resnets.0"}))


def run(unet: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return unet(**tiny.inputs("sd1")).sample


@pytest.fixture(scope="module")
def lora(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny SD v1 as diffusers saves it: U-Net and text encoder, ranks that differ by block, no zero weight."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder("sd1"))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, rank_pattern={"up_blocks.3.attentions.2.*to_q": 4})
    pipe.unet.add_adapter(config)
    text = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])
    pipe.text_encoder.add_adapter(text)
    torch.manual_seed(0)
    for part in (pipe.unet, pipe.text_encoder):
        for name, p in part.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    folder = tmp_path_factory.mktemp("lora")
    parts = {name: get_peft_model_state_dict(getattr(pipe, name)) for name in ("unet", "text_encoder")}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    return next(folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def exported(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Path]:
    """Architecture => an exported tiny SD v1 without its blocks."""
    made: dict[str, Path] = {}

    def folder(arch: Architecture) -> Path:
        if arch.key not in made:
            pipe = checkpoints.load(str(tiny_folder("sd1")))
            made[arch.key] = tmp_path_factory.mktemp("exports") / "model"
            export_pipeline(pipe, surgery.prune(pipe.unet, arch), arch, made[arch.key], {})
        return made[arch.key]

    return folder


def blocks_of(arch: Architecture, config: dict[str, Any]) -> BlockMap:
    found = expressible(config, arch)
    return found.blocks if isinstance(found, Stock) else slots(config, arch)


@pytest.mark.parametrize("arch", [preset("bk-sdm-tiny"), preset("bk-sdm-small"), SLOTS], ids=["tiny", "small", "slots"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_teachers_lora_arrives_in_its_student(
    arch: Architecture, with_metadata: bool, lora: Path, exported: Callable[[Architecture], Path], tmp_path: Path, cli: Cli
) -> None:
    """Equal weights behind every kept module, none elsewhere, and the outputs of the masked teacher that has the same LoRA."""
    source = lora
    if not with_metadata:
        source = tmp_path / "bare.safetensors"
        save_file(load_file(lora), source, metadata={"format": "pt"})
    code, out, err = cli("map-lora", source, "--model", exported(arch), "--out", tmp_path / "new" / "mapped.safetensors")
    assert code == 0, err
    assert "of removed blocks dropped" in out
    pipe = load_pipeline(exported(arch))
    before = run(pipe.unet)
    pipe.load_lora_weights(tmp_path / "new", weight_name="mapped.safetensors", adapter_name="x")
    assert not same_outputs(run(pipe.unet), before, pipe.unet)
    arrived = {f"unet.{k}": t for k, t in get_peft_model_state_dict(pipe.unet, adapter_name="x").items()}
    blocks, wanted = blocks_of(arch, tiny.config("sd1")), {}
    for key, t in load_file(lora).items():
        new = blocks.new_name(key.removeprefix("unet."))
        if key.startswith("unet.") and new is not None:
            wanted["unet." + new] = t
    assert arrived.keys() == wanted.keys() and len(wanted) > 40
    assert all(torch.equal(arrived[k], wanted[k]) for k in wanted)
    scales = {m.scaling["x"] for m in pipe.unet.modules() if hasattr(m, "scaling")}
    assert scales == ({3 / 2, 3 / 4} if with_metadata else {1.0})


def test_the_report_and_the_text_encoder(lora: Path) -> None:
    tensors, blocks = load_file(lora), blocks_of(preset("bk-sdm-tiny"), tiny.config("sd1"))
    mapped = map_lora(tensors, blocks)
    assert len(mapped.tensors) + len(mapped.dropped) == len(tensors)
    assert all("down_blocks.3." in k or "mid_block" in k or "up_blocks.0." in k or ".1." in k for k in mapped.dropped)
    tail = "transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert mapped.renamed[f"unet.up_blocks.1.attentions.2.{tail}"] == f"unet.up_blocks.0.attentions.1.{tail}"
    text = {k for k in tensors if k.startswith("text_encoder.")}
    assert text and all(mapped.tensors[k] is tensors[k] for k in text)
    assert not text & {*mapped.renamed, *mapped.dropped}
    assert mapped.metadata == {}


def test_nothing_removed_changes_nothing(lora: Path) -> None:
    tensors = load_file(lora)
    mapped = map_lora(tensors, BlockMap({}, frozenset()))
    assert mapped.tensors == tensors and not mapped.renamed and not mapped.dropped


STYLES = [
    "unet.up_blocks.1.{}.to_q.lora_A.weight",
    "unet.up_blocks.1.{}.to_q.lora.down.weight",
    "unet.up_blocks.1.{}.to_q.alpha",
    "unet.up_blocks.1.{}.processor.to_q_lora.down.weight",
    "base_model.model.up_blocks.1.{}.to_q.lora_A.weight",
    "base_model.model.unet.up_blocks.1.{}.to_q.lora_A.weight",
    "up_blocks.1.{}.to_q.lora_magnitude_vector",
]


@pytest.mark.parametrize("style", STYLES)
def test_styles_of_keys(style: str) -> None:
    old, gone = (style.format(f"attentions.{i}.transformer_blocks.0.attn1") for i in (2, 1))
    mapped = map_lora({old: torch.ones(1), gone: torch.ones(1)}, blocks_of(preset("bk-sdm-tiny"), tiny.config("sd1")))
    assert dict(mapped.renamed) == {old: old.replace("up_blocks.1.attentions.2", "up_blocks.0.attentions.1")}
    assert mapped.dropped == (gone,)


def test_renumbered_layers() -> None:
    arch = Architecture(frozenset(expand("up_blocks.0.attentions.2.transformer_blocks.{0,3}")))
    blocks = blocks_of(arch, tiny.config("sdxl"))
    keys = [f"unet.up_blocks.0.attentions.2.transformer_blocks.{i}.attn1.to_q.lora_A.weight" for i in range(10)]
    mapped = map_lora({key: torch.full((1,), i) for i, key in enumerate(keys)}, blocks)
    assert [int(mapped.tensors[key]) for key in keys[:8]] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert mapped.dropped == (keys[0], keys[3])


def test_patterns_follow_their_modules(lora: Path) -> None:
    with safe_open(lora, framework="pt") as file:
        metadata = file.metadata()
    mapped = map_lora(load_file(lora), blocks_of(preset("bk-sdm-tiny"), tiny.config("sd1")), metadata)
    config = json.loads(mapped.metadata[METADATA])
    targets = config["unet.target_modules"]
    assert targets == sorted({k.removeprefix("unet.").split(".lora_")[0] for k in mapped.tensors if k.startswith("unet.")})
    assert config["unet.lora_alpha"] == 3
    assert set(config["unet.rank_pattern"].values()) == {4}
    assert all(p.startswith(r"^up_blocks\.2\.attentions\.1\.") for p in config["unet.rank_pattern"])


def test_keys_that_are_no_lora_of_this_u_net() -> None:
    blocks = blocks_of(preset("mid-removed"), tiny.config("sd1"))
    with pytest.raises(UserError, match="kohya file"):
        map_lora({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(1)}, blocks)
    with pytest.raises(UserError, match=r"'transformer\.x' is no LoRA key"):
        map_lora({"transformer.x": torch.ones(1)}, blocks)
    with pytest.raises(UserError, match=r"all 1 tensors .* nothing is left"):
        map_lora({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(1)}, blocks)
    key = "unet.conv_in.lora_A.weight"
    for bad in ("{", "[]"):
        with pytest.raises(UserError, match="metadata is damaged"):
            map_lora({key: torch.ones(1)}, blocks, {METADATA: bad})
    unet = tiny.unet("sd1")
    check_fits(map_lora({key: torch.ones(2, 4, 3, 3)}, blocks), unet)
    with pytest.raises(UserError, match=r"of width 5, and 'conv_in' of width 4"):
        check_fits(map_lora({key: torch.ones(2, 5, 3, 3)}, blocks), unet)
    with pytest.raises(UserError, match=r"adapts 'down_blocks\.7\.x'"):
        check_fits(map_lora({"unet.down_blocks.7.x.lora_A.weight": torch.ones(2, 5)}, blocks), unet)


def test_command_says_what_is_wrong(
    lora: Path, exported: Callable[[Architecture], Path], tiny_folder: Folder, tmp_path: Path, one_line: Callable[..., str]
) -> None:
    model, out = exported(preset("bk-sdm-tiny")), tmp_path / "x.safetensors"
    assert "no weights file" in one_line("map-lora", tmp_path / "no.safetensors", "--model", model, "--out", out)
    assert "no pruning/block_map.json" in one_line("map-lora", lora, "--model", tiny_folder("sd1"), "--out", out)
    assert "must be a .safetensors file" in one_line("map-lora", lora, "--model", model, "--out", tmp_path)
    assert "another file than the LoRA" in one_line("map-lora", lora, "--model", model, "--out", lora)
    assert "cannot write to" in one_line("map-lora", lora, "--model", model, "--out", lora / "x.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(lora.read_bytes()[:-7])
    assert "is damaged" in one_line("map-lora", broken, "--model", model, "--out", out)
    save_file({"x": torch.ones(1)}, broken)
    assert "'x' is no LoRA key" in one_line("map-lora", broken, "--model", model, "--out", out)
    save_file({"unet.down_blocks.0.attentions.9.proj_in.lora_A.weight": torch.ones(2, 8)}, broken)
    assert "made for another model" in one_line("map-lora", broken, "--model", model, "--out", out)
    assert not out.exists() and {p.name for p in tmp_path.iterdir()} == {"broken.safetensors"}
