"""Every stage, killed at random moments and started again, ends as if undisturbed: the same rows and files, nothing left over.

The moments come from a seed that a failure shows; BLOCKPRUNE_KILL_SEED=… draws the same ones again, BLOCKPRUNE_KILL_ROUNDS=… tries
so many seeds, one after the other.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from as_user import pictures
from optuna.trial import FrozenTrial

from blockprune.model.architecture import Architecture
from blockprune.runs import directory
from blockprune.stages.search.storage import open_storage

SEED = int(os.environ.get("BLOCKPRUNE_KILL_SEED") or random.SystemRandom().randrange(10**6))
ROUNDS = int(os.environ.get("BLOCKPRUNE_KILL_ROUNDS") or 1)
LIMIT_S = 240.0  # of one run, so that one that hangs is told from one that is slow

# Forks a process of its own group for every command, all imports done: the moments fall into the work and not into Python's start.
# Given `fatal`, the process kills its group just before the change of a file of that number, or the first one that is so described.
LAUNCHER = """
import importlib, json, os, signal, sys
from blockprune.cli import main
for name in ("cli.console", "data.cache", "api", "reports.canvas", "stages.train.cache"):
    importlib.import_module(f"blockprune.{name}")
for name in ("matplotlib.pyplot", "diffusers", "transformers"):
    importlib.import_module(name)
importlib.import_module("blockprune.api").graph("tiny-digits")  # traced once, for all that are forked
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
n_changes = 0

def watch(place, fatal):
    def hook(event, args):
        global n_changes
        if event not in CHANGES or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        if path.startswith(place) or (path and not os.path.isabs(path)):
            n_changes += 1
            if fatal == n_changes or (isinstance(fatal, str) and fatal in f"{event} {path}"):
                os.killpg(0, signal.SIGKILL)
    sys.addaudithook(hook)

print("ready", flush=True)
for line in sys.stdin:
    args, log, place, fatal = json.loads(line)
    if (pid := os.fork()) == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        watch(place, fatal)
        code = 1
        try:
            main(args)
            code = 0
        except SystemExit as err:
            code = err.code or 0
        finally:
            print(n_changes, flush=True)
            os._exit(code)
    os.setpgid(pid, pid)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Moment:
    """When a command is killed: so many seconds after its start, or after the file `begun` is there; or just before a `change`.

    That is a change of a file, by its number or by what describes it, such as "os.rename /folder/.name.part".
    """

    after_s: float = LIMIT_S
    begun: Path | None = None
    change: int | str | None = None

    def __str__(self) -> str:
        if self.change is not None:
            return f"before change {self.change!r}"
        return f"{self.after_s:.3f} s after its {'beginning' if self.begun else 'start'}"


class Launcher:
    """Runs `blockprune` commands, each in a process group that can be killed as a whole."""

    def __init__(self, log: Path) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", LAUNCHER]
        self.log = log
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, args: Sequence[str], out: Path, moment: Moment) -> int:
        """The exit code of a command that writes to `out`; -9 when it was killed."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([[*args, "--out", str(out)], str(self.log), str(out.parent), moment.change]) + "\n")
        self.process.stdin.flush()
        pid, ended = int(self.line()), threading.Event()

        def kill() -> None:
            while moment.begun is not None and not moment.begun.exists():
                if ended.wait(0.001):
                    return
            if not ended.wait(moment.after_s):
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        code = int(self.line())
        ended.set()
        killer.join()
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        return code

    def finish(self, args: Sequence[str], out: Path) -> int:
        """How many changes of files a command made that nobody killed."""
        assert self.run(args, out, Moment()) == 0, f"killed, or at work for more than {LIMIT_S} s"
        return int(self.log.read_text().split()[-1])

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.communicate()


IMAGES = ("--n-images", "4", "--batch-size", "2")
TRAINING = ("--train-batch-size", "2", "--n-images", "4", "--steps", "1", "--max-train-steps", "4", "--ema")
CHECKPOINTS = ("--checkpointing-steps", "1", "--checkpoints-total-limit", "2", "--validation-steps", "2")
N_TRIALS = (
    15  # ten units alone, the exact solution, the presets, and one that a sampler proposes, which depends on when it is asked
)
SEARCH = ("--unit", "stage", "--budget", "75%params", "--trials", str(N_TRIALS), "--finalists", "1", "--final-factor", "2")
STAGES = {
    "scan": ("scan", "--unit", "stage", *IMAGES, "--steps", "1", "--eps-samples", "8", "--measures", "eps_mse,fid,clip_score"),
    "evaluate": ("evaluate", *IMAGES, "--steps", "1,2"),
    "distill": ("distill", "--arch", "bk-sdm-small", *TRAINING, *CHECKPOINTS),
    "cache": ("cache", "--n-images", "24", "--shard-size", "2"),
    "search": ("search", *SEARCH, "--eps-samples", "8", "--batch-size", "8", "--n-images", "2", "--steps", "1"),
}


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody killed: its seconds in all, those since it made its first file, and its changes of files."""

    folder: Path
    whole_s: float
    working_s: float
    n_changes: int


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Launcher(tmp_path_factory.mktemp("launcher") / "log") as launcher:
        assert launcher.line() == "ready"
        yield launcher


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    """The undisturbed run of a stage; tests must not write to it."""
    made: dict[str, Undisturbed] = {}

    def of(name: str) -> Undisturbed:
        if name not in made:
            folder, start = tmp_path_factory.mktemp(name) / "run", time.time()
            n_changes = launcher.finish(STAGES[name], folder)
            made[name] = Undisturbed(folder, time.time() - start, time.time() - begun(name, folder).stat().st_mtime, n_changes)
        return made[name]

    return of


def begun(name: str, folder: Path) -> Path:
    """The file by which a stage's work has begun."""
    return folder / ("cache.json" if name == "cache" else "run.json")


def moments(name: str, out: Path, usual: Undisturbed, draw: random.Random) -> Iterator[Moment]:
    """Two moments at which a run may be killed: in its work, between two changes of files, or anywhere."""
    for _ in range(2):
        yield draw.choice(
            [
                Moment(draw.uniform(0, usual.working_s), begun(name, out)),
                Moment(change=draw.randint(1, usual.n_changes)),
                Moment(draw.uniform(0, usual.whole_s)),
            ]
        )


def kill_and_finish(launcher: Launcher, args: Sequence[str], out: Path, moments: Iterable[Moment]) -> None:
    """A run killed at each moment, unless it ends before, and one to the end."""
    for moment in moments:
        code = launcher.run(args, out, moment)
        print(f"killed {moment}: exit code {code}, {len(files(out))} files are there")
    launcher.finish(args, out)


def rounds(name: str, tmp_path: Path) -> Iterator[tuple[Path, random.Random]]:
    """A new directory and source of chance for each round; prints the seed that makes the same moments again."""
    for i in range(ROUNDS):
        print(f"BLOCKPRUNE_KILL_SEED={SEED + i}")
        yield tmp_path / f"round-{i}" / "run", random.Random(f"{name} {SEED + i}")


def files(folder: Path) -> dict[str, bytes]:
    """What each file holds; safetensors writes the entries of a file's header in an order of chance, here they are sorted."""
    return {str(p.relative_to(folder)): _content(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _content(file: Path) -> bytes:
    content = file.read_bytes()
    if file.suffix != ".safetensors" or file.name.startswith("."):
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows without what a clock says."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "ended")} for row in directory.read_rows(folder)]


def assert_same(folder: Path, other: Path) -> None:
    """Both hold the same files and no others, hidden ones too, with the same bytes; rows have a clock's part in them."""
    ours, theirs = files(folder), files(other)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if name != "rows.jsonl" and ours[name] != theirs[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan", "evaluate", "distill", "cache"])
def test_killed_and_started_again_ends_as_if_undisturbed(
    name: str, launcher: Launcher, undisturbed: Callable[[str], Undisturbed], tmp_path: Path
) -> None:
    usual = undisturbed(name)
    for out, draw in rounds(name, tmp_path):
        kill_and_finish(launcher, STAGES[name], out, moments(name, out, usual, draw))
        assert rows_of(out) == rows_of(usual.folder)
        assert_same(out, usual.folder)


NARROW = {
    "distill": [
        "open run/images/.step-0000002.part.png",
        "os.rename run/checkpoints/.step-0000003",
        "shutil.rmtree run/checkpoints/step-0000002",
        "os.remove student.safetensors",
        "open run/student",
        "os.rename run/student/.architecture",
        "os.rename run/.pipeline.part",
    ],
    "cache": ["os.remove run/.shard-00003.safetensors.lock", "os.rename run/.cache.part.json"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill", "cache"])
def test_killed_where_it_hurts_most(
    name: str, launcher: Launcher, undisturbed: Callable[[str], Undisturbed], tmp_path: Path
) -> None:
    """One run, killed between two changes that belong together, again and again."""
    out = tmp_path / "run"
    kill_and_finish(launcher, STAGES[name], out, [Moment(change=change.replace("run", str(out), 1)) for change in NARROW[name]])
    assert rows_of(out) == rows_of(undisturbed(name).folder)
    assert_same(out, undisturbed(name).folder)


@pytest.mark.slow
def test_a_killed_export_is_not_there_and_starts_anew(
    launcher: Launcher, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Killed when all is written but its name: nothing has that name, what lay beside it is untouched, and nothing is left over."""
    out, args = tmp_path / "out", ("export", str(tiny_folder("sd1")), "--format", "torch-export")
    (tmp_path / "other").write_text("stays")
    assert launcher.run(args, out, Moment(change=f"os.rename {tmp_path}/.out.part")) == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"other", ".out.part"}
    (tmp_path / ".out.part" / "unet" / "half.bin").write_text("of another")
    launcher.finish(args, out)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "out"}
    assert list(files(out)) == ["export.json", "unet/config.json", "unet/model.pt2"]


def scores(folder: Path, kind: str) -> dict[tuple[str, int], float]:
    """(architecture, tier) => score."""
    tiers = [(i, tier) for row in directory.read_rows(folder) if row["kind"] == kind for i, tier in enumerate(row["tiers"])]
    found = {(tier["arch"], i): tier["value"] for i, tier in tiers}
    assert len(found) == len(tiers), "an architecture was scored twice"
    return found


def dropped(trial: FrozenTrial) -> bool:
    """A proposal that came when others had taken the last places: it ends without a score."""
    return trial.state.name == "PRUNED" and "tiers" not in trial.user_attrs


def check_search(folder: Path, other: Path, tolerance: float) -> None:
    """The search has what an undisturbed one has: every score, once, within a relative tolerance; the rest follows from them."""
    for kind, least in {"search": 2 * N_TRIALS - 4, "final": 3}.items():
        ours, theirs = scores(folder, kind), scores(other, kind)
        common = ours.keys() & theirs.keys()  # not what a sampler proposed
        assert len(common) >= least
        assert {key: ours[key] for key in common} == pytest.approx({key: theirs[key] for key in common}, rel=tolerance, abs=0)
    study = optuna.load_study(study_name="run", storage=open_storage(None, folder / "study.journal"))
    owners = [trial for trial in study.trials if trial.state.name != "FAIL" and not dropped(trial)]
    assert Counter(trial.state.name for trial in owners) == {"COMPLETE": N_TRIALS}, "a trial was left over"
    rows = directory.read_rows(folder)
    for kind in ("timing", "seen"):
        looked_at = [(row["label"], row.get("measure", "")) for row in rows if row["kind"] == kind]
        assert {label for label, _ in looked_at} == {"full", *(row["tiers"][-1]["label"] for row in rows if row["kind"] == "final")}
        assert len(set(looked_at)) == len(looked_at)
    best, finals = json.loads((folder / "best.json").read_text()), scores(folder, "final")
    assert Architecture.from_json(best).key == min(finals, key=finals.__getitem__)[0]
    names, usual = ({n for n in files(f) if not n.startswith(("artifacts/", "images/"))} for f in (folder, other))
    assert names == usual
    assert {p.stem for p in (folder / "images").iterdir()} == {Architecture().key, *(arch for arch, _ in finals)}
    assert len(list((folder / "artifacts").iterdir())) >= len(finals)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_search_scores_everything_once(
    workers: int, launcher: Launcher, undisturbed: Callable[[str], Undisturbed], tmp_path: Path
) -> None:
    """With several workers the order of trials is nobody's promise; that each has its score, once, is."""
    usual = undisturbed("search")
    for out, draw in rounds(f"search {workers}", tmp_path):
        if workers == 1:
            kill_and_finish(launcher, STAGES["search"], out, moments("search", out, usual, draw))
        else:
            in_work = Moment(draw.uniform(0, usual.working_s), out / "rows.jsonl")
            kill_and_finish(launcher, (*STAGES["search"], "--workers", "2"), out, [in_work])
        check_search(out, usual.folder, 0 if workers == 1 else 1e-4)


@pytest.mark.slow
def test_a_killed_personalisation_ends_as_if_undisturbed(launcher: Launcher, tmp_path: Path) -> None:
    """Killed while class images are drawn, at a checkpoint, at its scores, and at its pipeline; only what a clock says differs."""
    words = ("--instance-data-dir", str(pictures(tmp_path / "subject", 3)), "--instance-prompt", "bold upright: sks top left")
    prior = ("--with-prior-preservation", "--class-prompt", "bold upright: one top left", "--num-class-images", "4")
    short = ("--max-train-steps", "3", "--checkpointing-steps", "1", "--n-images", "2", "--steps", "1")
    usual, out = tmp_path / "usual" / "run", tmp_path / "killed" / "run"
    whole, killed = (("personalise", *words, *prior, *short, "--class-data-dir", str(run.parent / "class")) for run in (usual, out))
    launcher.finish(whole, usual)
    changes = (
        f"os.rename {out.parent}/class/.class-000002",
        f"os.rename {out}/checkpoints/.step-0000002",
        f"open {out}/images/.step-0000003.part.png",
        f"os.rename {out}/.pipeline.part",
    )
    kill_and_finish(launcher, killed, out, [Moment(change=change) for change in changes])
    for folder in ("checkpoints", "pipeline", "images"):
        assert_same(out / folder, usual / folder)
    assert_same(out.parent / "class", usual.parent / "class")
    assert [r for r in rows_of(out) if r["kind"] != "cost"] == [r for r in rows_of(usual) if r["kind"] != "cost"]
