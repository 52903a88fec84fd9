"""Damaged files through the command line: exit code 2 and one line, whatever the file is and whatever is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_rows
import tiny
import torch
from as_user import pictures, run
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from blockprune.export.pipeline import export_pipeline, save_student
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture

Folder = Callable[[str], Path]
OneLine = Callable[..., str]

SMALL = ("--n-images", "2", "--steps", "1", "--batch-size", "2")
SCAN = ("scan", "--unit", "stage", "--measures", "eps_mse,params", "--eps-samples", "4", *SMALL)
SEARCH = ("search", "--unit", "stage", "--budget", "75%params", "--trials", "2", "--eps-samples", "4", "--finalists", "1", *SMALL)
SEARCH = (*SEARCH, "--final-factor", "1")
EVALUATE = ("evaluate", "--measures", "clip_score", *SMALL)
STUDENT = Architecture(frozenset({"down_blocks.1.resnets.0"}))  # no stock configuration has it
RECIPE, PROTOCOL = 'task = 1.0\ntaps = "stages"\n[[phases]]\nsteps = 3\n', 'image = "png"\nn_images = 2\nmeasures = ["fid"]\n'
DEFAULTS = {"n_images": 2, "steps": 1, "cfg_scale": 3.0, "batch_size": 2, "eps_samples": 4}


@pytest.fixture(scope="module")
def sources(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sound example of everything that is read."""
    root = tmp_path_factory.mktemp("sources")
    for make in (report_rows.scan, report_rows.search, report_rows.distill):
        make(root / make.__name__)
    report_rows.evaluate(root / "evaluate", "small", report_rows.STUDENT)
    shutil.copytree(tiny_folder("sd1"), root / "model")
    (root / "model" / "blockprune.json").write_text(json.dumps(DEFAULTS))
    (root / "arch").mkdir()
    (root / "arch" / "mine.json").write_text(Architecture(frozenset({"mid_block"})).dumps())
    (root / "toml").mkdir()
    (root / "toml" / "recipe.toml").write_text(RECIPE)
    (root / "toml" / "protocol.toml").write_text(PROTOCOL)
    pipe = pretrained.load(str(tiny_folder("sd1")))
    student = surgery.prune(pipe.unet, STUDENT)
    save_student(student, STUDENT, root / "student" / "student")
    (root / "student" / "card.json").write_text('{"steps": 77}')
    run = {"format": 1, "command": "distill", "asked": {"teacher_model": str(tiny_folder("sd1"))}}
    (root / "student" / "run.json").write_text(json.dumps(run))
    export_pipeline(pipe, student, STUDENT, root / "exported", {}, ("tiny", "0" * 12))
    save_file({"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, root / "exported" / "lora.safetensors")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small runs of the built-in model, to be gone on with."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        tiny.drifting_clock(patch)
        for command in (SCAN, SEARCH, EVALUATE):
            run(*command, "--out", str(root / command[0]))
    images = pictures(root / "images", 3, 16)
    (images / "metadata.jsonl").write_text("".join(f'{{"file_name": "{i:03d}.png", "text": "a"}}\n' for i in range(3)))
    run("cache", "--data", str(images), "--out", str(root / "cache"))
    return root


@dataclass(frozen=True)
class Reader:
    """A file in a folder of `sources`, and the command that reads it; {} in the command is the folder."""

    file: str
    command: str

    def argv(self, folder: Path, out: Path) -> list[str]:
        return [word.replace("{}", str(folder)).replace("OUT", str(out)) for word in self.command.split()]


READERS = {
    f"{reader.file} by {reader.command.split()[0]}": reader
    for reader in (
        *(Reader(f"{kind}/run.json", "report {} --out OUT.html") for kind in ("scan", "search", "distill", "evaluate")),
        Reader("scan/rows.jsonl", "report {} --out OUT.html"),
        Reader("evaluate/rows.jsonl", "report {} --out OUT.html"),
        Reader("scan/run.json", "search --model tiny-digits --solve-only --from-scan {} --budget 70%params"),
        *(
            Reader(f"model/{name}", "graph --model {}")
            for name in (
                "model_index.json",
                "unet/config.json",
                "vae/config.json",
                "text_encoder/config.json",
                "scheduler/scheduler_config.json",
            )
        ),
        Reader("model/unet/config.json", "cost --model {}"),
        Reader("model/blockprune.json", "scan --model {} --out OUT"),
        Reader("arch/mine.json", "cost --arch {}/mine.json"),
        Reader("toml/recipe.toml", "distill --arch mid_block --recipe {}/recipe.toml --out OUT"),
        Reader("toml/protocol.toml", "evaluate --protocol {}/protocol.toml --out OUT"),
        Reader("student/run.json", "export {} --out OUT"),
        Reader("student/card.json", "export {} --out OUT"),
        Reader("student/student/architecture.json", "export {} --out OUT"),
        Reader("student/student/config.json", "export {} --out OUT"),
        Reader("exported/pruning/teacher.json", "evaluate --model {} --measures clip_score --out OUT"),
        Reader("exported/pruning/architecture.json", "evaluate --model {} --measures clip_score --out OUT"),
        Reader("exported/pruning/block_map.json", "map-adapter {}/lora.safetensors --model {} --out OUT.safetensors"),
        Reader("exported/unet/config.json", "map-adapter {}/lora.safetensors --model {} --out OUT.safetensors"),
        Reader("exported/model_index.json", "evaluate --model {} --measures clip_score --out OUT"),
    )
}


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "no text": lambda f: f.write_bytes(b"\xff\xfe{}\n"),
    "zeros": lambda f: f.write_bytes(b"\0" * 40 + b"\n"),
    "cut": lambda f: f.write_bytes(f.read_bytes().strip()[:-1] + b"\n" if f.suffix != ".toml" else b"task = [1,"),
    "nested lists": lambda f: f.write_bytes((b"x = " if f.suffix == ".toml" else b"") + b"[" * 100_000 + b"\n"),
    "nested objects": lambda f: f.write_bytes(
        (b"x = " + b"{a=" * 10_000 if f.suffix == ".toml" else b'{"a":' * 500 + b"1" + b"}" * 500) + b"\n"
    ),
    "long number": lambda f: f.write_bytes((b"x = " if f.suffix == ".toml" else b"") + b"9" * 10_000 + b"\n"),
    "surrogate": lambda f: f.write_bytes(b'x = "\\ud800"\n' if f.suffix == ".toml" else b'{"a": "\\ud800"}\n'),
    "list": lambda f: f.write_bytes(b"x = []\n" if f.suffix == ".toml" else b"[]\n"),
    "number": lambda f: f.write_bytes(b"x = 7\n" if f.suffix == ".toml" else b"7\n"),
    "directory": _directory,
    "fifo": _fifo,
}
# a file of each kind with every damage; for the other readers, which decode alike, that they do
EVERY = ("scan/run.json by report", "scan/rows.jsonl by report", "model/unet/config.json by graph", "arch/mine.json by cost")
EVERY = (*EVERY, "toml/recipe.toml by distill", "model/blockprune.json by scan", "student/card.json by export")
SOME = ("nested lists", "number", "directory")


@pytest.mark.parametrize(("name", "damage"), [(name, d) for name in READERS for d in (DAMAGES if name in EVERY else SOME)])
def test_a_damaged_file_is_one_line(name: str, damage: str, sources: Path, tmp_path: Path, one_line: OneLine) -> None:
    reader = READERS[name]
    folder = Path(shutil.copytree(sources / reader.file.partition("/")[0], tmp_path / "given"))
    DAMAGES[damage](folder / reader.file.partition("/")[2])
    line = one_line(*reader.argv(folder, tmp_path / "out"))
    assert Path(reader.file).name in line or str(folder) in line
    assert not (tmp_path / "out").exists()


def _changed(data: Any, path: str, value: Any) -> Any:
    """The data with what is at a path such as "graph.blocks.0" replaced, or taken away where the value is ...; in place."""
    *outer, last = path.split(".")
    place = data
    for key in outer:
        place = place[int(key) if isinstance(place, list) else key]
    last_key: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[last_key]
    else:
        place[last_key] = value
    return data


SHAPES: list[tuple[str, str, Any, str]] = [  # reader, path, value (... for none), what the line says
    ("model/unet/config.json by graph", "sample_size", ..., "lacks 'sample_size'"),
    ("model/unet/config.json by graph", "sample_size", "eight", "$.sample_size"),
    ("model/unet/config.json by graph", "sample_size", True, "$.sample_size"),
    ("model/unet/config.json by graph", "sample_size", 10**9, "$.sample_size"),
    ("model/unet/config.json by graph", "block_out_channels", [8, 16], "block_out_channels of 4 values"),
    ("model/unet/config.json by graph", "block_out_channels.0", 0, "$.block_out_channels[0]"),
    ("model/unet/config.json by graph", "block_out_channels.1", 7, "no network that can be built"),
    ("model/unet/config.json by graph", "layers_per_block", 10**9, "$.layers_per_block"),
    ("model/unet/config.json by graph", "layers_per_block", [2, 2], "layers_per_block of 4 values"),
    ("model/unet/config.json by graph", "down_block_types.0", "NoSuchBlock2D", "no network that can be built"),
    ("model/unet/config.json by graph", "down_block_types.0", 3, "$.down_block_types[0]"),
    ("model/unet/config.json by graph", "up_block_types", ["UpBlock2D"], "up_block_types of 4 values"),
    ("model/unet/config.json by graph", "cross_attention_dim", ["x"], "$.cross_attention_dim"),
    ("model/unet/config.json by graph", "addition_embed_type", "text_time", "text_time"),
    ("model/unet/config.json by graph", "addition_embed_type", [1], "$.addition_embed_type"),
    ("model/unet/config.json by graph", "act_fn", "no such function", "no network that can be built"),
    ("model/unet/config.json by cost", "norm_num_groups", 3, "no network that can be built"),
    ("model/model_index.json by graph", "_class_name", ["x"], "holds a ['x']"),
    ("model/model_index.json by graph", "unet", 7, "$.unet"),
    ("model/model_index.json by graph", "vae", ["diffusers"], "$.vae"),
    ("model/model_index.json by graph", "text_encoder", [None, None], "$.text_encoder"),
    ("model/vae/config.json by graph", "block_out_channels", "x", "$.block_out_channels"),
    ("model/vae/config.json by graph", "scaling_factor", float("nan"), "$.scaling_factor"),
    ("model/text_encoder/config.json by graph", "num_hidden_layers", 10**9, "$.num_hidden_layers"),
    ("model/text_encoder/config.json by graph", "max_position_embeddings", "x", "$.max_position_embeddings"),
    ("model/scheduler/scheduler_config.json by graph", "num_train_timesteps", -1, "$.num_train_timesteps"),
    ("model/blockprune.json by scan", "n_images", 10**12, "$.n_images"),
    ("model/blockprune.json by scan", "steps", "ten", "$.steps"),
    ("model/blockprune.json by scan", "cfg_scale", float("inf"), "blockprune.json"),
    ("model/blockprune.json by scan", "prompts", 7, "$.prompts"),
    ("model/blockprune.json by scan", "wizard", 7, "unknown key 'wizard'"),
    ("arch/mine.json by cost", "removed", [["mid_block"]], "$.removed[0]"),
    ("arch/mine.json by cost", "removed", [7], "$.removed[0]"),
    ("arch/mine.json by cost", "removed", {"mid_block": 1}, "$.removed"),
    ("arch/mine.json by cost", "removed", ["a b"], "a removed block is a module path"),
    ("arch/mine.json by cost", "format", 2, "$.format"),
    ("scan/run.json by report", "archs", ["full"], "$.archs"),
    ("scan/run.json by report", "archs", {"full": [[]]}, "$.archs"),
    ("scan/run.json by report", "archs.mid_block", ["nothing.like.it"], "nothing.like.it"),
    ("scan/run.json by report", "graph.blocks.0.cost.macs.thop", "x", "$.graph.blocks[0].cost.macs.thop"),
    ("scan/run.json by report", "graph.blocks.0.kind", "Z", "$.graph.blocks[0].kind"),
    ("scan/run.json by report", "graph.blocks.0.skips", ["nothing"], "'nothing'"),
    ("scan/run.json by report", "graph.blocks.0", [], "$.graph.blocks[0]"),
    ("scan/run.json by report", "graph.total", ..., "lacks 'total'"),
    ("scan/run.json by report", "asked.measures", 7, "$.asked.measures"),
    ("scan/run.json by report", "pictured_prompts", [7], "$.pictured_prompts[0]"),
    ("scan/run.json by report", "made_with", [], "$.made_with"),
    ("scan/run.json by report", "command", ["scan"], "$.command"),
    ("search/run.json by report", "asked.budget", "half", "$.asked.budget"),
    ("search/run.json by report", "asked.budget", ["half"], "the budget 'half'"),
    ("search/run.json by report", "asked.pareto", "speed", "$.asked.pareto"),
    ("search/run.json by report", "asked.objective", ..., "lacks 'objective'"),
    ("search/run.json by report", "outside_params", -1, "$.outside_params"),
    ("distill/run.json by report", "arch", "mid_block", "$.arch"),
    ("evaluate/run.json by report", "settings.0.steps", "ten", "$.settings[0].steps"),
    ("evaluate/run.json by report", "settings.0.label", ..., "lacks 'label'"),
    ("evaluate/run.json by report", "protocol", [], "$.protocol"),
    ("evaluate/run.json by report", "label", 7, "$.label"),
    ("student/student/config.json by export", "sample_size", ..., "lacks 'sample_size'"),
    ("exported/pruning/teacher.json by evaluate", "unet.down_block_types", [], "$.unet.down_block_types"),
    ("exported/pruning/teacher.json by evaluate", "model", 7, "$.model"),
    ("exported/pruning/block_map.json by map-adapter", "moved", {"a": 7}, "$.moved"),
    ("exported/pruning/block_map.json by map-adapter", "removed", ..., "lacks 'removed'"),
]


@pytest.mark.parametrize(("name", "path", "value", "says"), SHAPES, ids=lambda v: str(v)[:40])
def test_wrong_shapes_of_right_json(
    name: str, path: str, value: Any, says: str, sources: Path, tmp_path: Path, one_line: OneLine
) -> None:
    reader = READERS[name]
    folder = Path(shutil.copytree(sources / reader.file.partition("/")[0], tmp_path / "given"))
    file = folder / reader.file.partition("/")[2]
    file.write_text(json.dumps(_changed(json.loads(file.read_text()), path, value)))
    assert says in one_line(*reader.argv(folder, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("recipe", "task = nan", "task must not be negative, and finite"),
        ("recipe", "learning_rate = inf", "learning_rate must be above 0, and finite"),
        ("recipe", "learning_rate = -1", "learning_rate must be above 0"),
        ("recipe", f"task = {10**400}", "$.task"),
        ("recipe", "task = true", "$.task: expected float, got bool"),
        ("recipe", "taps = [1]", "$.taps[0]"),
        ("recipe", "phases = 1", "$.phases"),
        ("recipe", f"[[phases]]\nsteps = {10**12}", "$.phases[0].steps"),
        ("protocol", "cfg_scale = nan", "cfg_scale must be at least 0"),
        ("protocol", "cfg_scale = inf", "cfg_scale must be at most"),
        ("protocol", f"n_images = {10**18}", "n_images must be at most"),
        ("protocol", f"n_images = {10**400}", "n_images"),
        ("protocol", "resize = -1", "resize must be at least 0"),
        ("protocol", "measures = []", "measures is empty"),
        ("protocol", "measures = [1]", "$.measures[0]"),
        ("protocol", "steps = 1979-05-27", "$.steps"),
    ],
)
def test_wrong_numbers_of_recipes_and_protocols(
    name: str, text: str, says: str, sources: Path, tmp_path: Path, one_line: OneLine
) -> None:
    (tmp_path / f"{name}.toml").write_text(text + "\n")
    assert says in one_line(*READERS[f"toml/{name}.toml by {READERS_OF[name]}"].argv(tmp_path, tmp_path / "out"))


READERS_OF = {"recipe": "distill", "protocol": "evaluate"}


def _line(file: Path, number: int, change: Callable[[Any], Any]) -> None:
    """Changes one row in a file of rows; a text is written as it is."""
    lines = file.read_text().splitlines()
    new = change(json.loads(lines[number]))
    lines[number] = new if isinstance(new, str) else json.dumps(new)
    file.write_text("\n".join(lines) + "\n")


def _part(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_arrays(change(load_arrays(file)), file)


def _first(folder: Path) -> Path:
    return sorted(folder.rglob("parts/**/*.safetensors"))[0]


ROW = "line 1 of"
RESUMED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a row that lacks a key": ("scan", lambda f: _line(f / "rows.jsonl", 0, lambda r: _changed(r, "label", ...)), ROW),
    "a row with another type": ("scan", lambda f: _line(f / "rows.jsonl", 0, lambda r: r | {"n": "x"}), "$.n"),
    "a row of a list": ("scan", lambda f: _line(f / "rows.jsonl", 0, lambda r: "[]"), ROW),
    "a deep row": ("scan", lambda f: _line(f / "rows.jsonl", 0, lambda r: "[" * 100_000), ROW),
    "rows as a directory": ("scan", lambda f: _directory(f / "rows.jsonl"), "a directory"),
    "rows as a fifo": ("scan", lambda f: _fifo(f / "rows.jsonl"), "no regular file"),
    "run.json as a directory": ("scan", lambda f: _directory(f / "run.json"), "not a folder"),
    "run.json without asked": ("scan", lambda f: (f / "run.json").write_text('{"format": 1, "command": "scan"}'), "'asked'"),
    "an empty part": ("scan", lambda f: (_forget(f), _first(f).write_bytes(b"")), "safetensors"),
    "a cut part": ("scan", lambda f: (_forget(f), _first(f).write_bytes(_first(f).read_bytes()[:100])), "safetensors"),
    "a part of no arrays": ("scan", lambda f: (_forget(f), _part(_first(f), lambda a: {})), "safetensors"),
    "a part that lacks one": ("scan", lambda f: (_forget(f), _part(_first(f), lambda a: {"index": a["index"]})), "belong together"),
    "a part of other shapes": (
        "scan",
        lambda f: (_forget(f), _part(_first(f), lambda a: a | {"errors": np.stack([a["errors"]] * 2, 1)})),
        "belong together",
    ),
    "a part as a fifo": ("scan", lambda f: (_forget(f), _fifo(_first(f))), "no regular file"),
    "an empty seen part": ("evaluate", lambda f: (_forget(f), _first(f).write_bytes(b"")), "safetensors"),
    "a seen part without index": (
        "evaluate",
        lambda f: (_forget(f), _part(_first(f), lambda a: {k: v for k, v in a.items() if k != "index"})),
        "which images",
    ),
    "a seen part of other images": (
        "evaluate",
        lambda f: (_forget(f), _part(_first(f), lambda a: a | {"index": a["index"] + 100})),
        "index is not of images",
    ),
    "an evaluation's row": ("evaluate", lambda f: _line(f / "rows.jsonl", 0, lambda r: _changed(r, "kind", ...)), "$.kind"),
    "a search's row": ("search", lambda f: _line(f / "rows.jsonl", 0, lambda r: r | {"tiers": []}), "$.tiers"),
    "a journal of garbage": ("search", lambda f: _line(f / "study.journal", 2, lambda r: "garbage"), "line 3 of"),
    "a journal's cut line": ("search", lambda f: _line(f / "study.journal", 2, lambda r: json.dumps(r)[:-9]), "line 3 of"),
    "a journal's deep line": ("search", lambda f: _line(f / "study.journal", 2, lambda r: "[" * 100_000), "line 3 of"),
    "a journal's other line": ("search", lambda f: _line(f / "study.journal", 2, lambda r: {"op_code": "x"}), "op_code"),
    "a journal without its study": (
        "search",
        lambda f: _line(f / "study.journal", 0, lambda r: r | {"op_code": 4}),
        "study.journal",
    ),
    "a journal as a directory": ("search", lambda f: _directory(f / "study.journal"), "a directory"),
    "a journal's other terms": (
        "search",
        lambda f: (f / "study.journal").write_text((f / "study.journal").read_text().replace('"removed":[', '"removed":[7,')),
        "$.removed[0]",
    ),
    "a cache.json of numbers": (
        "cache",
        lambda f: (f / "cache.json").write_text('{"format": 1, "asked": {"n": "x"}}'),
        "cache.json",
    ),
    "a deep cache.json": ("cache", lambda f: (f / "cache.json").write_text("[" * 100_000), "cache.json"),
}


def _forget(folder: Path) -> None:
    """Takes the rows away, so that they are made again from the parts."""
    (folder / "rows.jsonl").write_text("")


# one of each sort of file and of damage; for the others, which are read alike, `make test-all`
QUICK = ("a row that lacks a key", "rows as a fifo", "a cut part", "a part of other shapes", "a seen part of other images")
QUICK = (*QUICK, "a search's row", "a journal of garbage", "a journal as a directory", "a cache.json of numbers")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in RESUMED])
def test_a_run_that_is_gone_on_with_after_damage(name: str, runs: Path, tmp_path: Path, one_line: OneLine) -> None:
    source, damage, says = RESUMED[name]
    folder = Path(shutil.copytree(runs / source, tmp_path / source))
    damage(folder)
    commands = {command[0]: command for command in (SCAN, SEARCH, EVALUATE)} | {"cache": ("cache", "--data", str(runs / "images"))}
    line = one_line(*commands[source], "--out", folder)
    assert says in line


def test_a_last_row_that_a_kill_has_torn_is_made_again(
    runs: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    folder = Path(shutil.copytree(runs / "scan", tmp_path / "scan"))
    whole = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(whole[:-20])
    code, _, err = cli(*SCAN, "--out", folder)
    assert code == 0, err
    assert (folder / "rows.jsonl").read_text() == whole


@pytest.mark.parametrize(
    "change", [{"mu": None}, {"mu": np.array("x")}, {"sigma": np.ones(3)}, {"sigma": np.full((64, 64), 1j)}, {"mu": np.array(1.0)}]
)
def test_statistics_of_wrong_arrays(change: dict[str, Any], tmp_path: Path, one_line: OneLine) -> None:
    arrays = dict(np.load(pretrained.BUILT_IN["tiny-digits"] / "reference.npz")) | change
    np.savez(tmp_path / "stats.npz", **{k: v for k, v in arrays.items() if v is not None})
    argv = ("evaluate", "--measures", "fid", *SMALL, "--reference", tmp_path / "stats.npz", "--out", tmp_path / "out")
    assert "stats.npz" in one_line(*argv)


def test_a_model_index_names_only_networks(sources: Path, tmp_path: Path, one_line: OneLine) -> None:
    folder = Path(shutil.copytree(sources / "model", tmp_path / "given"))
    index = json.loads((folder / "model_index.json").read_text())
    for source in (["os", "system"], ["diffusers", "NoSuchNet"], ["diffusers", "utils"], ["transformers", "AutoTokenizer"]):
        (folder / "model_index.json").write_text(json.dumps(index | {"vae": source}))
        assert ".".join(source) in one_line("scan", "--model", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_may_not_be_read(tmp_path: Path, one_line: OneLine, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.json"
    file.write_text(Architecture(frozenset({"mid_block"})).dumps())
    opened = os.open

    def refused(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path) == file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    assert "Permission denied" in one_line("cost", "--arch", file)
