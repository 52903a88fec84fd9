"""What a search is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from blockprune.errors import UserError
from blockprune.measures.measure import of_drawings
from blockprune.model.architecture import FITS
from blockprune.model.defaults import MOST_BATCH, judge_names
from blockprune.model.graph import CONVENTIONS
from blockprune.request import LONGEST_NAME, option
from blockprune.stages.fields import REMOVE, SCALE, Measuring, Shared
from blockprune.stages.search.bounds import Bound, read_objective
from blockprune.stages.search.budget import check_budget

BUDGET, SEARCH, RECOVERY = "Budget", "Search", "Recovery"
MOST_TRIALS = 10**5
SAMPLERS = ("tpe", "gp", "nsga2", "random")
MOST_OF_A_FINALIST = 10**6  # samples


@dataclass(frozen=True, kw_only=True)
class SearchRequest(Shared, Measuring):
    """Which removal set is sought, under which budgets, and how hard."""

    budget: tuple[str, ...] = option(
        (),
        "0.66B, 480M (parameters), 220GMACs, 70ms, 65%params, 65%macs, 65%latency, or a design for its parameters and MACs, as "
        "bk-sdm-small; repeatable, all must hold",
        BUDGET,
    )
    scope: str = option(
        "pipeline", "what parameters are counted: pipeline, as the papers do, or unet", BUDGET, choices=("pipeline", "unet")
    )
    macs: str = option("thop", "which multiply-adds are counted", BUDGET, choices=CONVENTIONS)
    pareto: str | None = option(None, "a front over a sweep of sizes", BUDGET, choices=("params", "macs", "latency"))
    unit: str = option("block", "what may go: stage, pair, block, layer, component; several as in block,layer", REMOVE, commas=True)
    stock_only: bool = option(False, "only what leaves a U-Net that stock diffusers loads: see `blockprune export`", REMOVE)
    keep: str | None = option(None, "blocks that must stay, comma-separated; * and {a,b} stand for several", REMOVE)
    fit: tuple[str, ...] = option(
        (),
        f"what may stand in for a removed block besides nothing: {', '.join(FITS)} (fitted in closed form); comma-separated",
        REMOVE,
        choices=FITS,
        commas=True,
    )
    objective: tuple[str, ...] = option(
        (),
        f"what is made best, {', '.join(of_drawings())}; then what must hold, as in guided_mse,clip_score>=0.7. Left out: "
        "feature_distance where a detector is given or is the model's own, else guided_mse",
        SEARCH,
        commas=True,
    )
    score_fit: str | None = option(
        None,
        f"what is fitted in place of removed blocks to score alone: none, {', '.join(FITS)}; linear, or none with --fit",
        SEARCH,
        choices=("none", *FITS),
    )
    trials: int = option(
        200, "architectures to score, the removals of single units among them", SEARCH, least=1, most=MOST_TRIALS, compared=False
    )
    sampler: str = option("tpe", "Optuna's sampler after the exact solution", SEARCH, choices=SAMPLERS, compared=False)
    arch: tuple[str, ...] = option(
        (),
        "an architecture to score and to choose from as well, such as the best.json of a smaller budget; repeatable",
        SEARCH,
        compared=False,
    )
    finalists: int = option(
        4, "how many are scored again on fresh seeds, presets and --arch besides", SEARCH, least=1, most=1000, compared=False
    )
    allow: tuple[str, ...] = option(
        (),
        "prompt-deaf: also finalists that, with linear fits, follow captions worse than every preset within the budget",
        SEARCH,
        choices=("prompt-deaf",),
        commas=True,
        compared=False,
    )
    final_factor: int = option(4, "how many times more samples the finalists get", SEARCH, least=1, most=1000)
    random: int = option(
        0, "random sets to score as well, for comparison in the report", SEARCH, least=0, most=MOST_TRIALS, compared=False
    )
    from_scan: str | None = option(None, "run directory of a scan or search whose scores are taken over", SEARCH, compared=False)
    recover: tuple[int, ...] = option(
        (),
        "updates of distillation before the choice: 50,200,800 gives all finalists 50, the best third 200 in all, and so on",
        RECOVERY,
        least=1,
        most=10**6,
        commas=True,
    )
    recover_batch_size: int = option(8, "images of each such update", RECOVERY, least=1, most=MOST_BATCH)
    train_data: str | None = option(None, "training pairs for --recover: see `blockprune distill --data`", RECOVERY)
    storage: str | None = option(
        None, "Optuna storage URL, such as postgresql://…, shared by hosts; in --out when left out", SCALE, compared=False
    )
    study_name: str | None = option(
        None, "name of the study in the storage; that of --out when left out", SCALE, longest=LONGEST_NAME, compared=False
    )

    def filled(self, defaults: Mapping[str, Any]) -> Self:
        """With the objective that ranks students best by what they are worth after training (reports/after-training/table.md)."""
        detector, _ = judge_names(defaults, self.detector, self.inception_weights, self.clip, self.reference)
        objective = self.objective or ("feature_distance" if detector else "guided_mse",)
        return replace(super().filled(defaults), objective=objective)

    @property
    def measure(self) -> str:
        """What is made best, in a request that is filled."""
        return read_objective(self.objective)[0]

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """What must hold."""
        return read_objective(self.objective)[1]

    @property
    def scored_with(self) -> str:
        """What stands in for removed blocks while architectures are scored: "none" or a kind of fit."""
        return self.score_fit or ("none" if self.fit else "linear")

    def check(self) -> None:
        for text in self.budget:
            check_budget(text)
        if self.objective:
            read_objective(self.objective)
        if not self.budget and not self.pareto:
            raise UserError("no budget: give --budget, such as 65%params or 0.66B, or --pareto for a front")
        if self.stock_only and (self.fit or "component" in self.unit):
            what = "a fit" if self.fit else "a component gone alone"
            raise UserError(
                f"no stock configuration has {what}: leave out {'--fit' if self.fit else '--unit component'} or --stock-only"
            )
        if list(self.recover) != sorted(set(self.recover)):
            given = ",".join(map(str, self.recover))
            raise UserError(f"--recover must rise from each number of updates to the next: got {given}; write it as 50,200,800")
        if self.workers > 1 and (self.storage or "").startswith("sqlite"):
            raise UserError(
                "SQLite lets two workers take one trial: with --workers leave --storage out or give a PostgreSQL URL, "
                "or use one worker"
            )
        n_samples = max(self.n_images or 0, self.eps_samples or 0) * self.final_factor
        if n_samples > MOST_OF_A_FINALIST:
            raise UserError(
                f"finalists would get {n_samples} samples, at most {MOST_OF_A_FINALIST}: lower --final-factor, --n-images or "
                "--eps-samples"
            )
