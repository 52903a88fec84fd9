"""What counts as the same network: what processors round is, a weight's last bit or another setting is not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from blockprune.model.compare import difference, distance, rounding, same_outputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: cast(v, dtype) if isinstance(v, dict) else v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def run(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs, return_dict=False)[0]


def misaligned(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy whose weights lie one element off the addresses that torch allocates."""
    moved = {k: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for k, t in unet.state_dict().items()}
    out = copy.deepcopy(unet)
    out.load_state_dict(moved, assign=True)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", tiny.FIRST_KIND)
def test_other_kernels_give_the_same_network(kind: str, dtype: torch.dtype) -> None:
    unet, inputs = tiny.unet(kind).to(dtype), cast(tiny.inputs(kind), dtype)
    others = {
        "channels last": copy.deepcopy(unet).to(memory_format=torch.channels_last),
        "frozen": copy.deepcopy(unet).requires_grad_(False),
        "misaligned": misaligned(unet),
    }
    for how, other in others.items():
        assert difference(unet, other, inputs, lambda name: name) == "", how
    alone = {k: v[:1] if isinstance(v, torch.Tensor) else {n: t[:1] for n, t in v.items()} for k, v in inputs.items()}
    assert same_outputs(run(unet, alone), run(unet, inputs)[:1], unet)
    exact = run(tiny.unet(kind).double(), cast(tiny.inputs(kind), torch.float64))
    assert distance(run(unet, inputs), exact) <= rounding(unet, dtype)


def test_what_was_seen_on_processors_is_rounding() -> None:
    unet, draw = tiny.unet("sd1"), torch.Generator().manual_seed(0)
    output = torch.randn(2, 4, 64, 64, generator=draw)
    for worst in (5.4e-7, 1.3e-6, 2.7e-6):
        assert same_outputs(output + worst * torch.empty_like(output).uniform_(-1, 1, generator=draw), output, unet)
    assert not same_outputs(output * (1 + 2e-5), output, unet)
    assert rounding(unet, torch.float64) < 1e-13 < rounding(unet, torch.float32) < 2e-5
    assert rounding(unet, torch.float16) < 0.03 and rounding(unet, torch.bfloat16) < 0.2


def test_distances() -> None:
    x = torch.tensor([3.0, 4.0])
    assert distance(x, x) == 0 == distance(0 * x, 0 * x)
    assert distance(x + torch.tensor([0.0, 0.5]), x) == pytest.approx(0.1)
    for other in (torch.ones(3), torch.tensor([3.0, math.nan]), torch.tensor([math.inf, 4.0])):
        assert distance(other, x) == math.inf
    assert distance(x, 0 * x) == math.inf


def other(**settings: Any) -> UNet2DConditionModel:
    """The weights of the tiny SD v1 in a network of another configuration."""
    unet = UNet2DConditionModel(**{**tiny.config("sd1"), **settings}).eval()
    unet.load_state_dict(tiny.unet("sd1").state_dict())
    return unet


def test_another_network_is_told() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.inputs("sd1")

    def fault(theirs: torch.nn.Module, of: torch.nn.Module = unet) -> str:
        return difference(of, theirs, inputs, lambda name: name)

    for settings in ({"attention_head_dim": 4}, {"norm_num_groups": 2}, {"norm_eps": 1e-6}, {"upcast_attention": True}):
        assert "other settings" in fault(other(**settings)), settings
    assert "other settings" in fault(other(act_fn="gelu"))
    nudged = copy.deepcopy(unet)
    with torch.no_grad():
        bias = nudged.mid_block.resnets[0].conv1.bias
        bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
    assert fault(nudged) == "'mid_block.resnets.0.conv1.bias' came back with other values (or is not a number)"
    wrong = copy.deepcopy(unet)
    wrong.up_blocks[1].register_forward_hook(lambda module, args, output: output * 1.001)
    assert "it computes something else" in fault(wrong)
    wrong.conv_out = torch.nn.Identity()
    assert "'conv_out.bias' is in one of them alone" in fault(wrong)
