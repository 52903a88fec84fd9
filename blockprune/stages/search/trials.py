"""Who scores what: an Optuna study in which every trial is one architecture, shared by any number of processes and hosts."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import optuna
from msgspec import Meta
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from blockprune.decode import Natural, Object, checked
from blockprune.errors import UserError
from blockprune.measures.measure import measure as measure_of
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.runs.directory import differences
from blockprune.runs.records import BoundCheck, Candidate, Evaluation
from blockprune.stages.search.storage import MEND

UNIT = CategoricalDistribution([False, True])
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
MAX_ATTEMPTS = 3
CLAIM_S = 10.0  # far more than a worker takes from taking a trial to putting its name to it


class StudyAttributes(msgspec.Struct):
    """What a study of this package says of itself: the terms of its scores."""

    asked: Object


class TrialAttributes(msgspec.Struct):
    """What a trial scores, and its scores where it has been scored."""

    arch: str
    label: str
    source: str
    removed: list[str]
    costs: dict[str, float]
    tiers: Annotated[list[Score], Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    bounds: list[BoundCheck] = []
    worker: str = "::"
    beat: float | None = None


class Trials:
    """One study: candidates wait in it, are claimed by one worker each, and are finished with a score.

    No architecture is scored twice: of several trials of one architecture the oldest that has not failed owns it. A trial whose
    worker died is failed and put in again. `asked` is what makes scores comparable; a study of other terms is refused. Pictures of
    trials go to the folder `artifacts`.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        measure: str,
        asked: Mapping[str, Any],
        grace_s: float = 120.0,
        artifacts: Path | None = None,
    ) -> None:
        direction = StudyDirection.MINIMIZE if measure_of(measure).direction == "down" else StudyDirection.MAXIMIZE
        self.storage, self.grace_s, self.artifacts = storage, grace_s, artifacts
        self._evaluations: dict[int, Evaluation] = {}
        self.study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
        self.study_id = storage.get_study_id_from_name(name)
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"
        if "asked" not in self.study.user_attrs:
            self.study.set_user_attr("asked", dict(asked))
        self._check(name)
        if changes := list(differences(self.study.user_attrs["asked"], asked)):
            raise UserError(f"the study {name!r} is of another protocol ({'; '.join(changes)}): choose another --out")

    def _check(self, name: str) -> None:
        """Raises UserError for a study, or a trial of it, that this package has not written."""
        attrs = self.study.user_attrs
        checked(attrs, StudyAttributes, f"the study {name!r}", MEND)
        counts = {k: n for k, n in attrs.items() if k.startswith("cached ")}
        checked(counts, dict[str, Natural], f"the study {name!r}", MEND)
        for trial in self.trials():
            what = f"trial {trial.number} of the study {name!r}"
            checked(trial.user_attrs, TrialAttributes, what, MEND)
            checked(trial.params, dict[str, bool], what, MEND)
            checked(trial.system_attrs, Object, what, MEND)
            try:
                limits = trial.constraints
            except (TypeError, ValueError, LookupError, AttributeError) as err:
                raise UserError(f"cannot read {what}: its constraints are damaged ({err}); {MEND}") from None
            checked(limits, dict[str, float], what, MEND)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.storage.get_all_trials(self.study_id, deepcopy=False, states=states or None)

    @staticmethod
    def candidate(trial: FrozenTrial) -> Candidate:
        """What a trial scores."""
        attrs = trial.user_attrs
        arch = Architecture(frozenset(attrs["removed"]))
        bounds = {check["text"] for check in attrs.get("bounds", ())}
        over = {text: excess for text, excess in trial.constraints.items() if text not in bounds}
        return Candidate(arch, attrs["label"], attrs["source"], trial.params, over, attrs["costs"])

    def known(self) -> set[str]:
        """The keys of architectures that are scored, in work or waiting."""
        return {t.user_attrs["arch"] for t in self.trials() if _counts(t)}

    def expected(self) -> set[str]:
        """`known`, and the architectures that will be tried again since their worker died."""
        return {
            t.user_attrs["arch"] for t in self.trials() if _counts(t) or (t.state == TrialState.FAIL and "arch" in t.user_attrs)
        }

    def evaluations(self) -> list[Evaluation]:
        """What is scored, in the order of the trials, each architecture once."""
        by_arch: dict[str, Evaluation] = {}
        for trial in self.trials(*DONE):
            if "tiers" in trial.user_attrs:
                by_arch.setdefault(trial.user_attrs["arch"], self._finished(trial))
        return list(by_arch.values())

    def _finished(self, trial: FrozenTrial) -> Evaluation:
        """The evaluation of a finished trial, which does not change any more."""
        if trial.number not in self._evaluations:
            self._evaluations[trial.number] = _evaluation(trial)
        return self._evaluations[trial.number]

    def count_cached(self, n: int) -> None:
        """Notes how many of this worker's proposals were known already."""
        if n != self.study.user_attrs.get(f"cached {self.worker}", 0):
            self.study.set_user_attr(f"cached {self.worker}", n)

    @property
    def cached(self) -> int:
        """Proposals of all workers that were known already, and so cost nothing."""
        return sum(n for name, n in self.study.user_attrs.items() if name.startswith("cached "))

    def busy(self) -> bool:
        """True while some architecture waits or is in work, by whomever."""
        return bool(self.trials(TrialState.WAITING, TrialState.RUNNING))

    def add(self, candidates: Iterable[Candidate]) -> None:
        """Puts in the candidates that are not known yet."""
        known = self.known()
        for candidate in candidates:
            if candidate.arch.key not in known:
                self.study.add_trial(_trial(candidate, TrialState.WAITING))
                known.add(candidate.arch.key)

    def add_scored(self, candidate: Candidate, score: Score) -> None:
        """Puts in what was scored before, under the same terms."""
        if candidate.arch.key not in self.known() and score.value is not None:
            self.study.add_trial(_trial(candidate, TrialState.COMPLETE, (score,)))

    def claim(self, n_trials: int | None = None) -> FrozenTrial | None:
        """A waiting trial that is now this worker's; None when there is none. Past `n_trials` architectures they are dropped."""
        for trial in self.trials(TrialState.WAITING):
            if not self._take(trial):
                continue
            rank = self._rank(trial)
            if rank is None or (n_trials is not None and rank >= n_trials):
                self._end(trial, TrialState.PRUNED)
                continue
            self.storage.set_trial_user_attr(trial._trial_id, "worker", self.worker)
            return trial
        return None

    def _take(self, trial: FrozenTrial) -> bool:
        try:
            return self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _rank(self, trial: FrozenTrial) -> int | None:
        """How many architectures come before this trial's; None when an older trial owns its architecture.

        One that is tried again keeps the place of its first attempt, so that no later proposal takes it.
        """
        arch, others = trial.user_attrs["arch"], [t for t in self.trials() if "arch" in t.user_attrs]
        if any(t.user_attrs["arch"] == arch and t.number < trial.number and _counts(t) for t in others):
            return None
        first = min(t.number for t in others if t.user_attrs["arch"] == arch)
        return len({t.user_attrs["arch"] for t in others if t.number < first and (_counts(t) or t.state == TrialState.FAIL)})

    @contextmanager
    def beating(self, trial: FrozenTrial) -> Iterator[None]:
        """While this lasts the trial shows that its worker lives."""
        stop = threading.Event()

        def beat() -> None:
            with suppress(UpdateFinishedTrialError):
                while not stop.wait(self.grace_s / 6):
                    self.storage.set_trial_user_attr(trial._trial_id, "beat", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def attach(self, trial: FrozenTrial, png: bytes) -> None:
        """Keeps a picture of a trial that is in work among the artifacts, where optuna-dashboard finds it."""
        if self.artifacts is None:
            return
        self.artifacts.mkdir(exist_ok=True)
        store = FileSystemArtifactStore(str(self.artifacts))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"{trial.user_attrs['label']}.png")
            file.write_bytes(png)
            upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=trial, storage=self.storage)

    def finish(self, trial: FrozenTrial, tiers: Sequence[Score], bounds: Sequence[BoundCheck] = ()) -> Evaluation | None:
        """Ends a trial with its scores; one whose last has no value is kept as failed and never tried again.

        `bounds` are what must hold besides, as measured. None when another worker thought this one dead and took the trial away.
        """
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial._trial_id, "tiers", [score.to_json() for score in tiers])
            if bounds:
                self.storage.set_trial_user_attr(trial._trial_id, "bounds", [check.to_json() for check in bounds])
            for check in bounds:
                Trial(self.study, trial._trial_id).set_constraint(check.text, check.excess)
            value = tiers[-1].value
            self._end(trial, TrialState.PRUNED if value is None else TrialState.COMPLETE, value)
            return _evaluation(self.storage.get_trial(trial._trial_id))
        return None

    def _end(self, trial: FrozenTrial, state: TrialState, value: float | None = None) -> None:
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial._trial_id, state, None if value is None else [value])

    def recover(self) -> None:
        """Fails the trials whose workers died, and puts in again every architecture that nobody owns any more."""
        for trial in self.trials(TrialState.RUNNING):
            if self._dead(trial):
                self._end(trial, TrialState.FAIL)
        owned = self.known()
        failed = [t for t in self.trials(TrialState.FAIL) if "arch" in t.user_attrs and t.user_attrs["arch"] not in owned]
        for key in dict.fromkeys(t.user_attrs["arch"] for t in failed):
            attempts = [t for t in failed if t.user_attrs["arch"] == key]
            candidate = self.candidate(attempts[0])
            if len(attempts) < MAX_ATTEMPTS:
                self.study.add_trial(_trial(candidate, TrialState.WAITING))
            else:
                lost = Score(key, candidate.label, self.measure, None, 0, 0, error=f"its worker died {len(attempts)} times")
                self.study.add_trial(_trial(candidate, TrialState.PRUNED, (lost,)))

    @property
    def measure(self) -> str:
        return str(self.study.user_attrs["asked"]["objective"])

    def _dead(self, trial: FrozenTrial) -> bool:
        """True when the trial's worker was a process of this host that is gone, or has not been heard of for long.

        One that was killed before it put its name to the trial is not waited for as long.
        """
        host, _, process = trial.user_attrs.get("worker", "::").partition(":")
        pid, _, started = process.partition(":")
        if started and host == socket.gethostname():
            return _started(int(pid)) != started
        since = trial.user_attrs.get("beat") or (trial.datetime_start.timestamp() if trial.datetime_start else 0.0)
        return time.time() - since > (self.grace_s if host else min(self.grace_s, CLAIM_S))


def _started(pid: int) -> str:
    """When a process of this host began, in the system's ticks; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _counts(trial: FrozenTrial) -> bool:
    """True for a trial that owns its architecture: waiting, in work or scored, not failed or dropped."""
    if trial.state in DONE:
        return "tiers" in trial.user_attrs
    return trial.state != TrialState.FAIL


def _trial(candidate: Candidate, state: TrialState, tiers: Sequence[Score] = ()) -> FrozenTrial:
    attrs: dict[str, Any] = {"arch": candidate.arch.key, "label": candidate.label, "source": candidate.source}
    attrs |= {"removed": candidate.arch.terms, "costs": dict(candidate.costs)}
    return create_trial(
        state=state,
        value=tiers[-1].value if tiers else None,
        params=dict(candidate.params),
        distributions=dict.fromkeys(candidate.params, UNIT),
        user_attrs=attrs | ({"tiers": [score.to_json() for score in tiers]} if tiers else {}),
        constraints=dict(candidate.over),
    )


def _evaluation(trial: FrozenTrial) -> Evaluation:
    ended = trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0
    began = trial.datetime_start.timestamp() if trial.datetime_start else ended
    tiers = tuple(Score.from_json(row) for row in trial.user_attrs["tiers"])
    bounds = checked(trial.user_attrs.get("bounds", []), tuple[BoundCheck, ...], "the bounds of a trial", MEND)
    return Evaluation(trial.number, Trials.candidate(trial), tiers, ended, ended - began, bounds=bounds)
