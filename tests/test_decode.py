"""Decoding files from outside: strict, within limits, and for any changed document either a value or a UserError."""

from __future__ import annotations

import copy
import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
import report_rows
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockprune.data import cache
from blockprune.decode import DEPTH, Object, check_keys, checked, json_lines, parse_json, read_bytes, read_json, read_toml
from blockprune.errors import UserError
from blockprune.export import adapters, pipeline
from blockprune.export.stock_config import BlockMap, BlockMapRecord
from blockprune.measures.measure import MEASURES
from blockprune.measures.score import Score
from blockprune.model import config_schema, defaults, pretrained
from blockprune.model.architecture import Architecture, ArchitectureRecord
from blockprune.model.config_schema import SCHEMAS
from blockprune.model.defaults import defaults_of
from blockprune.model.graph import BlockGraph, GraphRecord
from blockprune.model.trace import trace
from blockprune.reports.report_data import report_data
from blockprune.runs import schema
from blockprune.runs.records import Candidate, Evaluation
from blockprune.stages.evaluate.protocol import Rules
from blockprune.stages.search import storage, trials
from blockprune.stages.search.storage import open_storage
from blockprune.stages.search.trials import Trials
from blockprune.stages.train import checkpoints, recipe
from blockprune.stages.train.finished import Finished
from blockprune.stages.train.recipe import Recipe

FIX = "mend it"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot read the file: "),
        ("[1]", "$: expected object, got array"),
        ('{"a": NaN}', "invalid character"),
        ('{"a": 1e999}', "out of range"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": "\\udc00\\ud800"}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "no UTF-8 text (byte 7)"),
        ('{"a":' * (DEPTH + 1) + "1" + "}" * (DEPTH + 1), f"nested more than {DEPTH} deep"),
        ("[" * 10**6, f"nested more than {DEPTH} deep"),
        ("1" * 10**5, "out of range"),
    ],
)
def test_what_is_no_json(text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_json(text, Object, "the file", FIX)
    assert says in str(caught.value)
    assert str(caught.value).endswith(f"; {FIX}")


def test_json_as_deep_as_allowed_and_every_character() -> None:
    deep = '{"a":' * (DEPTH - 1) + "{}" + "}" * (DEPTH - 1)
    assert json.dumps(parse_json(deep, Object, "", "")).replace(" ", "") == deep
    text = '{"a": "\\ud83d\\ude00 \\\\ud800 [[[[ \\u0000"}'
    assert parse_json(text, Object, "", "") == {"a": "\U0001f600 \\ud800 [[[[ \0"}


def test_named_floats_where_they_are_allowed() -> None:
    found = parse_json('{"a": [NaN, -Infinity, 1.5], "b": "NaN"}', Object, "", "", infinite=True)
    assert (str(found["a"]), found["b"]) == ("[nan, -inf, 1.5]", "NaN")
    with pytest.raises(UserError, match="half of a surrogate pair"):
        parse_json('{"a": NaN, "b": "\\ud800"}', Object, "", "", infinite=True)


def test_the_path_and_the_value_are_named() -> None:
    with pytest.raises(UserError, match=r"^cannot read x: \$\.removed\[1\]: expected str, got int \(7\); mend it$"):
        checked({"format": 1, "removed": ["a", 7]}, ArchitectureRecord, "x", FIX)
    with pytest.raises(UserError, match=r"^cannot read x: it lacks 'removed'; mend it$"):
        checked({"format": 1}, ArchitectureRecord, "x", FIX)


def test_only_regular_files_of_a_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"{}   ")
    assert read_bytes(tmp_path / "file", FIX, limit=5) == b"{}   "
    assert read_json(tmp_path / "file", Object, FIX) == {}
    with pytest.raises(UserError, match="5 bytes, more than the 4 allowed"):
        read_bytes(tmp_path / "file", FIX, limit=4)
    os.mkfifo(tmp_path / "fifo")
    for name, says in {"fifo": "no regular file", "": "a directory", "none": "No such file", "file/x": "Not a dir"}.items():
        with pytest.raises(UserError, match=says):
            read_bytes(tmp_path / name, FIX)
    with pytest.raises(UserError, match="File name too long"):
        read_bytes(tmp_path / ("x" * 300), FIX)
    with pytest.raises(UserError, match="null byte"):
        read_bytes(Path("a\0b"), FIX)
    with pytest.raises(UserError, match=r"^nothing there$"):
        read_bytes(tmp_path / "none", FIX, missing="nothing there")


def test_lines_are_counted_and_a_torn_last_one_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"a": 1}\n{"a": NaN}\n{"a": ')
    assert [what for what, _ in json_lines(tmp_path / "rows", FIX)] == [f"line {n} of {str(tmp_path / 'rows')!r}" for n in (1, 2)]
    (tmp_path / "rows").write_text('{"a": 1}\n[]\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"line 2 of .*expected object, got array"):
        list(json_lines(tmp_path / "rows", FIX))


@pytest.mark.parametrize("text", ["a = ", "a = " + "[" * 10_000, "a = " + "9" * 10_000, "a." * 5000 + "a = 1", 'a = "\\ud800"'])
def test_what_is_no_toml(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError, match="cannot read x: "):
        read_toml(tmp_path / "x.toml", Object, "x", FIX)


def schemas() -> Iterator[type]:
    for module in (adapters, cache, pipeline, storage, trials, config_schema, schema, recipe, checkpoints, defaults):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, msgspec.Struct):
                yield value
    yield from (Rules, Recipe, Score, GraphRecord, BlockMapRecord)


def unions(kind: Any) -> Iterator[tuple[Any, ...]]:
    """Every union in a type, and in what it is made of."""
    if isinstance(kind, msgspec.inspect.UnionType):
        yield kind.types
    inner = [getattr(kind, name, None) for name in ("item_type", "key_type", "value_type")]
    inner += [*getattr(kind, "item_types", ()), *getattr(kind, "types", ()), *(f.type for f in getattr(kind, "fields", ()))]
    for part in inner:
        if isinstance(part, msgspec.inspect.Type):
            yield from unions(part)


def test_no_schema_has_the_union_that_crashes_msgspec() -> None:
    scalars = (msgspec.inspect.IntType, msgspec.inspect.FloatType, msgspec.inspect.StrType)
    bounds = ("ge", "le", "gt", "lt", "min_length", "max_length", "pattern")
    assert len({*schemas()}) > 20
    for form in schemas():
        for types in unions(msgspec.inspect.type_info(form)):
            bounded = [t for t in types if isinstance(t, scalars) and any(getattr(t, b, None) is not None for b in bounds)]
            assert not (bounded and any(isinstance(t, msgspec.inspect.TupleType) for t in types)), form


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "x", "full", "mid_block", "\0", "\u202e", "a" * 300, "../../x", "eps_mse"]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, [1, 2], ["x"], {"x": 1}, {"kind": []}]),
)


def _paths(data: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, the first and last of a long list only."""
    if before:
        yield before
    keys = list(data) if isinstance(data, dict) else [*range(len(data))] if isinstance(data, list) else []
    for key in keys if len(keys) < 40 else [*keys[:2], keys[-1]]:
        yield from _paths(data[key], (*before, key))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """The document with one or two of its places taken away, replaced or nested too deep."""
    data = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        if not (paths := list(_paths(data))):
            return data
        *outer, last = draw(st.sampled_from(paths))
        place = data
        for key in outer:
            place = place[key]
        if draw(st.booleans()) and isinstance(place, dict):
            del place[last]
            continue
        place[last] = copy.deepcopy(draw(JUNK))
    return data


def _refused(read: Callable[[], object]) -> str:
    """Why a reader refuses what it reads, "" where it does not; what else it raises goes through."""
    try:
        read()
    except UserError as err:
        return str(err)
    return ""


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _written(name: str, read: Callable[[Path], object]) -> Callable[[Any, Path], object]:
    """Writes a document as that file of a folder, then reads the folder."""

    def write(data: Any, folder: Path) -> object:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(data) + "\n")
        return read(folder)

    return write


def _traced(folder: Path) -> object:
    config = pretrained.read_config(folder / "config.json", "unet/config.json")
    return trace(config, n_tokens=8)


def _model(folder: Path) -> object:
    return trace((found := pretrained.configs(str(folder))).unet, found.latent(), found.n_tokens)


def _ledger(storage_file: Path) -> object:
    book = Trials(open_storage(None, storage_file), "s", "eps_mse", {"objective": "eps_mse"})
    book.recover()
    return book.evaluations(), book.known(), book.cached, book.busy()


def _score() -> Score:
    return Score("0" * 12, "full", "eps_mse", 1.5, 4, 0, 1.0, 2.0)


def _evaluation() -> Evaluation:
    arch = Architecture(frozenset({"mid_block"}))
    return Evaluation(
        0, Candidate(arch, "m", "tpe", {"mid_block": True}, {"80%params": -1.0}, {"params": 3}), (_score(),), 1.0, 2.0
    )


TERMS = {"data": "d", "n": 3, "resolution": 16, "flip": False, "shard_size": 2, "teacher": "t", "dtype": "float32"}
PHASES = [{"teacher": "tiny", "arch": ["mid_block"], "first": 0, "last": 6}]
TRAINED = {"format": 1, "command": "distill", "asked": {"teacher": "t", "teacher_model": "m", "phases": PHASES}}
BLOCKS = {"format": 1, "moved": {"up_blocks.1": "up_blocks.0"}, "removed": ["up_blocks.0"]}
LORA = {"unet.target_modules": ["conv_in"], "unet.rank_pattern": {"conv_in": 4}, "unet.alpha_pattern": {"conv_in": 2.5}}


def _lora(data: Any, folder: Path) -> object:
    blocks = BlockMap({}, frozenset())
    key = "unet.conv_in.lora_A.weight"
    return adapters.map_lora({key: tiny.torch.ones(2, 4, 3, 3)}, blocks, {adapters.METADATA: json.dumps(data)})


def _config(kind: str) -> dict[str, Any]:
    return {"_class_name": "UNet2DConditionModel", **tiny.config(kind)}


def _kind(form: Any) -> Callable[[Any, Path], object]:
    def read(data: Any, folder: Path) -> object:
        value = checked(data, form, "x", FIX)
        check_keys(data, form, "x")
        return value

    return read


READERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], object]]] = {
    "architecture": (lambda: Architecture(frozenset({"mid_block"})).to_json(), lambda d, _: Architecture.from_json(d)),
    "graph": (lambda: _plain(report_rows.graph().to_json()), lambda d, _: BlockGraph.from_json(d)),
    "score": (lambda: _score().to_json(), lambda d, _: Score.from_json(d)),
    "evaluation": (lambda: _plain(_evaluation().to_json()), lambda d, _: Evaluation.from_json(d)),
    "block map": (lambda: BLOCKS, lambda d, _: BlockMap.from_json(d)),
    "recipe": (lambda: _plain(Recipe().to_json()), _kind(Recipe)),
    "protocol": (lambda: _plain({f.name: getattr(Rules(), f.name) for f in fields(Rules)}), _kind(Rules)),
    "defaults": (
        lambda: defaults.DEFAULTS | {"detector": "x", "data": "digits"},
        _written("blockprune.json", lambda f: defaults.defaults_of(str(f))),
    ),
    "checkpoint": (
        lambda: {"step": 3, "sha256": {"student.safetensors": "0" * 64}},
        _written("step-0000003/checkpoint.json", checkpoints.read_snapshot),
    ),
    "cache": (lambda: {"format": 1, "source": "x", "asked": TERMS}, _written("cache.json", cache.Cached)),
    "trained": (lambda: TRAINED, _written("run.json", Finished.of)),
    "teacher": (
        lambda: {"model": "m", "identity": "i", "unet": _plain(_config("sd1"))},
        _written("pruning/teacher.json", pipeline.read_teacher),
    ),
    "adapter": (lambda: LORA, _lora),
    "U-Net": (lambda: _plain(_config("sd1")), _written("config.json", _traced)),
    "SDXL U-Net": (lambda: _plain(_config("sdxl")), _written("config.json", _traced)),
}
SLOW = {"U-Net": 8, "SDXL U-Net": 4}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.endswith("U-Net")) for n in READERS])
def test_a_changed_document_is_read_or_refused(name: str, tmp_path: Path) -> None:
    make, read = READERS[name]
    document = make()
    refused: list[str] = []

    @settings(derandomize=True, database=None, deadline=None, max_examples=SLOW.get(name, 80), suppress_health_check=[*HealthCheck])
    @given(changed(document))
    def check(data: Any) -> None:
        refused.append(_refused(lambda: read(data, tmp_path)))

    if name not in ("checkpoint", "cache", "trained"):  # these read more than the one file
        read(document, tmp_path)
    check()
    assert any(refused) or name == "checkpoint"  # a checkpoint that is not sound is passed over
    gc.collect()


@pytest.fixture
def known_measures() -> Iterator[None]:
    """Forgets the measures that a run defined."""
    before = dict(MEASURES)
    yield
    MEASURES.clear()
    MEASURES.update(before)


def test_a_default_that_no_path_could_be_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "blockprune.json").write_text(json.dumps({"clip": "a" * 300, "detector": "a\0b"}))
    found = defaults_of(str(tmp_path))
    assert (found["clip"], found["detector"]) == ("a" * 300, "a\0b")


@pytest.mark.parametrize("kind", ["scan", "search", "distill", "evaluate"])
@pytest.mark.parametrize("file", ["run.json", "rows.jsonl"])
@pytest.mark.usefixtures("known_measures")
def test_a_changed_run_is_reported_or_refused(kind: str, file: str, tmp_path: Path) -> None:
    folder = getattr(report_rows, kind)(tmp_path / "run", *(("small",) if kind == "evaluate" else ()))
    text = (folder / file).read_text()
    rows = [json.loads(line) for line in text.splitlines()] if file == "rows.jsonl" else json.loads(text)

    @settings(derandomize=True, database=None, deadline=None, max_examples=25, suppress_health_check=[*HealthCheck])
    @given(changed(rows))
    def check(data: Any) -> None:
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in (data if isinstance(data, list) else [data])))
        _refused(lambda: report_data([folder]))

    report_data([folder])
    check()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("unet")) for n in SCHEMAS])
def test_a_changed_model_folder_is_read_or_refused(name: str, tmp_path: Path) -> None:
    tiny.pipeline("sdxl" if "text_encoder_2" in name else "sd1", tmp_path / "model")
    document = json.loads((tmp_path / "model" / name).read_text())

    @settings(derandomize=True, database=None, deadline=None, max_examples=5, suppress_health_check=[*HealthCheck])
    @given(changed(document))
    def check(data: Any) -> None:
        (tmp_path / "model" / name).write_text(json.dumps(data))
        _refused(lambda: _model(tmp_path / "model"))

    _model(tmp_path / "model")
    check()


def test_a_changed_journal_is_read_or_refused(tmp_path: Path) -> None:
    book = Trials(open_storage(None, tmp_path / "journal"), "s", "eps_mse", {"objective": "eps_mse"})
    book.add([_evaluation().candidate])
    trial = book.claim()
    assert trial is not None and book.finish(trial, (_score(),)) is not None
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]

    @settings(derandomize=True, database=None, deadline=None, max_examples=80, suppress_health_check=[*HealthCheck])
    @given(changed(lines))
    def check(data: Any) -> None:
        (tmp_path / "journal").write_text("".join(json.dumps(line) + "\n" for line in data))
        _refused(lambda: _ledger(tmp_path / "journal"))

    _ledger(tmp_path / "journal")
    check()
