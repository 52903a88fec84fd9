"""A benchmark of personalisation: every subject learnt anew, drawn and scored; what is done is not done again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from blockprune.errors import UserError
from blockprune.model.device import device_of
from blockprune.model.model import Model
from blockprune.progress import Listener
from blockprune.runs import AnyRun, open_run
from blockprune.runs.provenance import fingerprint, made_with
from blockprune.stages import loading
from blockprune.stages.personalise.dataset import BenchmarkSubject, read_benchmark, read_dataset, request_of
from blockprune.stages.personalise.request import PersonaliseRequest
from blockprune.stages.personalise.run import personalise
from blockprune.stages.train.launch import launched


@dataclass(frozen=True)
class Benchmarked:
    """A benchmark that is done: its run has a row for each subject and measure."""

    run: AnyRun


def benchmark(given: Model | None, request: PersonaliseRequest, out: Path | None, progress: Listener) -> Benchmarked:
    """Teaches the model one subject after another, each in a run of its own in `out`/subjects, and keeps its scores.

    `given` is the model where it is loaded already; it stays as it was.
    """
    if launched():
        raise UserError("a --protocol runs in one process: leave out accelerate launch, and share the subjects with --subjects")
    rules = read_benchmark(request.protocol or "")
    subjects = read_dataset(Path(request.dataset or ""), rules, request.token, request.subjects)
    model = given or loading.any_model(request.model, request.resolution, device_of(request.device))
    asked = {
        **request.compared(),
        "learning_rate": request.rate,
        "identity": model.identity,
        "latent": list(model.latent),
        "subjects": [s.name for s in subjects],
        "prompts": fingerprint([prompt for s in subjects for prompt in s.prompts]),
        "batch": request.train_batch_size * request.gradient_accumulation_steps,
    }
    with open_run(out, "personalise", asked, {"made_with": made_with(model.device), "model": request.model}) as run:
        for subject in subjects:
            _learn(run, model, request_of(request, rules, subject), subject, out, progress)
    return Benchmarked(run)


def _learn(
    run: AnyRun, model: Model, request: PersonaliseRequest, subject: BenchmarkSubject, out: Path | None, progress: Listener
) -> None:
    """Adds the rows of a subject, unless they are there; its checkpoints go with that."""
    folder = None if out is None else out / "subjects" / subject.name
    mine = [row for row in run.rows() if row["subject"] == subject.name]
    if not any(row["score"]["measure"] == "train_memory" for row in mine):  # the last one that is added
        run.keep(lambda row: row["subject"] != subject.name)
        progress.say(f"learning {subject.name}")
        learnt = personalise(model, request, folder, progress, subject.prompts)
        for row in learnt.run.rows():
            if row["kind"] in ("validation", "cost") and row["step"] == request.max_train_steps:
                run.append({"kind": "subject", "subject": subject.name, "step": row["step"], "score": row["score"]})
    if folder is not None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
