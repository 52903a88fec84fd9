"""What a command line may hold: every wrong text, number or place is one line and code 2 before anything is loaded or written."""

from __future__ import annotations

import errno
import math
import os
import signal
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import typer
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockprune.cli import app, checks, main
from blockprune.cli.options import default_out
from blockprune.errors import UserError
from blockprune.model import presets, pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.sampling import MAX_SEED, SCHEDULERS, Protocol, check_schedule
from blockprune.model.trace import trace
from blockprune.request import Bounds, bounds
from blockprune.stages.fields import Drawing
from blockprune.stages.search.budget import amount

Cli = Callable[..., tuple[int, str, str]]
OneLine = Callable[..., str]
COMMAND_LINE: Any = typer.main.get_command(app)
COMMANDS = {str(c.name): c.callback for c in app.registered_commands if c.callback}
# what a command needs besides the option under test
NEEDS: dict[str, list[str]] = {
    "search": ["--budget", "65%params"],
    "distill": ["--arch", "mid-removed"],
    "export": ["student", "--out", "exported"],
    "map-adapter": ["lora.safetensors", "--model", "m", "--out", "mapped.safetensors"],
    "report": ["run"],
    "stats": ["images", "real.npz"],
}
FEW = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LONG = "x" * 300
SEED, CFG_SCALE = bounds(Drawing, "seed"), bounds(Drawing, "cfg_scale")
assert SEED
assert CFG_SCALE


class Hung(Exception):
    """A command that waits for ever."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory in which no model can be loaded and nothing may take long."""

    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    def hung(*args: object) -> None:
        raise Hung

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(pretrained, "load", loaded)
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    yield tmp_path / "here"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def options_of(command: str) -> Iterator[tuple[str, str, Any, bool]]:
    """(parameter, its spelling, its type, whether it is repeatable) of every parameter of a command that takes a value."""
    made = COMMAND_LINE.commands[command]
    spelt = {p.name: checks._spelt(p) for p in made.params}
    for name, hint in typing.get_type_hints(COMMANDS[command]).items():
        if name == "return":
            continue
        kinds = [k for k in typing.get_args(hint) or (hint,) if k is not type(None)]
        if kinds != [bool]:
            repeatable = typing.get_origin(kinds[0]) is list or kinds[0] is list or hint == list[Path]
            kind = typing.get_args(kinds[0])[0] if typing.get_origin(kinds[0]) is list else kinds[0]
            yield name, spelt[name], kind, repeatable


def words(command: str, spelt: str, text: str) -> list[str]:
    """A command line that is complete but for the text that one of its parameters gets."""
    needs = NEEDS.get(command, [])
    if spelt.startswith("--"):
        return [command, *needs, f"{spelt}={text}"]
    at = [other for _, other, *_ in options_of(command) if not other.startswith("--")].index(spelt)
    return [command, *needs[:at], text, *needs[at + 1 :]]


def bounds_of(command: str, name: str) -> Bounds | None:
    """The numbers that a parameter of a command takes; None for one that takes none."""
    within: Bounds | None = COMMAND_LINE.commands[command]._takes(name)[0]
    return within


ALL = [(command, spelt, kind) for command in COMMANDS for _, spelt, kind, _ in options_of(command)]
NUMBERS = [
    (command, name, spelt)
    for command in COMMANDS
    for name, spelt, kind, _ in options_of(command)
    if kind in (int, float) or bounds_of(command, name)
]


@pytest.mark.parametrize(("command", "spelt"), [(c, s) for c, s, _ in ALL])
def test_an_empty_text_is_no_value(command: str, spelt: str, one_line: OneLine, place: Path) -> None:
    for text in ("", "  "):
        assert f"{spelt} is empty" in one_line(*words(command, spelt, text))
    assert not [*place.iterdir()]


def test_every_number_has_bounds() -> None:
    assert {("scan", "seed"), ("evaluate", "steps"), ("stats", "batch_size")} <= {number[:2] for number in NUMBERS}
    assert [number for number in NUMBERS if bounds_of(*number[:2]) is None] == []
    assert SEED.most == MAX_SEED


@pytest.mark.parametrize(("command", "name", "spelt"), NUMBERS)
def test_a_number_out_of_bounds(command: str, name: str, spelt: str, one_line: OneLine, place: Path) -> None:
    within = bounds_of(command, name)
    assert within is not None
    for text in (str(within.least - 1), str(within.most + 1), "9" * 30, "-" + "9" * 30):
        line = one_line(*words(command, spelt, text))
        assert f"{spelt} must be " in line
        assert f"got {text}" in line
        assert "give one from" in line
    for text in ("nan", "inf", "-inf", "²", "٥", "５", "1_0", "0x10", "ten", "1 0", "9" * 5000, "1,,2"):
        assert f"{spelt} " in one_line(*words(command, spelt, text))
    assert not [*place.iterdir()]


@FEW
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
@pytest.mark.parametrize("within", [SEED, CFG_SCALE], ids=["whole", "decimal"])
def test_what_bounds_let_pass_is_a_number_within_them(within: Bounds, text: str) -> None:
    with suppress(UserError):
        assert checks.number("--x", text, within) == float(text)
        assert text.isascii()
        assert within.least <= float(text) <= within.most


@FEW
@given(value=st.one_of(st.integers(), st.floats()))
def test_bounds_agree_with_arithmetic(value: float) -> None:
    within = Bounds(0, 1000, whole=isinstance(value, int))
    try:
        checks.number("--x", repr(value), within)
    except UserError:
        assert not 0 <= value <= 1000
    else:
        assert 0 <= value <= 1000


@FEW
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=400))
@pytest.mark.parametrize("option", ["--model", "--resolution"])
def test_any_text_ends_in_one_line(option: str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["cost", f"{option}={text}", "--json"])
    err = capfd.readouterr().err
    assert left.value.code == 2, text
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def graph() -> BlockGraph:
    return trace(tiny.config("sd1"), n_tokens=tiny.N_TOKENS)


@FEW
@given(text=st.text(st.one_of(st.characters(), st.sampled_from("{},*+-./")), min_size=1, max_size=400))
def test_any_text_for_an_architecture_is_refused(graph: BlockGraph, text: str) -> None:
    with pytest.raises(UserError):
        presets.parse(text, graph)


@FEW
@given(text=st.one_of(st.text(max_size=20), st.from_regex(r"\A[0-9²٥.e]{1,8}[KMGBT]?(ms|s|MACs|%params)?\Z")))
def test_a_budget_is_an_amount_or_an_error(text: str) -> None:
    with suppress(UserError):
        number, scale, unit = amount(text)
        assert 0 < number < math.inf
        assert text.strip().isascii()
        assert text.strip().endswith(scale + unit)


LISTS = [
    (["evaluate", "--steps", "5,,10"], "--steps has an empty entry: got '5,,10'"),
    (["evaluate", "--measures", "fid,"], "--measures has an empty entry"),
    (["evaluate", "--cfg-scale", "3,nan"], "--cfg-scale takes numbers"),
    (["search", "--budget", "65%params", "--unit", ","], "--unit has an empty entry"),
]
BUDGETS = [
    (["search", "--budget", text], "budget")
    for text in ("nan%params", "inf%params", "1e999B", "²%params", "６5%params", "٦5%params", "0%params", "5Kms", "9" * 400 + "B")
]
RESOLUTIONS = [
    (["graph", "--resolution", "100000000"], "at most 16384 pixels"),
    (["graph", "--resolution", "²²"], "multiple of"),
    (["graph", "--resolution", "٣٢"], "multiple of"),
    (["graph", "--resolution", "9" * 5000], "multiple of"),
]
LONG_NAMES = [
    (["graph", "--model", LONG], "no model"),
    (["cost", "--arch", "/".join([LONG, "x.json"])], "x.json"),
    (["scan", "--out", LONG], "File name too long: give a shorter one"),
    (["scan", "--out", f"new/{LONG}/run"], "File name too long"),
    (["scan", "--out", "d/" * 3000], "File name too long"),
    (["distill", "--arch", "mid-removed", "--recipe", LONG], "no recipe"),
    (["evaluate", "--protocol", LONG], "no protocol"),
    (["evaluate", "--label", "l" * 500], "--label must be at most 200 characters"),
    (["search", "--budget", "65%params", "--study-name", "s" * 500], "--study-name must be at most 200 characters"),
    (["search", "--budget", "65%params", "--from-scan", LONG], "File name too long"),
    (["cache", "--data", LONG], "no data at"),
    (["stats", "images", LONG + ".npz"], "File name too long"),
]
OTHER = [
    (["cost", "--modle", "x"], "--modle"),
    (["cost", "stray"], "stray"),
    (["nothing"], "nothing"),
    (["distill"], "--arch"),
    (["scan", "--model", "a\0b"], "zero byte"),
    (["cost", "--arch", "{a,b}" * 40], "names: at most 1,000,000 are taken"),
    (["search", "--budget", "65%params", "postgresql://u:secret@h/x"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("argv", "says"), [*LISTS, *BUDGETS, *RESOLUTIONS, *LONG_NAMES, *OTHER])
def test_wrong_words_are_one_line(argv: list[str], says: str, one_line: OneLine, place: Path) -> None:
    line = one_line(*argv)
    assert says in line
    assert "secret" not in line
    assert len(line) < 2000
    assert not [*place.iterdir()]


OUTS = [command for command in COMMANDS if any(name == "out" for name, *_ in options_of(command))]


def with_out(command: str, out: Path | str) -> list[str]:
    if command == "stats":
        return ["stats", "images", str(out)]
    needs = [w for w in NEEDS.get(command, []) if w not in ("--out", "exported", "mapped.safetensors")]
    return [command, *needs, "--out", str(out)]


def name_of(command: str) -> str:
    return {"report": "page.html", "map-adapter": "mapped.safetensors", "stats": "real.npz"}.get(command, "run")


@pytest.mark.parametrize("command", OUTS)
@pytest.mark.parametrize("where", ["file/NAME", "file/deep/NAME", "/dev/null/NAME", "/proc/NAME", "dangling/NAME"])
def test_nothing_is_loaded_for_a_place_that_cannot_be_written(command: str, where: str, one_line: OneLine, place: Path) -> None:
    (place / "file").write_text("mine")
    (place / "dangling").symlink_to("nowhere")
    line = one_line(*with_out(command, where.replace("NAME", name_of(command))))
    assert name_of(command) in line
    assert "choose another" in line or "check the path" in line or "choose a place" in line
    assert sorted(p.name for p in place.iterdir()) == ["dangling", "file"]
    assert (place / "file").read_text() == "mine"


@pytest.mark.parametrize("command", OUTS)
def test_a_file_is_no_folder_and_a_folder_no_file(command: str, one_line: OneLine, place: Path) -> None:
    out = place / name_of(command)
    if command in checks.OUT_IS_FILE:
        out.mkdir()
        assert "must be a file" in one_line(*with_out(command, out))
    else:
        out.write_text("mine")
        assert "must be a directory" in one_line(*with_out(command, out))
        assert out.read_text() == "mine"


@pytest.mark.parametrize("command", checks.OUT_IS_RUN)
def test_a_folder_with_something_else_is_refused_first(command: str, one_line: OneLine, place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "letter.txt").write_text("dear")
    assert "is not empty and holds no run" in one_line(*with_out(command, place / "mine"))
    (place / "run" / "run.json").mkdir(parents=True)
    assert "must be a file, not a folder" in one_line(*with_out(command, place / "run"))
    (place / "runs").write_text("")
    assert "must be a directory: 'runs' is a file" in one_line(command, *NEEDS.get(command, []))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_in_which_nothing_can_be_made(
    number: int, one_line: OneLine, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr("blockprune.runs.directory.tempfile.TemporaryDirectory", refused)
    line = one_line("scan", "--out", place / "new")
    assert line.startswith(f"error: {str(place / 'new')!r}: ")
    assert "somewhere" not in line


@pytest.mark.parametrize(
    "argv",
    [
        ["cost", "--arch", "pipe.json"],
        ["cost", "--arch", "pipe"],
        ["scan", "--prompts", "pipe.txt"],
        ["scan", "--data", "pipe"],
        ["scan", "--reference", "pipe.npz"],
        ["scan", "--model", "pipe.safetensors"],
        ["scan", "--inception-weights", "pipe.pt", "--detector", "inception"],
        ["distill", "--arch", "mid-removed", "--recipe", "pipe.toml"],
        ["evaluate", "--protocol", "pipe.toml"],
        ["evaluate", "--prompts", "/dev/zero"],
        ["map-adapter", "pipe.safetensors", "--model", "m", "--out", "o.safetensors"],
        ["report", "pipe"],
        ["scan", "--out", "pipe"],
    ],
)
def test_a_pipe_does_not_hang(argv: list[str], one_line: OneLine, place: Path) -> None:
    for word in argv:
        if word.startswith("pipe"):
            os.mkfifo(place / word)
    assert "is a pipe or a device" in one_line(*argv)


def test_block_names_are_no_paths(cli: Cli, one_line: OneLine, place: Path) -> None:
    names = [f"down_blocks.{i}.{kind}.{j}" for i in (0, 1) for kind in ("resnets", "attentions") for j in (0, 1)]
    (place / "mid_block").write_text("no architecture")
    code, _, err = cli("cost", "--arch", "mid_block", "--json")
    assert code == 0, err
    many = ",".join(["-mid_block"] * 40)  # longer than a file's name may be
    code, _, err = cli("cost", "--arch", many, "--json")
    assert code == 0, err
    (place / "best").write_text(Architecture(frozenset({"mid_block"})).dumps())
    assert cli("cost", "--arch", "best", "--json")[0] == 0
    line = one_line("distill", "--arch", ",".join([*names, "nothing"] * 3))
    assert "File name too long" not in line
    assert "no block" in line


def test_a_scheduler_that_cannot_take_so_few_or_many_steps() -> None:
    pipe = SimpleNamespace(scheduler=DDIMScheduler(steps_offset=1))
    for steps in (1, 2, 3, 1001):
        with pytest.raises(UserError, match=f"the scheduler pndm cannot draw in {steps} steps"):
            check_schedule(pipe, Protocol(1, steps, 7.5, 0, (1, 1), "pndm"))
    for name in ("", *SCHEDULERS):
        check_schedule(pipe, Protocol(1, 25, 7.5, 0, (1, 1), name))


@pytest.mark.parametrize("field", ["n_images", "n_steps", "cfg_scale", "seed"])
def test_a_protocol_takes_no_number_that_is_none(field: str) -> None:
    good: dict[str, Any] = {"n_images": 1, "n_steps": 4, "cfg_scale": 7.5, "seed": 0, "latent": (1, 1)}
    Protocol(**good)
    for value in (math.nan, math.inf, -1):
        with pytest.raises(UserError, match=f"{field.replace('_', '-')} must be at least"):
            Protocol(**{**good, field: value})


def test_half_precision_on_a_processor_is_refused_before_training(one_line: OneLine, place: Path) -> None:
    line = one_line("distill", "--arch", "mid-removed", "--device", "cpu", "--mixed-precision", "fp16", "--out", place / "run")
    assert "cannot train with --mixed-precision fp16 on a processor: give bf16 or no" in line
    assert not [*place.iterdir()]


def test_default_folders_have_names_that_any_system_takes(place: Path) -> None:
    assert default_out("distill", "bk-sdm-small") == Path("runs/distill-bk-sdm-small")
    first, second = (default_out("distill", ",".join(f"down_blocks.{i}.resnets.{j}" for i in range(20))) for j in (0, 1))
    assert first != second
    assert len(first.name) < 100
