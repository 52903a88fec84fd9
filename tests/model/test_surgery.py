"""Masking and pruning: every removal runs, the teacher comes back as it was, and the presets equal stock diffusers models."""

from __future__ import annotations

import copy
import io
import random
import re
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from blockprune.errors import UserError
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import same_outputs
from blockprune.model.graph import UNITS
from blockprune.model.presets import fitting, preset
from blockprune.model.replay import Recording
from blockprune.model.trace import trace

GRAPHS = {kind: trace(tiny.config(kind)) for kind in tiny.KINDS}


def run(unet: UNet2DConditionModel, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs, return_dict=False)[0]


def every_removal(kind: str, units: tuple[str, ...] = UNITS, n_random: int = 6) -> dict[str, Architecture]:
    graph = GRAPHS[kind]
    single = {label: arch for unit in units for label, arch in graph.units(unit).items()}
    alike = {name for name in graph.units("component") if ".transformer_blocks.0." not in name}  # to those of the first layer
    single = {label: arch for label, arch in single.items() if label not in alike}
    blocks, draw = list(graph.units("block").values()), random.Random(0)
    mixed = {}
    for i in range(n_random):
        parts = draw.sample(blocks, 3 + 2 * i)
        mixed[f"random-{i}"] = Architecture(frozenset().union(*(p.removed for p in parts)))
    return single | fitting(graph) | mixed


@pytest.mark.parametrize(
    ("kind", "size", "units"),
    [
        ("sd1", 8, UNITS),
        ("sd1", (13, 8), ("stage",)),
        pytest.param("sdxl", 8, ("stage",), marks=pytest.mark.slow),
        *(pytest.param(kind, 8, UNITS, marks=pytest.mark.slow) for kind in ("sd2", "sdxl")),
        *(pytest.param(kind, (13, 8), ("stage", "block"), marks=pytest.mark.slow) for kind in tiny.KINDS),
    ],
)
def test_every_removal_runs_alike_masked_pruned_and_replayed(
    kind: str, size: int | tuple[int, int], units: tuple[str, ...]
) -> None:
    unet, inputs = tiny.unet(kind), tiny.inputs(kind, size=size)
    recording = Recording(GRAPHS[kind])
    with recording.of(unet):
        full = run(unet, inputs)
    for label, arch in every_removal(kind, units).items():
        with surgery.removed(unet, GRAPHS[kind].check(arch)):
            masked = run(unet, inputs)
        assert masked.shape == full.shape and not same_outputs(masked, full, unet), label
        with recording.removed(unet, arch):
            assert same_outputs(run(unet, inputs), masked, unet), label
        if label.startswith("random") or label in fitting(GRAPHS[kind]):
            assert same_outputs(run(surgery.prune(unet, arch), inputs), masked, unet), label


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_layer_without_its_components_passes_on_its_input(kind: str) -> None:
    unet, inputs = tiny.unet(kind), tiny.inputs(kind)
    for layer in list(GRAPHS[kind].units("layer").values())[:4]:
        (name,) = layer
        with surgery.removed(unet, layer):
            whole = run(unet, inputs)
        with surgery.removed(unet, Architecture(frozenset(f"{name}.{part}" for part in surgery.COMPONENTS))):
            assert same_outputs(run(unet, inputs), whole, unet), name


@pytest.mark.parametrize("kind", tiny.FIRST_KIND)
def test_teacher_comes_back_bit_for_bit(kind: str) -> None:
    unet, inputs = tiny.unet(kind), tiny.inputs(kind)
    before, state = run(unet, inputs), {k: v.clone() for k, v in unet.state_dict().items()}
    for arch in every_removal(kind).values():
        with pytest.raises(ZeroDivisionError), surgery.removed(unet, arch):
            raise ZeroDivisionError
    after = unet.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], state[k]) for k in state)
    assert torch.equal(run(unet, inputs), before)
    with surgery.removed(unet, Architecture()):
        assert torch.equal(run(unet, inputs), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_removal_trains_with_checkpointing(kind: str) -> None:
    inputs, unet = tiny.inputs(kind, batch=1), tiny.unet(kind).train()
    unet.enable_gradient_checkpointing()
    for label, arch in every_removal(kind, ("stage", "block")).items():
        unet.zero_grad()
        with surgery.removed(unet, arch):
            unet(**inputs, return_dict=False)[0].square().mean().backward()
            parameters = dict(unet.named_parameters())
        assert all(p.grad is not None for p in parameters.values()), label


@pytest.mark.parametrize("kind", tiny.FIRST_KIND)
def test_gradients_flow_with_checkpointing(kind: str) -> None:
    inputs = tiny.inputs(kind)
    grads = []
    for checkpointing in (False, True):
        unet = tiny.unet(kind).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        for label in ("bk-sdm-tiny", "bk-sdm-base", "vega", "koala-1b"):
            if label in fitting(GRAPHS[kind]):
                with surgery.removed(unet, preset(label)):
                    unet(**inputs, return_dict=False)[0].square().mean().backward()
        grads.append({n: p.grad for n, p in unet.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize("kind", tiny.FIRST_KIND)
def test_students_have_teacher_keys_and_the_priced_cost(kind: str) -> None:
    unet, graph = tiny.unet(kind), GRAPHS[kind]
    keys = set(unet.state_dict())
    for label, arch in every_removal(kind, ("stage", "pair", "block")).items():
        with surgery.removed(unet, arch):
            state, n_params = unet.state_dict(), sum(p.numel() for p in unet.parameters())
        assert set(state) < keys, label
        assert (n_params, len(state)) == (graph.cost(arch).params, graph.cost(arch).keys), label
    for label, arch in fitting(graph).items():
        assert surgery.skeleton(unet.config, arch).state_dict().keys() == surgery.prune(unet, arch).state_dict().keys(), label


def test_pruning_leaves_no_weight_behind_and_copies_the_rest() -> None:
    unet = tiny.unet("sd1")
    student = surgery.prune(unet, preset("bk-sdm-small"))
    storages = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in student.parameters()}
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert torch.equal(next(unet.parameters()), next(tiny.unet("sd1").parameters()))


def renamed(label: str, key: str) -> str:
    """The published renames from teacher keys to the keys of the stock student."""
    if label in ("bk-sdm-base", "bk-sdm-small"):
        return re.sub(r"^(up_blocks\.\d\.(?:resnets|attentions))\.2\.", r"\1.1.", key)
    if label == "bk-sdm-tiny":
        key = re.sub(r"^(up_blocks\.\d\.(?:resnets|attentions))\.2\.", r"\1.1.", key)
        return re.sub(r"^up_blocks\.(\d)\.", lambda m: f"up_blocks.{int(m[1]) - 1}.", key)
    return key


def stock_config(kind: str, label: str) -> dict:
    config = tiny.config(kind)
    if label.startswith("bk-sdm"):
        config["layers_per_block"] = 1
    if label in ("bk-sdm-small", "bk-sdm-tiny"):
        config["mid_block_type"] = None
    if label == "bk-sdm-tiny":
        config["block_out_channels"] = config["block_out_channels"][:3]
        config["down_block_types"] = config["down_block_types"][:3]
        config["up_block_types"] = config["up_block_types"][1:]
        if isinstance(config["attention_head_dim"], (list, tuple)):
            config["attention_head_dim"] = config["attention_head_dim"][:3]
    if label in ("ssd-1b", "vega"):
        config["mid_block_type"] = "UNetMidBlock2D"
        down, up = {
            "ssd-1b": ([1, [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1], 1]),
            "vega": ([1, [1, 1], [2, 2]], [[2, 2, 2], [1, 1, 1], 1]),
        }[label]
        config["transformer_layers_per_block"], config["reverse_transformer_layers_per_block"] = down, up
    return config


STOCK = [(kind, label) for kind in ("sd1", "sd2") for label in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")]
STOCK += [("sdxl", "ssd-1b"), ("sdxl", "vega")]


@pytest.mark.parametrize(("kind", "label"), STOCK)
@pytest.mark.parametrize("size", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_presets_equal_the_stock_models(kind: str, label: str, size: int) -> None:
    unet, inputs = tiny.unet(kind), tiny.inputs(kind, size=size)
    stock = UNet2DConditionModel(**stock_config(kind, label)).eval()
    student = surgery.prune(unet, preset(label))
    stock.load_state_dict({renamed(label, k): v for k, v in student.state_dict().items()}, strict=True)
    with surgery.removed(unet, preset(label)):
        masked = run(unet, inputs)
    assert same_outputs(masked, run(stock, inputs), stock)


def test_half_an_innermost_stage_is_refused() -> None:
    with pytest.raises(UserError, match="goes as one"), surgery.removed(tiny.unet("sd1"), Architecture(frozenset({"up_blocks.0"}))):
        pass


def test_replay_bypasses_upstream_modules() -> None:
    """What replay is for: nothing before the first removed block computes."""
    unet, inputs = tiny.unet("sd1"), tiny.inputs("sd1")
    recording, ran = Recording(GRAPHS["sd1"]), []
    with recording.of(unet):
        run(unet, inputs)
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    with recording.removed(unet, Architecture(frozenset({"up_blocks.2.attentions.1"}))):
        run(unet, inputs)
    assert ran and all(n.startswith(("up_blocks.2.", "up_blocks.3.", "conv_out")) for n in ran)
    assert not any(n.startswith(("up_blocks.2.resnets.0", "up_blocks.2.resnets.1", "up_blocks.2.attentions.0")) for n in ran)


def test_a_pruned_network_saves_only_with_this_package(tmp_path: Path) -> None:
    """Its configuration names all blocks, so a stock loader would make up the missing ones at random."""
    pipe = tiny.pipeline("sd1", tmp_path / "teacher")
    arch = preset("bk-sdm-base")
    student = surgery.prune(pipe.unet, arch)
    with surgery.removed(pipe.unet, arch), pytest.raises(UserError, match=r"blockprune\.export"):
        pipe.unet.save_pretrained(tmp_path / "x")
    pipe.unet.save_pretrained(tmp_path / "whole")  # put together again
    assert (tmp_path / "whole" / "diffusion_pytorch_model.safetensors").is_file()
    buffer = io.BytesIO()
    torch.save(student, buffer)
    refused = [student, copy.deepcopy(student).to(torch.float64), surgery.skeleton(pipe.unet.config, arch)]
    refused += [torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)]
    for unet in refused:
        assert unet.state_dict().keys() == student.state_dict().keys()
        with pytest.raises(UserError, match=r"with blockprune\.save and load it with blockprune\.load_pipeline, or .*save_student"):
            unet.save_pretrained(tmp_path / "x")
    pipe.unet = student
    with pytest.raises(UserError, match="save_pretrained cannot save a U-Net without some of its blocks"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "x").exists() and not (tmp_path / "pipe" / "unet").exists()
    assert not (tmp_path / "pipe" / "model_index.json").exists()
