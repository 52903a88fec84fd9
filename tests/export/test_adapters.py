"""A teacher's LoRA or IP-Adapter on its student: what arrives, under which names and numbers, and that it computes the same."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blockprune.errors import UserError
from blockprune.export.adapters import METADATA, check_fits, map_lora
from blockprune.export.pipeline import export_pipeline, load_pipeline
from blockprune.export.stock_config import BlockMap, Stock, expressible, slots
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import distance, same_outputs
from blockprune.model.presets import expand, preset

Folder = Callable[[str], Path]
Cli = Callable[..., tuple[int, str, str]]
ADAPTER = "adapter_model.safetensors"
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
            pipe = pretrained.load(str(tiny_folder("sd1")))
            made[arch.key] = tmp_path_factory.mktemp("exports") / "model"
            export_pipeline(pipe, surgery.prune(pipe.unet, arch), arch, made[arch.key], {})
        return made[arch.key]

    return folder


def blocks_of(arch: Architecture, config: dict[str, Any]) -> BlockMap:
    found = expressible(config, arch)
    return found.blocks if isinstance(found, Stock) else slots(config, arch)


@pytest.mark.parametrize(
    "arch",
    [*(pytest.param(preset(name), marks=pytest.mark.slow) for name in ("bk-sdm-tiny", "bk-sdm-small")), SLOTS],
    ids=["tiny", "small", "slots"],
)
@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_teachers_lora_arrives_in_its_student(
    arch: Architecture, with_metadata: bool, lora: Path, exported: Callable[[Architecture], Path], tmp_path: Path, cli: Cli
) -> None:
    """Equal weights behind every kept module, none elsewhere, and the outputs of the masked teacher that has the same LoRA."""
    source = lora
    if not with_metadata:
        source = tmp_path / "bare.safetensors"
        save_file(load_file(lora), source, metadata={"format": "pt"})
    code, out, err = cli("map-adapter", source, "--model", exported(arch), "--out", tmp_path / "new" / "mapped.safetensors")
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
    blocks = blocks_of(preset("bk-sdm-tiny"), tiny.config("sd1"))
    mapped = map_lora({old: torch.ones(1), gone: torch.ones(1)}, blocks, config={"lora_alpha": 1} if "base_model" in old else None)
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
        with pytest.raises(UserError, match="cannot read the LoRA's metadata"):
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
    assert "no weights file" in one_line("map-adapter", tmp_path / "no.safetensors", "--model", model, "--out", out)
    assert "no pruning/block_map.json" in one_line("map-adapter", lora, "--model", tiny_folder("sd1"), "--out", out)
    assert "--out must be a file" in one_line("map-adapter", lora, "--model", model, "--out", tmp_path)
    assert "must be a .safetensors file" in one_line("map-adapter", lora, "--model", model, "--out", tmp_path / "x.bin")
    assert "another file than the adapter" in one_line("map-adapter", lora, "--model", model, "--out", lora)
    assert "a file stands where a folder should be" in one_line(
        "map-adapter", lora, "--model", model, "--out", lora / "x.safetensors"
    )
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(lora.read_bytes()[:-7])
    assert "is damaged" in one_line("map-adapter", broken, "--model", model, "--out", out)
    save_file({"x": torch.ones(1)}, broken)
    assert "'x' is no LoRA key" in one_line("map-adapter", broken, "--model", model, "--out", out)
    save_file({"unet.down_blocks.0.attentions.9.proj_in.lora_A.weight": torch.ones(2, 8)}, broken)
    assert "made for another model" in one_line("map-adapter", broken, "--model", model, "--out", out)
    broken.unlink()
    os.mkfifo(broken)
    assert "is a pipe or a device" in one_line("map-adapter", broken, "--model", model, "--out", out)
    assert not out.exists() and {p.name for p in tmp_path.iterdir()} == {"broken.safetensors"}


ALPHAS = {"up_blocks.1.*to_q": 7, r"down_blocks\.1\.attentions\.0\..*": 11}
SAVED = ["conv_out", "mid_block.resnets.0.conv1"]
PEFT_KINDS: dict[str, Any] = {
    "patterns": LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, rank_pattern={"up_blocks.3.*to_q": 4}, alpha_pattern=ALPHAS),
    "rank-stabilised": LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, use_rslora=True, alpha_pattern=ALPHAS),
    "dora": LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_out.0"], use_dora=True, alpha_pattern=ALPHAS),
    "whole-modules": LoraConfig(r=2, target_modules=r".*up_blocks.*to_q", modules_to_save=SAVED),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=TARGETS, alpha_pattern=ALPHAS),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=TARGETS, exclude_modules=["conv_in"], alpha_pattern=ALPHAS),
}


def trained_by_peft(unet: UNet2DConditionModel, config: Any, folder: Path) -> UNet2DConditionModel:
    """`unet` with an adapter that changes every output, also saved to `folder` as peft does."""
    model = get_peft_model(unet, copy.deepcopy(config))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in name:
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
    model.save_pretrained(folder)
    return unet.eval()


@pytest.mark.parametrize("arch", [pytest.param(preset("bk-sdm-tiny"), marks=pytest.mark.slow), SLOTS], ids=["stock", "slots"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_a_folder_of_peft_computes_what_it_did(
    kind: str, arch: Architecture, exported: Callable[[Architecture], Path], tiny_folder: Folder, tmp_path: Path, cli: Cli
) -> None:
    """The masked teacher with its adapter and the student with the mapped one, each loaded by peft."""
    teacher = trained_by_peft(pretrained.load(str(tiny_folder("sd1"))).unet, PEFT_KINDS[kind], tmp_path / "teacher")
    with surgery.removed(teacher, arch):
        wanted = run(teacher)
    code, _, err = cli("map-adapter", tmp_path / "teacher", "--model", exported(arch), "--out", tmp_path / "new" / ADAPTER)
    assert code == 0, err

    def student() -> UNet2DConditionModel:
        return load_pipeline(exported(arch)).unet

    bare = student()
    student_with = PeftModel.from_pretrained(student(), tmp_path / "new").eval()
    assert same_outputs(run(student_with), wanted, bare)
    assert distance(run(bare), wanted) > 0.01
    if (kind, arch) == ("rank-stabilised", preset("bk-sdm-tiny")):  # the teacher's configuration loads and names other blocks
        shutil.copy(tmp_path / "teacher" / "adapter_config.json", tmp_path / "new")
        other = PeftModel.from_pretrained(student(), tmp_path / "new").eval()
        assert distance(run(other), wanted) > 0.01


def test_what_peft_needs_is_asked_for(
    exported: Callable[[Architecture], Path], tiny_folder: Folder, tmp_path: Path, one_line: Callable[..., str]
) -> None:
    folder, out, model = tmp_path / "teacher", tmp_path / "out" / ADAPTER, exported(preset("bk-sdm-tiny"))
    trained_by_peft(pretrained.load(str(tiny_folder("sd1"))).unet, PEFT_KINDS["patterns"], folder)
    beside = one_line("map-adapter", folder, "--model", model, "--out", folder / "x.safetensors")
    assert "must be in another folder than the adapter, whose adapter_config.json would be replaced" in beside
    config = json.loads((folder / "adapter_config.json").read_text())

    def said(**changes: Any) -> str:
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return one_line("map-adapter", folder / ADAPTER, "--model", model, "--out", out)

    assert "of peft's kind 'IA3': only LORA" in said(peft_type="IA3")
    assert "expected regular expressions, got '('" in said(alpha_pattern={"(": 3})
    assert "$.alpha_pattern: expected object" in said(alpha_pattern=[3])
    (folder / "adapter_config.json").write_text("[]")
    assert "expected object" in one_line("map-adapter", folder, "--model", model, "--out", out)
    (folder / "adapter_config.json").unlink()
    asked = one_line("map-adapter", folder, "--model", model, "--out", out)
    assert "peft's style, and their scaling is in adapter_config.json: put that file beside them" in asked
    save_file({}, folder / ADAPTER)
    assert "holds no tensors" in one_line("map-adapter", folder, "--model", model, "--out", out)
    assert not out.parent.exists()


def image_adapter(unet: UNet2DConditionModel, with_lora: bool = False) -> dict[str, torch.Tensor]:
    """An IP-Adapter's file for `unet`: one image token projection, and keys and values of every cross-attention."""
    draw, width, cross = torch.Generator().manual_seed(0), 6, unet.config.cross_attention_dim
    out = {
        "image_proj.proj.weight": torch.randn(4 * cross, width, generator=draw),
        "image_proj.proj.bias": torch.randn(4 * cross, generator=draw),
        "image_proj.norm.weight": torch.ones(cross),
        "image_proj.norm.bias": torch.zeros(cross),
    }
    for i, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            for side in ("k", "v"):
                out[f"ip_adapter.{i}.to_{side}_ip.weight"] = torch.randn(attention.to_k.weight.shape, generator=draw)
        for part in ("q", "k", "v", "out") if with_lora else ():
            layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
            out[f"ip_adapter.{i}.to_{part}_lora.down.weight"] = torch.randn(2, layer.in_features, generator=draw)
            out[f"ip_adapter.{i}.to_{part}_lora.up.weight"] = torch.randn(layer.out_features, 2, generator=draw)
    return out


def run_with_image(pipe: Any, folder: Path, name: str, arch: Architecture | None = None) -> torch.Tensor:
    """The U-Net's output with the IP-Adapter in `folder` and an image."""
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=name, image_encoder_folder=None)
    inputs = tiny.inputs("sd1")
    image = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))
    with surgery.removed(pipe.unet, arch or Architecture()), torch.no_grad():
        return pipe.unet(**inputs, added_cond_kwargs={"image_embeds": [image]}).sample


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "face-id"])
@pytest.mark.parametrize(
    "arch",
    [*(pytest.param(preset(name), marks=pytest.mark.slow) for name in ("bk-sdm-tiny", "bk-sdm-small")), SLOTS],
    ids=["tiny", "small", "slots"],
)
def test_a_teachers_ip_adapter_arrives_in_its_student(
    arch: Architecture, with_lora: bool, exported: Callable[[Architecture], Path], tiny_folder: Folder, tmp_path: Path, cli: Cli
) -> None:
    teacher = pretrained.load(str(tiny_folder("sd1")))
    tensors = image_adapter(teacher.unet, with_lora)
    save_file(tensors, tmp_path / "ip.safetensors")
    wanted = run_with_image(teacher, tmp_path, "ip.safetensors", arch)
    code, out, err = cli(
        "map-adapter", tmp_path / "ip.safetensors", "--model", exported(arch), "--out", tmp_path / "new.safetensors"
    )
    assert code == 0, err
    assert "of removed blocks dropped" in out
    student = load_pipeline(exported(arch))
    n_attentions = len(student.unet.attn_processors)
    mapped = load_file(tmp_path / "new.safetensors")
    assert len(mapped) == 4 + n_attentions * (9 if with_lora else 1)
    assert all(torch.equal(mapped[key], tensors[key]) for key in tensors if key.startswith("image_proj."))
    assert same_outputs(run_with_image(student, tmp_path, "new.safetensors"), wanted, student.unet)
    with pytest.raises((RuntimeError, ValueError), match="shape"):  # as it is, its numbers mean other attentions
        run_with_image(load_pipeline(exported(arch)), tmp_path, "ip.safetensors")


def test_an_ip_adapter_of_another_model_is_refused(
    exported: Callable[[Architecture], Path], tmp_path: Path, one_line: Callable[..., str]
) -> None:
    good = image_adapter(tiny.unet("sd1"))
    folder = exported(preset("bk-sdm-tiny"))

    def said(changes: dict[str, torch.Tensor], drop: str = "-") -> str:
        save_file({k: t for k, t in (good | changes).items() if not k.startswith(drop)}, tmp_path / "ip.safetensors")
        return one_line("map-adapter", tmp_path / "ip.safetensors", "--model", folder, "--out", tmp_path / "x.safetensors")

    assert "no attention of that number" in said({"ip_adapter.33.to_k_ip.weight": torch.ones(8, 8)})
    assert "no attention of that number" in said({"ip_adapter.2.to_k_ip.weight": torch.ones(8, 8)})
    assert "has the shape (9, 8), 'down_blocks.0.attentions.0" in said({"ip_adapter.1.to_k_ip.weight": torch.ones(9, 8)})
    for key in ("ip_adapter.x.to_k_ip.weight", "ip_adapter.²", "unet.conv_in.lora_A.weight"):
        assert "is no key of an IP-Adapter" in said({key: torch.ones(1)})
    assert "nothing is left of the IP-Adapter" in said({}, drop="ip_adapter.")
    teacher = Path(shutil.copytree(folder, tmp_path / "old")) / "pruning" / "teacher.json"
    teacher.unlink()
    save_file(good, tmp_path / "ip.safetensors")
    asked = one_line("map-adapter", tmp_path / "ip.safetensors", "--model", tmp_path / "old", "--out", tmp_path / "x.safetensors")
    assert "does not say what its teacher was: export the student again" in asked
    assert not (tmp_path / "x.safetensors").exists()
