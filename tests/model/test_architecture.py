"""Architectures as values: normalisation, algebra, wire format."""

from __future__ import annotations

import json

import pytest

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture


def arch(*names: str) -> Architecture:
    return Architecture(frozenset(names))


def test_no_name_lies_inside_another() -> None:
    assert arch("mid_block", "mid_block.attentions.0", "mid_blocks") == arch("mid_block", "mid_blocks")
    assert "mid_block.attentions.0" in arch("mid_block")
    assert "mid_block" not in arch("mid_block.attentions.0")


def test_algebra() -> None:
    a, b = arch("up_blocks.1.resnets.1"), arch("mid_block")
    assert (a | b) - b == a
    assert a <= a | b and not a | b <= a
    assert arch("mid_block.attentions.0") <= b
    assert (a | arch("mid_block.resnets.0")) - b == a
    with pytest.raises(UserError, match="put that back first"):
        b - arch("mid_block.attentions.0")


def test_wire_format() -> None:
    text = '{"format": 1, "removed": ["mid_block", "up_blocks.1.resnets.1"]}'
    value = Architecture.from_json(json.loads(text))
    assert json.dumps(value.to_json()) == text
    assert value.key == "c56fb62dc877"
    assert Architecture.from_json({"architecture": value.to_json(), "score": 1}) == value


@pytest.mark.parametrize("bad", [[], {"removed": "mid_block"}, {"removed": [], "format": 2}, {"removed": ["a b"], "format": 1}, 7])
def test_other_json_is_refused(bad: object) -> None:
    with pytest.raises(UserError):
        Architecture.from_json(bad)


def test_what_stands_in_is_part_of_the_value() -> None:
    fitted = arch("mid_block~linear", "down_blocks.0.resnets.1")
    assert fitted.removed == {"mid_block", "down_blocks.0.resnets.1"} and fitted.fits == {("mid_block", "linear")}
    assert fitted.to_json() == {"format": 1, "removed": ["down_blocks.0.resnets.1", "mid_block~linear"]}
    assert Architecture.from_json(json.loads(fitted.dumps())) == fitted == Architecture(frozenset(fitted.terms))
    assert list(fitted) == ["down_blocks.0.resnets.1", "mid_block"] and "mid_block.resnets.0" in fitted
    assert fitted.plain == arch("mid_block", "down_blocks.0.resnets.1") != fitted
    assert len({fitted.key, fitted.plain.key, arch("mid_block~channel", "down_blocks.0.resnets.1").key}) == 3
    assert fitted.plain <= fitted and fitted <= fitted.plain
    assert fitted.plain | arch("mid_block~channel") == arch("mid_block~channel", "down_blocks.0.resnets.1")
    assert fitted | arch("mid_block") == fitted.plain
    assert fitted - arch("mid_block") == arch("down_blocks.0.resnets.1")
    assert arch("mid_block", "mid_block.resnets.0~linear") == arch("mid_block")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["mid_block~cubic"], "'mid_block~cubic': what is fitted in place of a block is one of channel, linear; got 'cubic'"),
        (["mid_block~"], "one of channel, linear; got ''"),
        (["~linear"], "a module path such as 'mid_block'"),
        (["mid_block~linear", "mid_block~channel"], "choose one of mid_block~channel, mid_block~linear"),
        (["mid_block~linear", "mid_block"], "choose one of mid_block, mid_block~linear"),
    ],
)
def test_what_cannot_stand_in(names: list[str], says: str) -> None:
    with pytest.raises(UserError) as err:
        arch(*names)
    assert says in str(err.value)
