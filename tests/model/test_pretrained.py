"""Models from folders, single files and aliases; damaged weights; pruned U-Nets on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from blockprune.cost.components import random_unet
from blockprune.errors import UserError
from blockprune.export.pipeline import WEIGHTS, load_student, save_student
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import same_outputs
from blockprune.model.identity import identity
from blockprune.model.presets import preset
from blockprune.model.pretrained import configs, load

UNET = "unet/diffusion_pytorch_model.safetensors"
Folder = Callable[[str], Path]


@pytest.fixture
def copy_of(tiny_folder: Folder, tmp_path: Path) -> Folder:
    """kind => a tiny pipeline's folder that a test may spoil."""
    return lambda kind: Path(shutil.copytree(tiny_folder(kind), tmp_path / kind))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("kind", ["sd1", "sd1-v", "sd2", "sdxl"])
def test_a_folder_loads_whole(kind: str, tiny_folder: Folder) -> None:
    folder = tiny_folder(kind)
    c, pipe = configs(str(folder)), load(str(folder))
    assert (c.latent(), c.latent("16x32"), c.n_tokens) == ((8, 8), (8, 16), tiny.N_TOKENS)
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if kind == "sd1-v" else "epsilon")
    assert type(pipe).__name__ == ("StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline")
    assert same(pipe.unet, UNet2DConditionModel.from_pretrained(folder / "unet"))
    assert not pipe.unet.training
    image = pipe("3 left", num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 16, 16, 3)


def test_the_precision_is_that_asked_for(tiny_folder: Folder) -> None:
    pipe = load(str(tiny_folder("sdxl")), dtype=torch.bfloat16)
    assert {getattr(pipe, part).dtype for part in pretrained.WEIGHTS} == {torch.bfloat16}


def test_half_precision_files_are_found(copy_of: Folder) -> None:
    folder = copy_of("sd1")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert load(str(folder)).unet.dtype == torch.float32


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
}


def ldm_unet(n_stages: int = 4, n_layers: int = 2) -> dict[str, str]:
    """Diffusers module => name in the original (CompVis) checkpoints, for SD v1's U-Net."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(n_stages):
        for j in range(n_layers):
            for slot, part in enumerate(("resnets", "attentions")):
                names[f"down_blocks.{i}.{part}.{j}"] = f"input_blocks.{1 + i * (n_layers + 1) + j}.{slot}"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (n_layers + 1)}.0.op"
        for j in range(n_layers + 1):
            for slot, part in enumerate(("resnets", "attentions")):
                names[f"up_blocks.{i}.{part}.{j}"] = f"output_blocks.{i * (n_layers + 1) + j}.{slot}"
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (n_layers + 1) + n_layers}.{1 if i == 0 else 2}.conv"
    return names


def to_ldm(pipe: object) -> dict[str, torch.Tensor]:
    """The weights of a tiny SD v1 pipeline as one original-format checkpoint."""
    out = {}
    names = ldm_unet()
    for key, t in pipe.unet.state_dict().items():  # type: ignore[attr-defined]
        prefix = max((n for n in names if key.startswith(n + ".")), key=len)
        rest = key.removeprefix(prefix)
        if ".resnets." in prefix:
            rest = re.sub(r"^\.(\w+)", lambda m: "." + (RESNET | {"conv_shortcut": "skip_connection"})[m[1]], rest)
        out[f"model.diffusion_model.{names[prefix]}{rest}"] = t
    for key, t in pipe.vae.state_dict().items():  # type: ignore[attr-defined]
        key = re.sub(r"(down|up)_blocks\.(\d)\.resnets", lambda m: f"{m[1]}.{m[2] if m[1] == 'down' else 1 - int(m[2])}.block", key)
        key = re.sub(
            r"(down|up)_blocks\.(\d)\.\w+samplers\.0",
            lambda m: f"{m[1]}.{m[2] if m[1] == 'down' else 1 - int(m[2])}.{m[1]}sample",
            key,
        )
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key).replace(
            "conv_shortcut", "nin_shortcut"
        )
        key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm").replace("conv_norm_out", "norm_out")
        key = re.sub(r"to_([qkv])\b", r"\1", key).replace("to_out.0", "proj_out")
        out["first_stage_model." + key] = t[..., None, None] if "attn_1" in key and t.ndim == 2 else t
    for key, t in pipe.text_encoder.state_dict().items():  # type: ignore[attr-defined]
        out["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = t
    return {k: t.contiguous() for k, t in out.items()}


def test_a_single_file_with_its_configurations_beside_it_loads_whole(copy_of: Folder) -> None:
    folder = copy_of("sd1")
    whole = load(str(folder))
    checkpoint = to_ldm(whole)
    save_file(checkpoint, folder / "model.safetensors")
    pipe = load(str(folder / "model.safetensors"))
    assert same(pipe.unet, whole.unet)
    assert same(pipe.vae, whole.vae)
    assert same(pipe.text_encoder, whole.text_encoder)
    assert configs(str(folder / "model.safetensors")).unet == configs(str(folder)).unet
    del checkpoint["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(checkpoint, folder / "less.safetensors")
    with pytest.raises(UserError, match=r"less\.safetensors.*lacks tensors of its configuration"):
        load(str(folder / "less.safetensors"))


def sparse_checkpoint(path: Path, shapes: dict[str, list[int]]) -> str:
    """A safetensors file with a true header over a hole of the right length."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return str(path)


def test_a_single_file_tells_its_family_by_its_tensors(tmp_path: Path) -> None:
    cross = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    v1 = sparse_checkpoint(tmp_path / "v1.safetensors", {cross: [320, 768]})
    xl = sparse_checkpoint(
        tmp_path / "xl.safetensors",
        {"model.diffusion_model.out.2.bias": [4], "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": [1280]},
    )
    assert configs(v1).unet == configs("sd-v1-5").unet
    assert configs(xl).unet == configs("sdxl").unet
    with pytest.raises(UserError, match="noise or velocity"):
        configs(sparse_checkpoint(tmp_path / "v2.safetensors", {cross: [320, 1024]}))
    with pytest.raises(UserError, match="no Stable Diffusion"):
        configs(sparse_checkpoint(tmp_path / "other.safetensors", {"lora_unet.up.weight": [4, 4]}))
    with pytest.raises(UserError, match="stable-diffusion-v1-5/stable-diffusion-v1-5"):
        load(v1)  # its tokenizer is to be had from the hub alone


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights_are_named(keep: int, copy_of: Folder) -> None:
    folder = copy_of("sd1")
    path = folder / UNET
    path.write_bytes(path.read_bytes()[:keep])
    for use in (load, identity):
        with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.safetensors.*fetch it again"):
            use(str(folder))


def test_weights_that_are_not_safetensors_are_named(copy_of: Folder) -> None:
    folder = copy_of("sd1")
    (folder / UNET).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
    with pytest.raises(UserError, match="damaged or not safetensors"):
        load(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_named(part: str, value: float, copy_of: Folder) -> None:
    folder = copy_of("sd1")
    path = pretrained.weight_files(folder, part)[0][0]
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"the weights of '{part}' in .* are not finite in float32, '{re.escape(name)}' first"):
        load(str(folder))


def test_weights_that_half_precision_cannot_hold_are_named(copy_of: Folder) -> None:
    folder = copy_of("sd1")
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"][0] = 1e6
    save_file(tensors, folder / UNET, metadata={"format": "pt"})
    assert load(str(folder)).unet is not None
    with pytest.raises(UserError, match=r"not finite in float16, 'conv_in\.weight' first"):
        load(str(folder), dtype=torch.float16)


def test_weights_of_a_single_file_that_are_not_finite_are_named(copy_of: Folder) -> None:
    folder = copy_of("sd1")
    checkpoint = to_ldm(load(str(folder)))
    checkpoint["model.diffusion_model.out.2.bias"][0] = torch.nan
    save_file(checkpoint, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors' are not finite in float32, 'conv_out.bias' first"):
        load(str(folder / "model.safetensors"))


def test_weights_are_regular_files(copy_of: Folder, tmp_path: Path) -> None:
    folder = copy_of("sd1")
    (folder / UNET).unlink()
    os.mkfifo(folder / UNET)
    for use in (load, identity):
        with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.safetensors' is no regular file"):
            use(str(folder))
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no model"):
        load(str(tmp_path / "x.safetensors"))


def test_missing_and_pickled_weights_are_named(copy_of: Folder) -> None:
    folder = copy_of("sd1")
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights of 'unet'.*pickled \.bin.*put unet/diffusion_pytorch_model\.safetensors"):
        load(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_that_lacks_tensors_of_its_configuration_is_refused(part: str, copy_of: Folder) -> None:
    folder = copy_of("sd1")
    path = pretrained.weight_files(folder, part)[0][0]
    tensors = load_file(path)
    lost = next(k for k in tensors if k.endswith("weight"))
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"(?=.*'{part}')(?=.*lack 1 tensors)(?=.*random)"):
        load(str(folder))


def test_a_pruned_folder_with_the_full_configuration_is_refused(copy_of: Folder) -> None:
    folder = copy_of("sd1")
    arch = preset("bk-sdm-base")
    UNet2DConditionModel.save_pretrained(surgery.prune(tiny.unet("sd1"), arch), folder / "unet")  # as other tools save it
    with pytest.raises(UserError, match=r"lack 244 tensors.*re-create removed blocks at random"):
        load(str(folder))
    (folder / "unet" / "architecture.json").write_text(arch.dumps())
    for use in (load, configs, identity):
        with pytest.raises(UserError, match="pruned U-Net: give its teacher"):
            use(str(folder))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "cannot read"),
        (lambda f: (f / "model_index.json").write_text("[]"), "expected object, got array"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "holds a FluxPipeline"),
        (lambda f: (f / "unet/config.json").unlink(), "no unet/config.json"),
        (lambda f: (f / "unet/config.json").write_text('{"_class_name": "UNet2DModel"}'), "holds a UNet2DModel"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "no scheduler"),
    ],
)
def test_bad_folders_are_explained(spoil: Callable[[Path], object], match: str, copy_of: Folder) -> None:
    folder = copy_of("sd1")
    spoil(folder)
    for use in (configs, load):
        with pytest.raises(UserError, match=match):
            use(str(folder))


def test_names_that_stand_for_nothing() -> None:
    with pytest.raises(UserError, match=r"no model 'sd-v1-9': did you mean sd-v1-"):
        configs("sd-v1-9")
    with pytest.raises(UserError, match=r"no model '\./nowhere'"):
        load("./nowhere")


@pytest.mark.parametrize("model", ["sd-v1-4", "someone/some-model"])
def test_weights_not_to_be_had_are_one_line_that_says_how(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo: str, **options: object) -> str:
        raise OSError("no connection")

    monkeypatch.setattr(pretrained, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"no weights of '.*run `hf download .*--model DIR") as caught:
        load(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["500x", "17", "0", "8x8x8", "-16", "big"])
def test_bad_resolutions(text: str, tiny_folder: Folder) -> None:
    with pytest.raises(UserError, match="multiple of 2"):
        configs(str(tiny_folder("sd1"))).latent(text)


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("sd1", "bk-sdm-base"),
        ("sd1", "bk-sdm-tiny"),
        *(pytest.param(*student, marks=pytest.mark.slow) for student in (("sd2", "mid-removed"), ("sdxl", "ssd-1b"))),
    ],
)
def test_a_student_comes_back_equal(kind: str, arch: str, tmp_path: Path) -> None:
    student = surgery.prune(tiny.unet(kind), preset(arch))
    save_student(student, preset(arch), tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert same(student, again)
    with torch.no_grad():
        x = tiny.inputs(kind)
        assert same_outputs(student(**x).sample, again(**x).sample, student)
    with pytest.raises(OSError, match=r"blockprune\.export\.pipeline\.load_student"):
        UNet2DConditionModel.from_pretrained(tmp_path / "s")


def test_a_masked_teacher_in_half_precision_is_saved_as_its_student(tmp_path: Path) -> None:
    teacher, arch = tiny.unet("sd1").to(torch.bfloat16), Architecture(frozenset({"down_blocks.1.resnets.0"}))
    with surgery.removed(teacher, arch):
        save_student(teacher, arch, tmp_path)
    assert same(load_student(tmp_path), surgery.prune(teacher, arch))


def test_a_student_of_another_architecture_is_refused(tmp_path: Path) -> None:
    base, small = preset("bk-sdm-base"), preset("bk-sdm-small")
    student = surgery.prune(tiny.unet("sd1"), base)
    with pytest.raises(UserError, match="46 tensors beyond its architecture"):
        save_student(student, small, tmp_path)
    with pytest.raises(UserError, match="lacks 244 tensors"):
        save_student(student, Architecture(), tmp_path)
    save_student(student, base, tmp_path)
    (tmp_path / "architecture.json").write_text(preset("mid-removed").dumps())
    with pytest.raises(UserError, match=r"pruned_unet\.safetensors lacks"):
        load_student(tmp_path)
    (tmp_path / "architecture.json").unlink()
    with pytest.raises(UserError, match=r"no architecture\.json"):
        load_student(tmp_path)


def test_damaged_students_are_named(tmp_path: Path) -> None:
    arch = preset("mid-removed")
    save_student(surgery.prune(tiny.unet("sd1"), arch), arch, tmp_path)
    path = tmp_path / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"pruned_unet\.safetensors' is damaged"):
        load_student(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="no pruned weights"):
        load_student(tmp_path)


def test_random_weights_are_seeded_and_finite() -> None:
    config, arch = tiny.config("sdxl"), preset("ssd-1b")
    a, b, c = (random_unet(config, arch, seed=s) for s in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)
    with torch.no_grad():
        out = a(**tiny.inputs("sdxl")).sample
    assert torch.isfinite(out).all()
    assert 0.01 < out.std() < 100
