"""Which students stock diffusers can express: the rule, its reasons, and its proof by outputs."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from blockprune.errors import UserError
from blockprune.export.stock_config import BlockMap, Stock, expressible, slots, stock_options
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import same_outputs
from blockprune.model.presets import expand, fitting, preset
from blockprune.model.trace import trace
from blockprune.stages.search.problem import stock_units
from blockprune.stages.search.space import Space

TEACHERS = {kind: tiny.unet(kind) for kind in tiny.KINDS}
FITTING = [(kind, label) for kind in tiny.KINDS for label in fitting(trace(tiny.config(kind)))]


def arch(*patterns: str) -> Architecture:
    return Architecture(frozenset(name for pattern in patterns for name in expand(pattern)))


def run(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs, return_dict=False)[0]


def in_stock_form(student: UNet2DConditionModel, found: Stock) -> UNet2DConditionModel:
    """Stock diffusers with the student's weights, by a strict load."""
    stock = surgery.skeleton(found.config, Architecture())
    stock.load_state_dict({str(found.blocks.new_name(k)): t for k, t in student.state_dict().items()}, strict=True, assign=True)
    return stock


def assert_equal_in_stock_form(kind: str, a: Architecture, found: Stock, sizes: tuple[Any, ...] = (16,)) -> None:
    """At 16, the innermost feature maps are 2x2; of 1x1 ones torch cannot tell the memory format, on which rounding depends."""
    student = surgery.prune(TEACHERS[kind], a)
    stock = in_stock_form(student, found)
    for size in sizes:
        inputs = tiny.inputs(kind, size=size)
        assert same_outputs(run(student, inputs), run(stock, inputs), student), a.describe()


@pytest.mark.parametrize(
    ("kind", "label"),
    [pytest.param(*f, marks=[pytest.mark.slow] * (f[0] != "sd1" and f[1] not in ("ssd-1b", "vega"))) for f in FITTING],
)
def test_every_preset_is_stock_bit_for_bit(kind: str, label: str) -> None:
    found = expressible(tiny.config(kind), preset(label))
    assert isinstance(found, Stock), found
    json.dumps(found.config)
    assert_equal_in_stock_form(kind, preset(label), found, (16, (13, 8)))


def random_design(kind: str, seed: int) -> Architecture:
    """A removal of the forms that the rule must judge: pairs and attentions by stage, layers, the mid stage, the innermost one."""
    draw, unet, names = random.Random(seed), TEACHERS[kind], []
    n = len(unet.down_blocks)
    gone = kind != "sdxl" and draw.random() < 0.3
    names += [f"down_blocks.{n - 2}.downsamplers.0", f"down_blocks.{n - 1}", "up_blocks.0"] if gone else []
    for i in range(n - gone):
        n_down = draw.choice([0, 0, 1]) if i in (1, 2) else draw.choice([0, 0, 1, 1, 2])
        plain = draw.random() < 0.2
        for path, s, size, n_gone in (("down_blocks", i, 2, n_down), ("up_blocks", n - 1 - i, 3, n_down)):
            lost = draw.sample(range(1 if i in (1, 2) or path == "up_blocks" else 0, size), n_gone)
            for j in range(size):
                attention = f"{path}.{s}.attentions.{j}"
                has = hasattr(unet.get_submodule(f"{path}.{s}"), "attentions")
                names += [f"{path}.{s}.resnets.{j}"] if j in lost else []
                names += [attention] if has and (j in lost or (plain and path == "up_blocks")) else []
                if has and attention not in names and draw.random() < 0.1:
                    names.append(f"{attention}.transformer_blocks.0")
    mid = [[], ["mid_block"], ["mid_block.attentions.0", f"mid_block.resnets.{draw.randrange(2)}"], ["mid_block.resnets.0"]]
    return Architecture(frozenset(names + draw.choice(mid)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_whatever_the_rule_calls_stock_is_stock(kind: str) -> None:
    verdicts = []
    n = 8 if kind == "sdxl" else 12
    for seed in range(n):
        a = random_design(kind, seed)
        found = expressible(tiny.config(kind), a)
        verdicts.append(isinstance(found, Stock))
        if isinstance(found, Stock):
            assert_equal_in_stock_form(kind, a, found)
    assert 3 <= sum(verdicts) <= n - 2


STOCK = {
    "an innermost ResNet and either up ResNet that takes the same skip": (
        "sd1",
        arch("down_blocks.3.resnets.0", "up_blocks.0.resnets.1"),
    ),
    "the same, the other one": ("sd1", arch("down_blocks.3.resnets.0", "up_blocks.0.resnets.2")),
    "a stage without a ResNet": ("sd1", arch("down_blocks.3.resnets.{0,1}", "up_blocks.0.resnets.{0,2}")),
    "up attentions alone": ("sd2", arch("up_blocks.2.attentions.{0,1,2}")),
    "the second mid ResNet kept": ("sd2", arch("mid_block.{attentions.0,resnets.0}")),
    "a mid stage by its parts": ("sd1", arch("mid_block.{attentions.0,resnets.0,resnets.1}")),
    "an attention without layers": ("sd1", arch("down_blocks.0.attentions.1.transformer_blocks.0")),
    "layers from the middle": ("sdxl", arch("up_blocks.0.attentions.2.transformer_blocks.{0,3,7}")),
    "shallower mid and both its neighbours": (
        "sdxl",
        arch("mid_block.attentions.0.transformer_blocks.{1,2}", "down_blocks.2.attentions.{0,1}.transformer_blocks.{8,9}"),
    ),
    "an innermost stage without its mid": ("sd1", arch("down_blocks.2.downsamplers.0", "down_blocks.3", "up_blocks.0")),
}


@pytest.mark.parametrize("label", [pytest.param(label, marks=[pytest.mark.slow] * (STOCK[label][0] == "sdxl")) for label in STOCK])
def test_less_usual_designs_are_stock(label: str) -> None:
    kind, a = STOCK[label]
    found = expressible(tiny.config(kind), a)
    assert isinstance(found, Stock), found
    assert_equal_in_stock_form(kind, a, found)


NOT_STOCK = [
    ("sd1", arch("down_blocks.1.attentions.1"), r"down_blocks\.1 lacks attentions\.1 but keeps resnets\.1"),
    ("sd1", arch("down_blocks.1.resnets.1"), r"down_blocks\.1 lacks resnets\.1 but keeps attentions\.1"),
    ("sd1", arch("down_blocks.1.{resnets,attentions}.1"), r"down_blocks\.1 keeps 1 ResNets and up_blocks\.2 keeps 3"),
    ("sd1", arch("down_blocks.1.{resnets,attentions}.0"), r"down_blocks\.1\.resnets\.0 changes the width"),
    ("sd1", arch("mid_block.resnets.0"), r"mid_block lacks resnets\.0 but keeps resnets\.1"),
    ("sd1", arch("mid_block.attentions.0"), r"mid_block lacks attentions\.0 but keeps resnets\.0"),
    ("sdxl", arch("mid_block.attentions.0.transformer_blocks.9"), r"keeps 9 transformer layers .* first attention 10"),
    ("sd1", arch("down_blocks.3.resnets.1", "up_blocks.0.resnets.2"), r"up_blocks\.0\.resnets\.1 takes the output of down"),
]


@pytest.mark.parametrize(("kind", "a", "why"), NOT_STOCK, ids=[a.key for _, a, _ in NOT_STOCK])
def test_reasons(kind: str, a: Architecture, why: str) -> None:
    found = expressible(tiny.config(kind), a)
    assert isinstance(found, str)
    assert re.search(why, found), found


def test_a_skip_from_elsewhere_is_why_a_design_of_the_right_shapes_is_not_stock() -> None:
    a = arch("down_blocks.3.resnets.1", "up_blocks.0.resnets.2")
    config = {k: v for k, v in tiny.config("sd1").items() if k[0] != "_"} | {"layers_per_block": [2, 2, 2, 1]}
    student = surgery.prune(tiny.unet("sd1"), a)
    stock = in_stock_form(student, Stock(config, BlockMap({}, a.removed)))
    ours, theirs = (run(unet, tiny.inputs("sd1", size=16)) for unet in (student, stock))
    assert (ours - theirs).abs().max() > 1e-3


def test_settings_count_not_only_shapes() -> None:
    """The mid stage would take the number of heads of another stage, which no tensor shows."""
    config = tiny.config("sd1") | {"attention_head_dim": [1, 2, 4, 2]}
    innermost = arch("down_blocks.2.downsamplers.0", "down_blocks.3", "up_blocks.0")
    assert "mid_block.attentions.0" in str(expressible(config, innermost))
    assert isinstance(expressible(config, innermost | arch("mid_block")), Stock)


def test_the_full_model_is_stock_as_it_is() -> None:
    found = expressible(tiny.config("sdxl"), Architecture())
    assert isinstance(found, Stock) and found.blocks == BlockMap({}, frozenset())
    assert_equal_in_stock_form("sdxl", Architecture(), found)


def test_half_an_innermost_stage_is_an_error() -> None:
    with pytest.raises(UserError, match="goes as one"):
        expressible(tiny.config("sd1"), arch("up_blocks.0"))


FULL_SIZE = [
    ("sd-v1-4", "bk-sdm-base", 579_384_964, 442, 126),
    ("sd-v1-4", "bk-sdm-small", 482_346_884, 396, 126),
    ("sd-v1-4", "bk-sdm-tiny", 323_384_964, 358, 232),
    ("sdxl", "ssd-1b", 1_331_334_404, 944, 0),
    ("sdxl", "vega", 745_225_604, 564, 0),
]


@pytest.mark.parametrize(("model", "label", "n_params", "n_keys", "n_renamed"), FULL_SIZE)
def test_published_students_at_full_size(model: str, label: str, n_params: int, n_keys: int, n_renamed: int) -> None:
    config = pretrained.configs(model).unet
    found = expressible(config, preset(label))
    assert isinstance(found, Stock)
    stock, kept = surgery.skeleton(found.config, Architecture()), surgery.skeleton(config, preset(label)).state_dict()
    assert (stock.num_parameters(), len(stock.state_dict())) == (n_params, n_keys)
    assert sum(found.blocks.new_name(key) != key for key in kept) == n_renamed


def test_published_configurations() -> None:
    base, tiny_, ssd = (
        expressible(pretrained.configs(model).unet, preset(label))
        for model, label in (("sd-v1-4", "bk-sdm-base"), ("sd-v1-4", "bk-sdm-tiny"), ("sdxl", "ssd-1b"))
    )
    assert isinstance(base, Stock) and isinstance(tiny_, Stock) and isinstance(ssd, Stock)
    assert base.config["layers_per_block"] == tiny_.config["layers_per_block"] == 1
    assert tiny_.config["mid_block_type"] is None
    assert tiny_.config["block_out_channels"] == [320, 640, 1280]
    assert tiny_.config["up_block_types"] == ["CrossAttnUpBlock2D"] * 3
    assert ssd.config["mid_block_type"] == "UNetMidBlock2D"
    assert ssd.config["transformer_layers_per_block"] == [1, [2, 2], [4, 4]]
    assert ssd.config["reverse_transformer_layers_per_block"] == [[4, 4, 10], [2, 1, 1], 1]
    assert dict(tiny_.blocks.moved) == {
        **{f"up_blocks.{s + 1}.{part}.{o}": f"up_blocks.{s}.{part}.{n}" for s in range(3) for part in ("resnets", "attentions")
           for n, o in ((0, 0), (1, 2))},
        **{f"up_blocks.{s + 1}.upsamplers": f"up_blocks.{s}.upsamplers" for s in range(2)},
    }  # fmt: skip


def test_block_map_on_the_wire() -> None:
    blocks = BlockMap({"up_blocks.1": "up_blocks.0", "up_blocks.1.resnets.2": "up_blocks.0.resnets.1"}, frozenset({"up_blocks.0"}))
    text = (
        '{"format": 1, "moved": {"up_blocks.1": "up_blocks.0", "up_blocks.1.resnets.2": "up_blocks.0.resnets.1"}, '
        '"removed": ["up_blocks.0"]}'
    )
    assert json.dumps(blocks.to_json()) == text
    assert BlockMap.from_json(json.loads(text)) == blocks
    names = ("up_blocks.0.resnets.1", "up_blocks.1.resnets.2.conv1.weight", "up_blocks.1.resnets.20", "up_blocks.10")
    assert [blocks.new_name(n) for n in names] == [
        None,
        "up_blocks.0.resnets.1.conv1.weight",
        "up_blocks.0.resnets.20",
        "up_blocks.10",
    ]
    with pytest.raises(UserError, match="it is JSON like"):
        BlockMap.from_json({"format": 2})


def test_a_trained_shortcut_stays_in_the_map() -> None:
    blocks = slots(tiny.config("sd1"), arch("down_blocks.1.resnets.0"))
    names = ("down_blocks.1.resnets.0.conv1.weight", "down_blocks.1.resnets.0.conv_shortcut.weight")
    assert [blocks.new_name(n) for n in names] == [None, names[1]]


MORE_KINDS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "sd1")) for kind in tiny.KINDS]


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_options_of_all_levels_are_stock_together(kind: str) -> None:
    draw, levels = random.Random(0), stock_options(trace(tiny.config(kind)))
    for _ in range(4):
        student = Architecture(frozenset().union(*(draw.choice(list(of.values())) for of in levels.values())))
        assert isinstance(expressible(tiny.config(kind), student), Stock), student.describe()


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_what_is_no_option_of_its_level_is_not_stock(kind: str) -> None:
    graph, draw = trace(tiny.config(kind)), random.Random(1)
    levels = stock_options(graph)
    for level in (level for level in levels if level != "mid_block"):
        names = [b.name for b in graph if b.stage in level.split() and b.kind in "RA"]
        for student in (Architecture(frozenset(draw.sample(names, n))) for n in (1, 4)):
            assert isinstance(expressible(tiny.config(kind), student), Stock) == (student in levels[level].values()), student


@pytest.mark.slow
def test_layers_and_options_are_stock_together() -> None:
    """What a search that is held to stock students may remove: one option of each level, and layers of what stays, at random."""
    graph, draw = trace(tiny.config("sdxl")), random.Random(2)
    units, levels = stock_units(graph, "block,layer", Architecture())
    space = Space(graph, units, [], levels=levels)
    for _ in range(3):
        student = Architecture()
        for label in draw.sample(sorted(units), len(units)):
            one = space.choice(student)
            if one is not None and len(one) < 4 and space.valid(one | {label}):
                student = space.arch(one | {label})
        assert student.removed
        assert isinstance(expressible(tiny.config("sdxl"), student), Stock), student.describe()
