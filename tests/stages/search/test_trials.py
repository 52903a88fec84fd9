"""The ledger on every storage: one owner for each architecture, nothing scored twice, nothing lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.runs.records import Candidate, Score
from blockprune.stages.search.trials import MAX_ATTEMPTS, Ledger, open_storage

ASKED = {"objective": "eps_mse", "seed": 0}
NAMES = [f"down_blocks.{i}" for i in range(12)]


def candidate(name: str) -> Candidate:
    arch = Architecture(frozenset({name}))
    return Candidate(arch, name, "scan", {n: n == name for n in NAMES}, {"65%params": 0.1}, {"params": 1})


def score(name: str, value: float | None = 1.0) -> Score:
    return Score(Architecture(frozenset({name})).key, name, "eps_mse", value, 4, 0, error="" if value is not None else "NaN")


@pytest.fixture(params=["memory", "journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> BaseStorage:
    if request.param == "sqlite":
        return open_storage(f"sqlite:///{tmp_path}/study.db", None)
    return open_storage(None, tmp_path / "study.journal" if request.param == "journal" else None)


@pytest.fixture
def ledger(storage: BaseStorage) -> Ledger:
    return Ledger(storage, "s", "eps_mse", ASKED)


def test_what_goes_in_comes_out(ledger: Ledger) -> None:
    ledger.add([candidate("mid_block")])
    trial = ledger.claim()
    assert trial is not None
    done = ledger.finish(trial, [score("mid_block", 3.0), score("mid_block", 2.0)])
    assert done is not None
    assert ledger.evaluations() == [done]
    assert done.candidate == candidate("mid_block")
    assert [s.value for s in done.tiers] == [3.0, 2.0]
    assert done.loss == 2.0
    assert not done.candidate.fits
    assert ledger.claim() is None


def test_an_architecture_has_one_owner(storage: BaseStorage, ledger: Ledger) -> None:
    other = Ledger(storage, "s", "eps_mse", ASKED)
    ledger.study.add_trial(_waiting("a"))
    other.study.add_trial(_waiting("a"))
    first, second = ledger.claim(), other.claim()
    assert first is not None
    assert second is None
    ledger.add([candidate("a")])
    assert len(ledger.trials(TrialState.WAITING)) == 0


def _waiting(name: str) -> Any:
    from blockprune.stages.search.trials import _trial

    return _trial(candidate(name), TrialState.WAITING)


def test_past_the_number_of_trials_candidates_are_dropped(ledger: Ledger) -> None:
    ledger.add(map(candidate, NAMES[:4]))
    claimed = [t for t in (ledger.claim(2) for _ in range(3)) if t is not None]
    assert [t.user_attrs["label"] for t in claimed] == NAMES[:2]
    assert len(ledger.known()) == 2


def test_a_failed_score_is_kept_and_not_tried_again(ledger: Ledger) -> None:
    ledger.add([candidate("a")])
    trial = ledger.claim()
    assert trial is not None
    done = ledger.finish(trial, [score("a", None)])
    assert done is not None
    assert done.score.error == "NaN"
    ledger.add([candidate("a")])
    ledger.recover()
    assert ledger.claim() is None


def test_the_dead_are_replaced_and_the_poisonous_given_up(ledger: Ledger) -> None:
    ledger.add([candidate("a")])
    for _ in range(MAX_ATTEMPTS):
        trial = ledger.claim()
        assert trial is not None
        ledger.storage.set_trial_user_attr(trial._trial_id, "worker", ledger.worker.rpartition(":")[0] + ":another-start")
        ledger.recover()
    assert ledger.claim() is None
    (lost,) = ledger.evaluations()
    assert "died 3 times" in lost.score.error


def test_a_silent_worker_of_another_host_is_dead_after_a_while(storage: BaseStorage) -> None:
    ledger = Ledger(storage, "s", "eps_mse", ASKED, grace_s=0.5)
    ledger.add([candidate("a")])
    trial = ledger.claim()
    assert trial is not None
    ledger.storage.set_trial_user_attr(trial._trial_id, "worker", "elsewhere:1:1")
    with ledger.beating(trial):
        time.sleep(1)
        ledger.recover()
        assert not ledger.trials(TrialState.FAIL)
    time.sleep(0.8)
    ledger.recover()
    assert [t.number for t in ledger.trials(TrialState.FAIL)] == [trial.number]
    assert ledger.finish(trial, [score("a")]) is None
    assert ledger.claim() is not None


def test_a_worker_killed_while_it_took_a_trial_is_soon_dead(storage: BaseStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(storage, "s", "eps_mse", ASKED)
    ledger.add([candidate("a")])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "set_trial_user_attr", lambda *args: None)
        assert ledger.claim() is not None
    now = time.time()
    for later_s, n_failed in ((1, 0), (11, 1)):
        monkeypatch.setattr(time, "time", lambda later_s=later_s: now + later_s)
        ledger.recover()
        assert len(ledger.trials(TrialState.FAIL)) == n_failed
    assert ledger.claim() is not None


def test_another_protocol_is_refused(storage: BaseStorage, ledger: Ledger) -> None:
    with pytest.raises(UserError, match="seed is 0 there, 1 asked"):
        Ledger(storage, "s", "eps_mse", {**ASKED, "seed": 1})


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    Ledger(open_storage(None, path), "s", "eps_mse", ASKED).add([candidate("a")])
    with path.open("a") as out:
        out.write('{"op_code":4,"wor')
    ledger = Ledger(open_storage(None, path), "s", "eps_mse", ASKED)
    ledger.add([candidate("b")])
    assert ledger.known() == {candidate(n).arch.key for n in "ab"}
    assert Ledger(open_storage(None, path), "s", "eps_mse", ASKED).known() == ledger.known()


def work(make: Callable[[], BaseStorage], log: Path, pause_s: float) -> None:
    """A worker that takes its time and notes what it scores."""
    ledger = Ledger(make(), "s", "eps_mse", ASKED)
    while ledger.busy():
        ledger.recover()
        trial = ledger.claim()
        if trial is None:
            time.sleep(0.02)
            continue
        with ledger.beating(trial):
            time.sleep(pause_s)
            name = trial.user_attrs["label"]
        if ledger.finish(trial, [score(name, float(NAMES.index(name)))]) is not None:
            with log.open("a") as out:
                out.write(f"{name} {os.getpid()}\n")


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> BaseStorage:
        return open_storage(None, self.path)


def run_workers(make: Callable[[], BaseStorage], log: Path, n_killed: int) -> Ledger:
    """Four workers over twelve candidates, some of them killed while they hold one."""
    ledger = Ledger(make(), "s", "eps_mse", ASKED)
    ledger.add(map(candidate, NAMES))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(make, log, 0.3)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes[:n_killed]:
        while not any(
            t.user_attrs.get("worker", "").split(":")[1:2] == [str(process.pid)] for t in ledger.trials(TrialState.RUNNING)
        ):
            time.sleep(0.01)
        os.kill(process.pid or 0, signal.SIGKILL)
    for process in processes:
        process.join()
    return ledger


def check_all_scored_once(ledger: Ledger, log: Path) -> None:
    assert sorted(line.split()[0] for line in log.read_text().splitlines()) == sorted(NAMES)
    assert sorted(e.score.label for e in ledger.evaluations()) == sorted(NAMES)
    assert min(ledger.evaluations(), key=lambda e: e.loss).score.label == NAMES[0]


def test_workers_killed_in_mid_trial(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ledger = run_workers(Journal(tmp_path / "study.journal"), log, 2)
    check_all_scored_once(ledger, log)
    assert len(ledger.trials(TrialState.FAIL)) == 2
