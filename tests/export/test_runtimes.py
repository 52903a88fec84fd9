"""Networks outside PyTorch: every format, any batch and size, students with gaps and with fitted maps, and what cannot be."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from common_fixtures import Cli
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.export import ExportedProgram

from blockprune.export.pipeline import export_pipeline, load_pipeline
from blockprune.export.runtimes import FORMAT_PRECISIONS, RUNTIMES, formats
from blockprune.export.runtimes import deploy as deploying
from blockprune.export.runtimes.components import Component, components
from blockprune.export.runtimes.deploy import ALLOWED, Exported, deploy
from blockprune.export.runtimes.formats import FORMATS
from blockprune.export.runtimes.network import OTHERS, RuntimeUNet, in_runtime
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import distance
from blockprune.model.model import Model, of_pipeline

HERE = [name for name, form in FORMATS.items() if all(map(importlib.util.find_spec, form.packages))]
slow = partial(pytest.param, marks=pytest.mark.slow)
QUICK = [name if name == "onnx" else slow(name) for name in HERE]
GAPS = Architecture(frozenset({"down_blocks.1.resnets.0", "mid_block"}), frozenset({("mid_block", "linear")}))
needs_onnx = pytest.mark.skipif("onnx" not in HERE, reason="onnxruntime is not installed")


def student(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy with gaps, and with a map that is not the identity."""
    pruned, draw = surgery.prune(unet, GAPS), torch.Generator().manual_seed(0)
    for p in pruned.mid_block.parameters():
        p.data = torch.randn(p.shape, generator=draw) / 8
    return pruned


@dataclass(frozen=True)
class Written:
    """A small student of SD v1 in a format; tests must not write to its folder."""

    model: Model
    folder: Path
    components: list[Exported]


@pytest.fixture(scope="module")
def small_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose U-Net has two stages."""
    pipe, folder = load_pipeline(tiny_folder("sd1")), tmp_path_factory.mktemp("small")
    pipe.unet = tiny.small_unet("sd1")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(small_folder: Path) -> Model:
    pipe = load_pipeline(small_folder)
    pipe.unet = student(pipe.unet)
    return of_pipeline(pipe)


@pytest.fixture(scope="module", autouse=True)
def graphs_made_once() -> Iterator[None]:
    """The graph of a component is the same for all formats and tests: that of the same weights is not traced again."""
    programs: dict[tuple[object, ...], ExportedProgram] = {}

    def program_of(component: Component) -> ExportedProgram:
        weights = {name: (t.dtype, float(t.double().sum())) for name, t in component.module.state_dict().items()}
        key = (component.name, *sorted(weights.items()))
        if key not in programs:
            programs[key] = formats.program_of(component)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploying, "program_of", program_of)
        yield


@pytest.fixture(scope="module")
def written(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """The student in a format, its U-Net or every component, made once."""
    made: dict[tuple[str, bool], Written] = {}

    def of(name: str, every: bool = False) -> Written:
        if (name, every) not in made:
            folder = tmp_path_factory.mktemp(name) / "out"
            made[name, every] = Written(model, folder, list(deploy(model, name, folder, every=every)))
        return made[name, every]

    return of


def apart(network: RuntimeUNet | torch.nn.Module, unet: UNet2DConditionModel, inputs: dict[str, Any]) -> float:
    with torch.no_grad():
        return distance(network(**inputs, return_dict=False)[0], unet(**inputs, return_dict=False)[0])


def bytes_of_weights(folder: Path) -> int:
    """Of its files but openvino's graph, which the conversions to half precision make larger."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".xml")


def test_the_names_are_those_of_the_formats() -> None:
    assert tuple(FORMATS) == tuple(FORMAT_PRECISIONS)
    assert tuple(OTHERS) == RUNTIMES[2:]


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_every_component_of_a_student_is_written_and_compared(name: str, written: Callable[..., Written]) -> None:
    it = written(name, every=True)
    assert [e.name for e in it.components] == ["unet", "text_encoder", "vae_decoder", "vae_encoder"]
    about = json.loads((it.folder / "export.json").read_text())
    assert (about["runtime"], about["precision"], about["model"]) == (name, "float32", Path(it.model.name).name)
    for e in it.components:
        files = [file for file in (it.folder / e.name).iterdir() if file.name != "config.json"]
        assert (it.folder / e.file) in files
        assert sum(file.stat().st_size for file in files) == e.n_bytes
        assert max(e.real, e.random) <= about["allowed"] == ALLOWED["float32"]
    assert {"tokenizer", "scheduler", "model_index.json"} <= {path.name for path in it.folder.iterdir()}


@pytest.mark.parametrize("name", QUICK)
def test_a_student_with_gaps_and_maps_computes_the_same_there(name: str, written: Callable[..., Written]) -> None:
    """Batches of one and three, and another size than the one that was exported."""
    it, unet = written(name), written(name).model.network
    network = RuntimeUNet(unet, FORMATS[name].load(it.folder / it.components[0].file))
    for batch, size in ((1, (8, 8)), (3, (24, 16))):
        inputs = tiny.inputs("sd1", batch, size, seed=batch)
        assert apart(network, unet, inputs) < ALLOWED["float32"]
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].flip(1) + 1  # the condition is heard
        assert apart(network, unet, inputs) < ALLOWED["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_a_condition_of_several_tensors(name: str, tmp_path: Path) -> None:
    """That of SDXL, whose attentions have several layers."""
    unet = student(tiny.small_unet("sdxl"))
    network = in_runtime(unet, FORMATS[name].runtime, (8, 8), tiny.N_TOKENS, tmp_path / "unet")
    assert apart(network, unet, tiny.inputs("sdxl", 1, (16, 8))) < ALLOWED["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", HERE)
def test_every_family_has_every_format(name: str, kind: str, tmp_path: Path) -> None:
    unet = student(tiny.unet(kind))
    network = in_runtime(unet, FORMATS[name].runtime, (16, 16), tiny.N_TOKENS, tmp_path / "unet")
    assert apart(network, unet, tiny.inputs(kind, 1, (32, 16))) < ALLOWED["float32"]


def test_sdxl_has_two_text_encoders_and_a_pooled_output(tiny_folder: Callable[[str], Path]) -> None:
    model = of_pipeline(load_pipeline(tiny_folder("sdxl")))
    found = {component.name: component for component in components(model, every=True)}
    assert list(found) == ["unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"]
    assert list(found["unet"].example) == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    states, pooled = found["text_encoder_2"].run(found["text_encoder_2"].example)
    condition, _ = model.encode(["a photo", ""])
    (first,) = found["text_encoder"].run(found["text_encoder"].example)
    assert torch.allclose(torch.cat([first, states], -1), condition["encoder_hidden_states"], atol=1e-4)
    assert torch.allclose(pooled, condition["added_cond_kwargs"]["text_embeds"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HERE if name in ("onnx", "openvino")])
def test_half_the_bytes_in_half_precision(name: str, model: Model, written: Callable[..., Written], tmp_path: Path) -> None:
    """And nothing in the file of where it was made."""
    (half,) = deploy(model, name, tmp_path / "half", "float16")
    weights = sum(p.numel() for p in model.network.parameters())
    saved = bytes_of_weights(written(name).folder / "unet") - bytes_of_weights(tmp_path / "half" / "unet")
    assert 1.8 * weights < saved < 2.2 * weights
    assert 1e-5 < max(half.real, half.random) < ALLOWED["float16"]
    assert model.network.dtype == torch.float32
    assert str(Path(torch.__file__).parent).encode() not in (tmp_path / "half" / half.file).read_bytes()


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("limit", [formats.LARGEST_ONNX, 1000])
def test_linear_layers_in_eight_bits(limit: int, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_ONNX", limit)
    (int8,) = deploy(model, "onnx", tmp_path / "int8", "int8")
    assert 1e-4 < max(int8.real, int8.random) < ALLOWED["int8"]
    assert {file.name for file in (tmp_path / "int8" / "unet").iterdir()} - {"model.onnx.data"} == {"model.onnx", "config.json"}


@needs_onnx
@pytest.mark.slow
def test_weights_that_are_too_large_for_one_file_lie_beside_it(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """And are found there when the folder has moved."""
    unet = load_pipeline(small_folder).unet
    weights = 4 * sum(p.numel() for p in unet.parameters())
    monkeypatch.setattr(formats, "LARGEST_ONNX", weights // 2)
    code, out, err = cli("export", small_folder, "--format", "onnx", "--out", tmp_path / "out")
    assert code == 0, err
    assert "unet/model.onnx" in out
    assert "of the output's size from PyTorch on what the model draws" in out
    shutil.move(tmp_path / "out", tmp_path / "moved")
    file, data = (tmp_path / "moved" / "unet" / name for name in ("model.onnx", "model.onnx.data"))
    assert data.stat().st_size > 0.9 * weights
    assert file.stat().st_size + data.stat().st_size < 3 * weights  # half of a tiny network's file is its graph
    assert apart(RuntimeUNet(unet, FORMATS["onnx"].load(file)), unet, tiny.inputs("sd1")) < ALLOWED["float32"]


def test_what_computes_something_else_is_refused(
    model: Model, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """After its steps, each of which is told."""
    export_pipeline(load_pipeline(small_folder), model.network, GAPS, tmp_path / "student", {"model": str(small_folder)})
    monkeypatch.setitem(deploying.ALLOWED, "float32", -1.0)
    code, _, err = cli("export", tmp_path / "student", "--format", "torch-export", "--out", tmp_path / "other")
    assert code == 2, err
    first, *steps, last = err.splitlines()
    assert first == "unet: writing it as torch-export, then loading it there and comparing it with PyTorch"
    assert [line.split(": 1 steps")[0] for line in steps] == ["[1/3] unet: write", "[2/3] unet: load", "[3/3] unet: compare"]
    assert last.startswith("error: the unet computes something else in torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_what_a_format_cannot_say_is_refused(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, one_line: Callable[..., str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such operator\nand more of it")

    monkeypatch.setattr(deploying, "program_of", formats.program_of)
    monkeypatch.setattr(torch.export, "export", broken)
    code, _, err = cli("export", small_folder, "--format", "torch-export", "--out", tmp_path / "out")
    assert code == 2
    assert "torch-export cannot say or run the unet (no such operator" in err.splitlines()[-1]
    cost = one_line("cost", "--model", small_folder, "--latency", "--rounds", "5", "--runtime", "torch-export")
    assert "torch-export cannot say or run the unet (no such operator" in cost
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., str]
) -> None:
    find, gone = importlib.util.find_spec, {"onnx", "onnxscript", "onnxruntime", "openvino"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in gone else find(name, *more))
    onnx, openvino = (
        "onnx needs onnx and onnxscript and onnxruntime, which are missing",
        "openvino needs openvino, which is missing",
    )
    for name, runtime, says in (("onnx", "onnxruntime", onnx), ("openvino", "openvino", openvino)):
        for line in (
            one_line("export", "tiny-digits", "--format", name, "--out", tmp_path / "out"),
            one_line("cost", "--latency", "--runtime", runtime),
            one_line("evaluate", "--runtime", runtime, "--out", tmp_path / "out"),
        ):
            assert f"{says}: pip install 'blockprune[{name}]'" in line


def test_a_compiler_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., str]) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, args in (
        ("aot-inductor", ("export", "tiny-digits", "--format")),
        ("torch-compile", ("cost", "--latency", "--runtime")),
    ):
        line = one_line(*args, name, *(["--out", tmp_path / "out"] if args[0] == "export" else []))
        assert f"{name} needs a C++ compiler, and there is no g++ or clang++" in line


def test_bad_options_are_one_line(tmp_path: Path, one_line: Callable[..., str]) -> None:
    out = ["--out", tmp_path / "out"]
    assert "unknown --precision 'bf8'" in one_line("export", "tiny-digits", "--format", "onnx", "--precision", "bf8", *out)
    assert "unknown --components 'vae'" in one_line("export", "tiny-digits", "--format", "onnx", "--components", "vae", *out)
    assert "no precision 'int8'" in one_line("export", "tiny-digits", "--format", "torch-export", "--precision", "int8", *out)
    assert "are for a runtime's --format" in one_line("export", "tiny-digits", "--precision", "float16", *out)
    assert "no model 'nowhere'" in one_line("export", "nowhere", "--format", "torch-export", *out)
    assert "unknown --runtime 'tensorrt'" in one_line("cost", "--latency", "--runtime", "tensorrt")
    assert "add --latency" in one_line("cost", "--runtime", "openvino")
    assert "leave out --latency" in one_line("evaluate", "--runtime", "torch-export", "--latency", *out)
    assert "unknown --runtime" in one_line("evaluate", "--runtime", "tensorrt", *out)


@pytest.mark.slow
@pytest.mark.parametrize("others", [["torch-export"], ["torch-compile"]])
def test_latency_is_measured_in_turn_in_several_runtimes(others: list[str], cli: Cli, small_folder: Path) -> None:
    names = ["torch", *others]
    args = ["cost", "--model", small_folder, "--arch", "mid_block~linear", "--latency", "--rounds", "5"]
    code, out, err = cli(*args, "--runtime", ",".join(names), "--json")
    assert code == 0, err
    rows = json.loads(out)["runtimes"]
    assert list(rows) == names
    for row in rows.values():
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
        assert row["student"]["n"] == 5


SCORED = [FORMATS[name].runtime for name in HERE if name != "aot-inductor"]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", SCORED)
def test_images_of_a_runtime_are_those_of_pytorch(runtime: str, tmp_path: Path, cli: Cli) -> None:
    args = ["evaluate", "--arch", "*attentions*", "--n-images", "2", "--steps", "2", "--measures", "clip_score", "--out"]
    for name in ("torch", runtime):
        code, _, err = cli(*args, tmp_path / name, "--runtime", name)
        assert code == 0, err
    drawn = [
        np.stack([np.asarray(Image.open(file), dtype=float) for file in sorted((tmp_path / name / "drawn").rglob("*.png"))])
        for name in ("torch", runtime)
    ]
    assert np.abs(drawn[0] - drawn[1]).mean() < 0.5
    code, _, err = cli(*args, tmp_path / runtime)
    assert code == 2
    assert "runtime is" in err
