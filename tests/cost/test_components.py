"""Parameters, keys and multiply-adds: the published numbers exactly, arithmetic against recounts, other counters' word."""

from __future__ import annotations

import importlib.metadata

import pytest
import tiny
import torch
from torch import nn

from blockprune.cost import crosscheck
from blockprune.cost.components import Part, other_parts, pipeline_costs, unet_inputs, verify
from blockprune.errors import UserError
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.count import count
from blockprune.model.graph import BlockGraph, Cost, sum_costs
from blockprune.model.presets import preset
from blockprune.model.pretrained import ALIASES, configs
from blockprune.model.trace import trace

GRAPHS: dict[str, BlockGraph] = {}
PIPELINES: dict[str, Cost] = {}


def graph_of(model: str) -> BlockGraph:
    if model not in GRAPHS:
        c = configs(model)
        GRAPHS[model] = trace(c.unet, c.latent(), c.n_tokens)
    return GRAPHS[model]


def rest_of(model: str) -> Cost:
    """Everything but the U-Net."""
    if model not in PIPELINES:
        c = configs(model)
        PIPELINES[model] = sum_costs(pipeline_costs(c, c.latent()).values())
    return PIPELINES[model]


# arXiv 2305.15798 and the published students; keys and pipeline totals recounted from the stock constructions
@pytest.mark.parametrize(
    ("model", "arch", "params", "keys", "pipeline"),
    [
        ("sd-v1-4", "full", 859_520_964, 686, 1_032_071_623),
        ("sd-v1-5", "full", 859_520_964, 686, 1_032_071_623),
        ("sd-v1-4", "bk-sdm-base", 579_384_964, 442, 751_935_623),
        ("sd-v1-4", "bk-sdm-small", 482_346_884, 396, 654_897_543),
        ("sd-v1-4", "bk-sdm-tiny", 323_384_964, 358, 495_935_623),
        ("sd-v1-4", "mid-removed", 762_482_884, None, None),
        ("sd-v2-1-base", "full", 865_910_724, 686, 1_255_788_743),
        ("sd-v2-1", "full", 865_910_724, 686, 1_255_788_743),
        ("sd-v2-1-base", "bk-sdm-base", 583_480_964, 442, 973_358_983),
        ("sd-v2-1-base", "bk-sdm-small", 485_787_524, 396, 875_665_543),
        ("sd-v2-1-base", "bk-sdm-tiny", 326_825_604, 358, 716_703_623),
        ("sdxl", "full", 2_567_463_684, 1680, None),
        ("sdxl", "ssd-1b", 1_331_334_404, 944, None),
        ("sdxl", "vega", 745_225_604, 564, None),
    ],
)
def test_published_sizes(model: str, arch: str, params: int, keys: int | None, pipeline: int | None) -> None:
    cost = graph_of(model).cost(preset(arch))
    assert cost.params == params
    assert keys in (None, cost.keys)
    assert pipeline in (None, cost.params + rest_of(model).params)


@pytest.mark.parametrize(
    ("model", "arch", "thop", "conv_linear", "with_attention"),
    [
        ("sd-v1-4", "full", 338_749_194_240, 338_610_585_600, 401_636_720_640),
        ("sd-v1-4", "bk-sdm-base", 223_755_632_640, 223_672_074_240, 261_496_995_840),
        ("sd-v1-4", "bk-sdm-small", 217_727_959_040, 217_645_383_680, 255_447_203_840),
        ("sd-v1-4", "bk-sdm-tiny", 205_035_274_240, 204_952_698_880, 242_754_519_040),
        ("sd-v2-1-base", "full", 339_241_205_760, 339_102_597_120, 402_128_732_160),
        ("sd-v2-1-base", "bk-sdm-base", 224_071_024_640, 223_987_466_240, 261_812_387_840),
        ("sdxl", "full", None, 2_988_660_490_240, 3_380_618_199_040),
        ("sdxl", "ssd-1b", None, 1_853_811_261_440, 2_103_880_908_800),
    ],
)
def test_published_macs(model: str, arch: str, thop: int | None, conv_linear: int, with_attention: int) -> None:
    cost = graph_of(model).cost(preset(arch))
    assert thop in (None, cost.thop)
    assert (cost.conv_linear, cost.with_attention) == (conv_linear, with_attention)


def test_published_text_encoders_and_decoder() -> None:
    v1, v2 = (pipeline_costs(configs(m), (64, 64)) for m in ("sd-v1-4", "sd-v2-1-base"))
    assert (v1["text_encoder"].params, v1["text_encoder"].thop) == (123_060_480, 6_545_882_112)
    assert v2["text_encoder"].params == 340_387_840
    assert (v1["vae_decoder"].params, v1["vae_decoder"].thop) == (49_490_179, 1_240_079_532_032)


def test_attention_products_of_a_text_encoder_by_the_formula() -> None:
    text = pipeline_costs(configs("sd-v1-4"), (64, 64))["text_encoder"]
    assert text.with_attention - text.conv_linear == 12 * 2 * 77 * 77 * 768  # layers, scores and sums, tokens squared, width


@pytest.mark.parametrize("model", ALIASES)
def test_every_alias_has_its_configurations_in_the_package(model: str) -> None:
    c = configs(model)
    assert c.latent() == {"sd-v2-1": (96, 96), "sdxl": (128, 128)}.get(model, (64, 64))
    assert c.scheduler.get("prediction_type", "epsilon") == ("v_prediction" if model == "sd-v2-1" else "epsilon")
    assert len(c.text) == (2 if model == "sdxl" else 1)
    assert c.n_tokens == 77


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_sum_equals_a_recount_of_single_removals(kind: str) -> None:
    config = tiny.config(kind)
    graph = trace(config, (8, 8), tiny.N_TOKENS)
    teacher = Part(surgery.skeleton(config, Architecture()), unet_inputs(config, (8, 8), tiny.N_TOKENS))
    archs = list(graph.units("block").items())[:: 15 if kind == "sdxl" else 8]
    for label, arch in [*archs, ("innermost", Architecture(graph.innermost))]:
        with surgery.removed(teacher.module, arch):
            assert graph.cost(arch) == teacher.count()[""], label


@pytest.mark.parametrize("arch", ["bk-sdm-tiny"])
def test_the_sum_equals_a_recount_of_full_size_students(arch: str) -> None:
    config = dict(configs("sd-v1-4").unet)
    unet = surgery.skeleton(config, preset(arch))
    assert graph_of("sd-v1-4").cost(preset(arch)) == Part(unet, unet_inputs(config, (64, 64), 77)).count()[""]


def test_the_sum_equals_a_recount_where_the_mid_stage_moves_to_an_odd_size() -> None:
    config = tiny.config("sd1")
    graph = trace(config, (9, 7), tiny.N_TOKENS)
    arch = Architecture(graph.innermost | {"mid_block.attentions.0"})
    student = Part(surgery.skeleton(config, arch), unet_inputs(config, (9, 7), tiny.N_TOKENS))
    assert graph.cost(arch) == student.count()[""]


@pytest.mark.parametrize(
    ("kind", "removed"),
    [
        ("sd1", ["mid_block", "up_blocks.1.resnets.1"]),
        *(pytest.param(kind, [], marks=pytest.mark.slow) for kind in ("sd2", "sdxl")),
    ],
)
def test_thop_and_fvcore_agree(kind: str, removed: list[str]) -> None:
    config, arch = tiny.config(kind), Architecture(frozenset(removed))

    def part(device: str) -> Part:
        return Part(surgery.skeleton(config, arch), unet_inputs(config, (8, 8), tiny.N_TOKENS, device=device))

    costs = part("meta").count()
    meta, cpu = part("meta"), part("cpu")
    assert crosscheck.check_thop(meta.module, meta.kwargs, costs) == costs[""].thop
    assert crosscheck.check_fvcore(crosscheck.hollow(cpu.module), cpu.kwargs, costs) == costs[""].with_attention


@pytest.mark.slow
@pytest.mark.parametrize(("model", "side"), [("sd-v1-4", 64), ("sd-v2-1-base", 16), ("sdxl", 16)])
def test_thop_and_fvcore_agree_at_full_width(model: str, side: int) -> None:
    c = configs(model)
    total = trace(c.unet, (side, side), c.n_tokens).total
    assert verify(c, Architecture(), (side, side))["unet"] == {"thop": total.thop, "fvcore": total.with_attention}


def small_part() -> tuple[Part, dict[str, Cost]]:
    with torch.device("meta"):
        module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
        part = Part(module, {"input": torch.zeros(1, 1, 4, 4)})
    return part, part.count()


@pytest.mark.parametrize("check", [crosscheck.check_thop, crosscheck.check_fvcore])
def test_a_disagreement_names_the_operators_and_both_numbers(check: object) -> None:
    part, costs = small_part()
    kwargs = part.kwargs
    if check is crosscheck.check_fvcore:
        crosscheck.hollow(part.module)
        kwargs = {"input": torch.zeros(1, 1, 4, 4)}
    assert check(part.module, kwargs, costs) == 96  # type: ignore[operator]  # 2 x 2 x 2 places x 9 + 8 x 3
    wrong = {
        name: Cost(thop=c.thop + 1, conv_linear=c.conv_linear + 1, with_attention=c.with_attention + 1) for name, c in costs.items()
    }
    with pytest.raises(UserError, match=r"(?=.*(Conv2d|convolutions))(?=.*(24|96) against (25|97))"):
        check(part.module, kwargs, wrong)  # type: ignore[operator]


def test_ultralytics_thop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: real("thop" if name == "ultralytics-thop" else name))
    part, costs = small_part()
    with pytest.raises(UserError, match="ultralytics-thop"):
        crosscheck.check_thop(part.module, part.kwargs, costs)


def test_fvcore_refuses_what_it_cannot_count() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(x, x)

    with pytest.raises(UserError, match="cdist"):
        crosscheck.check_fvcore(Odd(), {"x": torch.zeros(2, 2)}, {"": Cost()})


def test_an_operator_not_met_before_is_an_error() -> None:
    class Odd(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)[0]

    odd = Odd()
    with pytest.raises(UserError, match="flash_attention"):
        count(odd, lambda: odd(torch.zeros(1, 1, 4, 4, device="meta")))


def test_hollow_weights_take_no_memory() -> None:
    part = crosscheck.hollow(other_parts(configs("sd-v1-4"), (8, 8))["vae_decoder"].module)
    assert all(p.untyped_storage().nbytes() == 4 for p in part.parameters())
