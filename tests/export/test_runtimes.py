"""Networks outside PyTorch: every format, any batch and size, students with gaps and with fitted maps, and what cannot be."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import Cli
from PIL import Image

from blockprune.cost.components import unet_inputs
from blockprune.errors import UserError
from blockprune.export.pipeline import load_pipeline
from blockprune.export.runtimes import deploy as deploying
from blockprune.export.runtimes.components import components
from blockprune.export.runtimes.deploy import ALLOWED, deploy
from blockprune.export.runtimes.formats import FORMATS, format_of
from blockprune.export.runtimes.network import RUNTIMES, RuntimeUNet, in_runtime
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import distance
from blockprune.model.model import of_pipeline

HERE = [name for name, form in FORMATS.items() if all(map(importlib.util.find_spec, form.packages)) and name != "aot-inductor"]
GAPS = Architecture(frozenset({"down_blocks.1.resnets.0", "mid_block"}), frozenset({("mid_block", "linear")}))


@pytest.mark.parametrize("name", HERE)
def test_a_student_with_gaps_and_maps_computes_the_same_there(name: str, tmp_path: Path) -> None:
    """Batches of one and three, and another size than the one that was exported."""
    model = of_pipeline(load_pipeline("tiny-digits"))
    unet = surgery.prune(model.network, GAPS)
    network = in_runtime(unet, FORMATS[name].runtime, model.latent, model.graph.n_tokens, tmp_path / "unet")
    assert isinstance(network, RuntimeUNet)
    for batch, size in ((1, (16, 16)), (3, (32, 16))):
        inputs = unet_inputs(unet.config, size, model.graph.n_tokens, batch, "cpu")
        inputs["sample"] = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = unet(**inputs, return_dict=False)[0]
        assert distance(network(**inputs)[0], expected) < ALLOWED["float32"]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_every_family_becomes_a_program(kind: str, tmp_path: Path) -> None:
    unet = surgery.prune(tiny.unet(kind), GAPS)
    network = in_runtime(unet, "torch-export", (16, 16), tiny.N_TOKENS, tmp_path / "unet")
    inputs = tiny.inputs(kind, 1, (32, 16))
    with torch.no_grad():
        expected = unet(**inputs, return_dict=False)[0]
    assert distance(network(**inputs)[0], expected) < ALLOWED["float32"]


def test_every_component_is_written_and_compared(tmp_path: Path) -> None:
    model = of_pipeline(load_pipeline("tiny-digits"))
    done = list(deploy(model, "torch-export", tmp_path / "out", every=True))
    assert [e.name for e in done] == ["unet", "text_encoder", "vae_decoder", "vae_encoder"]
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (about["runtime"], about["precision"], about["model"]) == ("torch-export", "float32", "tiny-digits")
    for e in done:
        assert (tmp_path / "out" / e.file).stat().st_size == e.n_bytes
        assert max(e.real, e.random) <= about["allowed"]
    assert {"tokenizer", "scheduler", "model_index.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


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


@pytest.mark.parametrize("name", [n for n in HERE if n != "torch-export"])
def test_half_the_bytes_in_half_precision(name: str, tmp_path: Path) -> None:
    """And nothing in the file of where it was made."""
    model = of_pipeline(load_pipeline("tiny-digits"))
    (half,) = deploy(model, name, tmp_path / "half", "float16")
    weights = sum(p.numel() for p in model.network.parameters())
    assert 2 * weights < half.n_bytes < 3 * weights
    assert 1e-5 < max(half.real, half.random) < ALLOWED["float16"]
    assert model.network.dtype == torch.float32
    assert str(Path(torch.__file__).parent).encode() not in (tmp_path / "half" / half.file).read_bytes()


@pytest.mark.skipif("onnx" not in HERE, reason="onnxruntime is not installed")
def test_linear_layers_in_eight_bits(tmp_path: Path) -> None:
    (int8,) = deploy(of_pipeline(load_pipeline("tiny-digits")), "onnx", tmp_path / "int8", "int8")
    assert 1e-4 < max(int8.real, int8.random) < ALLOWED["int8"]


def test_what_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deploying.ALLOWED, "float32", -1.0)
    with pytest.raises(UserError, match="the unet computes something else in torch-export"):
        list(deploy(of_pipeline(load_pipeline("tiny-digits")), "torch-export", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_runtime_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx needs onnx and onnxscript and onnxruntime, .*: pip install 'blockprune\[onnx\]'"):
        format_of("onnx")
    with pytest.raises(UserError, match=r"pip install 'blockprune\[openvino\]'"):
        format_of("openvino")


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


def test_the_command_says_how_far_it_is(tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli("export", "tiny-digits", "--format", "torch-export", "--out", tmp_path / "out")
    assert code == 0, err
    assert "unet/model.pt2" in out
    assert "of the output's size from PyTorch on what the model draws" in out


def test_latency_is_measured_in_turn_in_several_runtimes(cli: Cli) -> None:
    names = ["torch", "torch-export"]
    code, out, err = cli("cost", "--arch", "bk-sdm-tiny", "--latency", "--rounds", "5", "--runtime", ",".join(names), "--json")
    assert code == 0, err
    rows = json.loads(out)["runtimes"]
    assert list(rows) == names
    assert {*names} < {*RUNTIMES}
    for row in rows.values():
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
        assert row["student"]["n"] == 5


@pytest.mark.parametrize("runtime", [FORMATS[name].runtime for name in HERE])
def test_images_of_a_runtime_are_those_of_pytorch(runtime: str, tmp_path: Path, cli: Cli) -> None:
    args = ["evaluate", "--n-images", "4", "--steps", "2", "--measures", "clip_score", "--out"]
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
