"""Commands made from requests: texts become typed fields, a file's values give way to flags, help shows real defaults in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from common_fixtures import Cli
from typer.testing import CliRunner

from blockprune import cli as cli_module
from blockprune.cli.command import command
from blockprune.errors import UserError
from blockprune.request import Request, option


@dataclass(frozen=True, kw_only=True)
class Joined(Request):
    runs: tuple[str, ...] = option((), "what is joined", "Output", argument="RUN...")
    out: str = option("joined", "where", "Output")


@dataclass(frozen=True, kw_only=True)
class Asked(Request):
    device: str | None = option(None, "where", "Scale")
    steps: tuple[int, ...] = option((), "denoising steps", "Sampling", least=1, most=100, from_model=True, commas=True)
    cfg_scale: tuple[float, ...] = option((2.5,), "guidance", "Sampling", least=0, most=10, commas=True)
    arch: tuple[str, ...] = option((), "what goes [or stays]", "What to remove")
    n_images: int | None = option(None, "images", "Sampling", least=1, most=9, from_model=True)
    ema: bool = option(False, "averages", "Training")
    keep: bool = option(True, "keeps", "Training")


@pytest.fixture
def parse() -> Callable[..., Asked]:
    """Arguments => the request that they make."""

    def go(*args: str | Path) -> Asked:
        made: list[Asked] = []
        app = typer.Typer(rich_markup_mode="rich")
        app.command()(command(Asked, made.append, "Asks.", "asks one", "asks two"))
        result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return made[0]

    return go


def test_lists_are_of_the_fields_type(parse: Callable[..., Asked]) -> None:
    assert parse().to_json() == Asked().to_json()
    asked = parse("--steps", "5,10", "--steps", "20", "--cfg-scale", "3", "--arch", "a,b", "--arch", "c", "--ema", "--no-keep")
    assert asked == Asked(steps=(5, 10, 20), cfg_scale=(3.0,), arch=("a,b", "c"), ema=True, keep=False)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--steps", "5,two"], "--steps takes whole numbers, such as 1: got 'two'; give one from 1 to 100"),
        (["--steps", ""], "--steps takes whole numbers, such as 1: got ''"),
        (["--cfg-scale", "3,x"], "--cfg-scale takes numbers, such as 1: got 'x'; give one from 0 to 10"),
        (["--cfg-scale", "nan"], "--cfg-scale takes numbers"),
        (["--cfg-scale", "11"], "--cfg-scale must be at most 10: got 11"),
        (["--steps", "3,0"], "--steps must be at least 1: got 0"),
    ],
)
def test_one_line_for_what_is_no_number(parse: Callable[..., Asked], args: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(*args)


def test_flags_win_over_a_file(parse: Callable[..., Asked], tmp_path: Path) -> None:
    file = tmp_path / "asked.toml"
    file.write_text('steps = 4\ncfg_scale = [1, 2.5]\nn_images = 7\narch = ["a"]\nema = true\n')
    assert parse("--config", file) == Asked(steps=(4,), cfg_scale=(1.0, 2.5), n_images=7, arch=("a",), ema=True)
    assert parse("--config", file, "--steps", "9", "--no-ema").steps == (9,)
    file.write_text("stepps = 4\n")
    with pytest.raises(UserError, match=r"asked.toml' has unknown fields stepps"):
        parse("--config", file)
    file.write_text('n_images = "7"\n')
    with pytest.raises(UserError, match="--n-images: expected"):
        parse("--config", file)
    file.write_text("cfg_scale = nan\n")
    with pytest.raises(UserError, match="--cfg-scale must be a finite number: got nan"):
        parse("--config", file)
    file.write_text("steps = ")
    with pytest.raises(UserError, match=r"cannot read the --config '.*asked.toml': .*; give a .toml file"):
        parse("--config", file)


def test_help_has_groups_in_order_and_real_defaults() -> None:
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(command(Asked, print, "Asks.", "asks one", "asks two"))
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    groups = ["What to remove", "Sampling", "Training", "Scale", "Output"]
    places = [text.index(f" {group} ") for group in groups]
    assert places == sorted(places)
    for shown in ("the model's own; tiny-digits: 64", "the model's own; tiny-digits: 10", "[default: 2.5]", "[default: on]"):
        assert shown in text
    assert "what goes [or stays]" in text
    assert "$ asks one" in text
    assert "$ asks two" in text


def test_the_version_is_printed(cli: Cli) -> None:
    from importlib.metadata import version

    assert cli("--version")[:2] == (0, f"blockprune {version('blockprune')}\n")


@pytest.mark.parametrize("name", [str(c.name) for c in cli_module.app.registered_commands])
def test_every_option_stands_whole_in_80_columns(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = cli(name, "--help")
    assert max(map(len, out.splitlines())) <= 80
    words = {*out.replace(",", " ").split()}
    command = typer.main.get_command(cli_module.app).commands[name]  # type: ignore[attr-defined]
    for param in command.params:
        if param.param_type_name == "option":
            assert words & {*param.opts, *param.secondary_opts}, param.opts
    assert not [word for word in words if word.startswith("--") and word.endswith("…")]


@pytest.mark.parametrize("name", ["graph", "cost", "scan", "evaluate", "export", "map-adapter", "report", "stats"])
def test_every_help_has_examples(name: str, cli: Cli) -> None:
    code, out, _ = cli(name, "--help")
    assert code == 0
    assert out.count(f"$ blockprune {name}") >= 2


def test_a_field_without_a_flag_is_an_argument_that_must_be_given() -> None:
    made: list[Joined] = []
    app = typer.Typer()
    app.command()(command(Joined, made.append, "Joins."))
    assert CliRunner().invoke(app, ["one", "a,b", "--out", "two"], catch_exceptions=False).exit_code == 0
    assert made == [Joined(runs=("one", "a,b"), out="two")]
    assert CliRunner().invoke(app, []).exit_code == 2
    assert "RUN..." in CliRunner().invoke(app, ["--help"]).output
    with pytest.raises(UserError, match="RUNS: "):
        Joined(runs=(1,))  # type: ignore[arg-type]
