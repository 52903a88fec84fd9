"""The study on every storage: one owner for each architecture, nothing scored twice, nothing lost."""

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
from search_worker import ASKED, NAMES, Journal, score, work

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.runs.records import Candidate
from blockprune.stages.search.storage import open_storage
from blockprune.stages.search.trials import MAX_ATTEMPTS, Trials


def candidate(name: str) -> Candidate:
    arch = Architecture(frozenset({name}))
    return Candidate(arch, name, "scan", {n: n == name for n in NAMES}, {"65%params": 0.1}, {"params": 1})


@pytest.fixture(params=["memory", "journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> BaseStorage:
    if request.param == "sqlite":
        return open_storage(f"sqlite:///{tmp_path}/study.db", None)
    return open_storage(None, tmp_path / "study.journal" if request.param == "journal" else None)


@pytest.fixture
def study(storage: BaseStorage) -> Trials:
    return Trials(storage, "s", "eps_mse", ASKED)


def test_what_goes_in_comes_out(study: Trials) -> None:
    study.add([candidate("mid_block")])
    trial = study.claim()
    assert trial is not None
    done = study.finish(trial, [score("mid_block", 3.0), score("mid_block", 2.0)])
    assert done is not None
    assert study.evaluations() == [done]
    assert done.candidate == candidate("mid_block")
    assert [s.value for s in done.tiers] == [3.0, 2.0]
    assert done.loss == 2.0
    assert not done.candidate.fits
    assert study.claim() is None


def test_an_architecture_has_one_owner(storage: BaseStorage, study: Trials) -> None:
    other = Trials(storage, "s", "eps_mse", ASKED)
    study.study.add_trial(_waiting("a"))
    other.study.add_trial(_waiting("a"))
    first, second = study.claim(), other.claim()
    assert first is not None
    assert second is None
    study.add([candidate("a")])
    assert len(study.trials(TrialState.WAITING)) == 0


def _waiting(name: str) -> Any:
    from blockprune.stages.search.trials import _trial

    return _trial(candidate(name), TrialState.WAITING)


def test_past_the_number_of_trials_candidates_are_dropped(study: Trials) -> None:
    study.add(map(candidate, NAMES[:4]))
    claimed = [t for t in (study.claim(2) for _ in range(3)) if t is not None]
    assert [t.user_attrs["label"] for t in claimed] == NAMES[:2]
    assert len(study.known()) == 2


def test_a_failed_score_is_kept_and_not_tried_again(study: Trials) -> None:
    study.add([candidate("a")])
    trial = study.claim()
    assert trial is not None
    done = study.finish(trial, [score("a", None)])
    assert done is not None
    assert done.score.error == "NaN"
    study.add([candidate("a")])
    study.recover()
    assert study.claim() is None


def test_the_dead_are_replaced_and_the_poisonous_given_up(study: Trials) -> None:
    study.add([candidate("a")])
    for _ in range(MAX_ATTEMPTS):
        trial = study.claim()
        assert trial is not None
        study.storage.set_trial_user_attr(trial._trial_id, "worker", study.worker.rpartition(":")[0] + ":another-start")
        study.recover()
    assert study.claim() is None
    (lost,) = study.evaluations()
    assert "died 3 times" in lost.score.error


def test_a_silent_worker_of_another_host_is_dead_after_a_while(storage: BaseStorage) -> None:
    study = Trials(storage, "s", "eps_mse", ASKED, grace_s=0.5)
    study.add([candidate("a")])
    trial = study.claim()
    assert trial is not None
    study.storage.set_trial_user_attr(trial._trial_id, "worker", "elsewhere:1:1")
    with study.beating(trial):
        time.sleep(1)
        study.recover()
        assert not study.trials(TrialState.FAIL)
    time.sleep(0.8)
    study.recover()
    assert [t.number for t in study.trials(TrialState.FAIL)] == [trial.number]
    assert study.finish(trial, [score("a")]) is None
    assert study.claim() is not None


def test_a_worker_killed_while_it_took_a_trial_is_soon_dead(storage: BaseStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Trials(storage, "s", "eps_mse", ASKED)
    study.add([candidate("a")])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "set_trial_user_attr", lambda *args: None)
        assert study.claim() is not None
    now = time.time()
    for later_s, n_failed in ((1, 0), (11, 1)):
        monkeypatch.setattr(time, "time", lambda later_s=later_s: now + later_s)
        study.recover()
        assert len(study.trials(TrialState.FAIL)) == n_failed
    assert study.claim() is not None


def test_another_protocol_is_refused(storage: BaseStorage, study: Trials) -> None:
    with pytest.raises(UserError, match="seed is 0 there, 1 asked"):
        Trials(storage, "s", "eps_mse", {**ASKED, "seed": 1})


def run_workers(make: Callable[[], BaseStorage], log: Path, n_killed: int) -> Trials:
    """Four workers over twelve candidates, some of them killed while they hold one."""
    study = Trials(make(), "s", "eps_mse", ASKED)
    study.add(map(candidate, NAMES))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(make, log, 0.3)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes[:n_killed]:
        while process.exitcode is None and not any(
            t.user_attrs.get("worker", "").split(":")[1:2] == [str(process.pid)] for t in study.trials(TrialState.RUNNING)
        ):
            time.sleep(0.01)
        os.kill(process.pid or 0, signal.SIGKILL)
    for process in processes:
        process.join()
    return study


def check_all_scored_once(study: Trials, log: Path) -> None:
    assert sorted(line.split()[0] for line in log.read_text().splitlines()) == sorted(NAMES)
    assert sorted(e.score.label for e in study.evaluations()) == sorted(NAMES)
    assert min(study.evaluations(), key=lambda e: e.loss).score.label == NAMES[0]


def test_workers_killed_in_mid_trial(tmp_path: Path) -> None:
    log = tmp_path / "log"
    study = run_workers(Journal(tmp_path / "study.journal"), log, 2)
    check_all_scored_once(study, log)
    assert len(study.trials(TrialState.FAIL)) == 2
