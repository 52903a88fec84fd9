"""Whether a student can still be told what to draw: how it follows captions with linear maps fitted where its blocks were.

Untrained, most students draw nothing that could be judged; with fits they draw what training would build on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from blockprune.measures.images import failed, judge
from blockprune.measures.runner import Arrays, MeasureRunner, Objective, Plan
from blockprune.measures.score import Score
from blockprune.model.model import Model
from blockprune.model.sampling import NotFinite
from blockprune.runs.records import Candidate, Evaluation
from blockprune.stages.plan import possible


class Hearing:
    """Scores by `measure`: "clip_score" where there is a scorer, else "guided_mse", or "" where nothing is guided.

    `model` fits what its students need; `teacher` is what it drew under the plan, empty where the plan has data.
    """

    def __init__(self, model: Model, plan: Plan, teacher: Arrays) -> None:
        there = possible(plan.judges, guided=plan.protocol.cfg_scale > 1)
        self.measure = next((m for m in ("clip_score", "guided_mse") if m in there), "")
        self.model, self.plan, self.teacher = model, plan, teacher

    def __call__(self, candidate: Candidate, evaluations: Sequence[Evaluation] = ()) -> tuple[Score, ...]:
        """The score of a candidate with linear fits, but where it says itself what stands in."""
        arch, key, label = candidate.arch, candidate.arch.key, candidate.label
        fitted = arch if arch.fits else self.model.graph.fitted(arch, "linear")
        runner = MeasureRunner(self.model, self.plan)
        if self.measure == "guided_mse":
            return (replace(Objective(runner, self.measure, self.teacher)(fitted, label), arch=key),)
        try:
            seen, _ = runner.observe(fitted, label)
        except NotFinite as err:
            protocol = self.plan.protocol
            return tuple(failed(key, label, [self.measure], protocol.n_images, protocol.seed, str(err)))
        return tuple(judge(key, label, [self.measure], seen, None, self.plan.judges, self.plan.protocol.seed))
