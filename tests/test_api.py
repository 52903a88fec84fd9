"""The library as a notebook uses it: every example in its docstrings, pipelines left as they were, nothing written unasked."""

from __future__ import annotations

import copy
import doctest
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from common_fixtures import Cli
from diffusers import DiffusionPipeline

import blockprune as bp
from blockprune import results
from blockprune.errors import UserError
from blockprune.runs.memory import MemoryRun

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
QUIET: dict[str, Any] = {"progress": bp.Silent()}
QUICK: dict[str, Any] = {"n_images": 3, "steps": 1, "batch_size": 2, **QUIET}


def examples() -> list[doctest.DocTest]:
    """Every example in the docstring of something public, or of what a call returns."""
    finder = doctest.DocTestFinder(recurse=False)
    public = [getattr(bp, name) for name in bp.__all__]
    public += [value for name, value in vars(results).items() if name.endswith("Result")]
    return [test for value in public for test in finder.find(value, value.__name__, module=False, globs={}) if test.examples]


SLOW = {"search": [pytest.mark.slow], "SearchResult": [pytest.mark.slow]}


@pytest.mark.usefixtures("drifting_clock")
@pytest.mark.parametrize("example", [pytest.param(e, id=e.name, marks=SLOW.get(e.name, [])) for e in examples()])
def test_an_example_in_a_docstring_is_true(example: doctest.DocTest) -> None:
    n = len(example.examples)
    assert doctest.DocTestRunner().run(example) == (0, n)


def test_everything_public_has_an_example() -> None:
    assert {*bp.__all__} - {example.name for example in examples()} == set()


def test_the_package_loads_without_torch() -> None:
    code = "import sys, blockprune; blockprune.Architecture, blockprune.Budget; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.fixture
def pipe() -> DiffusionPipeline:
    return bp.load_pipeline("tiny-digits")


def state(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in pipe.unet.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_graph_needs_no_weights_and_takes_a_pipeline(pipe: DiffusionPipeline) -> None:
    assert bp.graph(pipe) == bp.graph() == bp.graph("tiny-digits")
    assert bp.graph(pipe).total.params == pipe.unet.num_parameters()
    assert bp.graph(bp.prune(pipe, "mid_block")) == bp.graph(pipe)  # the graph is of the full network


def test_prune_leaves_the_pipeline_and_shares_its_other_parts(pipe: DiffusionPipeline) -> None:
    before, network = state(pipe), pipe.unet
    small = bp.prune(pipe, "mid_block")
    assert pipe.unet is network
    assert same(before, state(pipe))
    assert small.vae is pipe.vae
    assert small.unet.num_parameters() == bp.graph(pipe).cost(bp.Architecture(frozenset({"mid_block"}))).params
    kept = state(small)
    assert all(torch.equal(before[name], t) for name, t in kept.items())
    with pytest.raises(UserError, match="did you mean mid_block"):
        bp.prune(pipe, "mid_blok")
    with pytest.raises(UserError, match="with it"):
        bp.prune(pipe, bp.Architecture(frozenset({"up_blocks.0"})))


def test_removed_is_over_when_the_context_ends(pipe: DiffusionPipeline) -> None:
    before = state(pipe)
    with pytest.raises(ZeroDivisionError), bp.removed(pipe, "mid_block") as masked:
        assert masked is pipe
        assert not any(name.startswith("mid_block") for name in state(pipe))
        raise ZeroDivisionError
    assert same(before, state(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["full", "mid_block", "down_blocks.1.resnets.0,up_blocks.1.attentions.2"])
def test_save_and_load_round_trip(pipe: DiffusionPipeline, arch: str, tmp_path: Path) -> None:
    small = bp.prune(pipe, arch)
    bp.save(small, tmp_path / "out")
    again = bp.load_pipeline(tmp_path / "out")
    assert again.unet.num_parameters() == small.unet.num_parameters()
    about = json.loads((tmp_path / "out" / "pruning" / "teacher.json").read_text())
    assert about["model"] == "tiny-digits"
    scores = [bp.evaluate(p, measures=["clip_score"], **QUICK).rows[0]["clip_score"] for p in (small, again)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)  # kernels round by where weights lie
    with pytest.raises(UserError, match="is there already"):
        bp.save(small, tmp_path / "out")


def test_a_saved_pipeline_is_saved_again_under_the_same_teacher(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    arch = "down_blocks.1.resnets.0,up_blocks.1.attentions.2"
    bp.save(bp.prune(pipe, arch), tmp_path / "a")
    bp.save(bp.load_pipeline(tmp_path / "a"), tmp_path / "b")
    for name in ("teacher.json", "architecture.json"):
        assert (tmp_path / "a" / "pruning" / name).read_text() == (tmp_path / "b" / "pruning" / name).read_text()


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean brightness."""
    return images.float().mean(dim=(1, 2, 3)) / 255


def test_evaluate_in_memory_writes_nothing_and_leaves_the_pipeline(
    pipe: DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe.unet.train().requires_grad_(True)
    before, network, scheduler = state(pipe), pipe.unet, copy.deepcopy(dict(pipe.scheduler.config))
    result = bp.evaluate(pipe, arch="mid_block", measures=["clip_score", brightness], quantize=["none", "int8"], **QUICK)
    assert list(tmp_path.iterdir()) == []
    assert pipe.unet is network
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert same(before, state(pipe))
    assert dict(pipe.scheduler.config) == scheduler
    assert [row["quantize"] for row in result.rows] == ["", "int8"]
    assert all(0 < row["brightness"] < 1 and row["brightness_n"] == 3 for row in result.rows)
    assert list(result.view.arch) == ["mid_block"]
    assert result.view.teacher == result.view.model == "tiny-digits"
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: rows))
    assert [row["setting"] for row in result.to_pandas()] == [s.label for s in result.view.settings]
    assert result.figure("images").axes
    with pytest.raises(UserError, match="no figure 'guidance' here: choose from images"):
        result.figure("guidance")
    result.save(tmp_path / "saved")
    assert {"evaluate.json", "evaluate.csv", "images", "drawn"} == {p.name for p in (tmp_path / "saved").iterdir()}
    assert len(list((tmp_path / "saved" / "drawn").rglob("*.png"))) == 6


def test_images_of_a_run_in_memory_may_be_let_go() -> None:
    result = bp.evaluate(measures=["clip_score"], save_images=False, **{**QUICK, "n_images": 8, "batch_size": 8})
    assert isinstance(result.run, MemoryRun)
    assert len(result.run.names("drawn/cfg-3-1-steps")) == 6  # those of the pictures
    assert len(result.view.images["CFG 3, 1 steps"]) == 6


def test_memory_directory_and_command_line_agree(tmp_path: Path, cli: Cli, pipe: DiffusionPipeline) -> None:
    args = ["--n-images", "3", "--steps", "1", "--batch-size", "2", "--measures", "clip_score,is"]
    code, _, err = cli("evaluate", *args, "--out", tmp_path / "run")
    assert code == 0, err
    told = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    (tmp_path / "mine.toml").write_text('n_images = 3\nsteps = 1\nmeasures = ["clip_score", "is"]\nbatch_size = 5\n')
    code, _, err = cli("evaluate", "--config", tmp_path / "mine.toml", "--batch-size", "2", "--out", tmp_path / "run")
    assert code == 0, err  # the same request: nothing is computed again
    for model in ("tiny-digits", pipe):
        view = bp.evaluate(model, measures=["clip_score", "is"], **QUICK).view
        assert view.protocol["hash"] == told["protocol"]["hash"]
        for m, score in view.scores["CFG 3, 1 steps"].items():
            assert score.value == pytest.approx(told["settings"][0]["scores"][m]["value"], rel=1e-3), m


def test_a_measure_of_ones_own_is_read_back_by_a_report(tmp_path: Path, cli: Cli) -> None:
    result = bp.evaluate(measures=[brightness], out=tmp_path / "run", **QUICK)
    result.save(tmp_path / "run")
    script = "import sys; from pathlib import Path; from blockprune.reports.evaluations import evaluation_view as v; "
    script += "from blockprune.runs.directory import Stored; view = v(Stored(Path(sys.argv[1]))); "
    script += "print(view.scores['CFG 3, 1 steps']['brightness'].value)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, check=True)
    assert float(done.stdout) == result.rows[0]["brightness"]
    assert np.isfinite(result.rows[0]["brightness"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stepps": 2}, "unknown fields stepps"),
        ({"steps": "two"}, "--steps: expected `int`, got `str`"),
        ({"measures": ["eps_mse"]}, "evaluate does not measure 'eps_mse'"),
        ({"quantize": "int3"}, "unknown --quantize 'int3'"),
        ({"checkpoints": "RUN", "arch": "mid_block"}, "--checkpoints says what is removed"),
    ],
)
def test_bad_fields_are_user_errors(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        bp.evaluate(**{**QUICK, **fields})


def test_checkpoints_of_a_run_on_a_loaded_pipeline(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"steps": 1, "train_batch_size": 2, "n_images": 2, "denoising_steps": 1, "progress": bp.Silent()}
    bp.distill(pipe, "mid_block", out=tmp_path / "run", **quick)
    for model in (None, pipe):
        rows = bp.evaluate(model, checkpoints=str(tmp_path / "run"), measures=["clip_score"], **QUICK).rows
        assert [row["checkpoint"] for row in rows] == [1]
    other = bp.load_pipeline("tiny-digits")
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    with pytest.raises(UserError, match="is not the teacher of the run"):
        bp.evaluate(other, checkpoints=str(tmp_path / "run"), **QUICK)


def test_a_pruned_pipeline_is_pruned_already(pipe: DiffusionPipeline) -> None:
    with pytest.raises(UserError, match="is pruned already"):
        bp.evaluate(bp.prune(pipe, "mid_block"), arch="mid_block", **QUICK)


def test_folders_are_models(tiny_folder: Callable[[str], Path]) -> None:
    result = bp.evaluate(tiny_folder("sd1"), measures=[brightness], **QUICK)
    assert result.view.label == tiny_folder("sd1").name


def test_a_scan_draws_the_u_and_is_reported_with_a_run_on_disk(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"unit": "stage", "measures": ["eps_mse"], "eps_samples": 4, **QUIET}
    scan = bp.scan(**quick)
    drawn = scan.figure()
    assert drawn._repr_svg_().startswith("<svg")
    drawn.savefig(tmp_path / "unet.svg")
    scan.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "unet.svg").read_bytes() == (tmp_path / "unet.svg").read_bytes()
    assert scan.figure("sensitivity").startswith("<svg")
    bp.scan(**quick, out=tmp_path / "run")
    made = bp.report([scan, tmp_path / "run"], out=tmp_path / "page" / "report.html", macs="conv_linear")
    assert made.page == tmp_path / "page" / "report.html"
    assert {p.name for p in (tmp_path / "page").iterdir()} == {made.page.name, *(file.name for file in made.files)}
    results = json.loads((tmp_path / "page" / "report.json").read_text())
    assert list(results["runs"]) == ["scan", "run"]
    assert results["missing"] == list(made.missing) != []
    assert results["macs_convention"] == "conv_linear"
    with pytest.raises(UserError, match="unknown fields folder"):
        bp.report([scan], folder="x")
