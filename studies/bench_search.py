"""How many evaluations does a search need? Ours against random sets, plain Optuna, and the exact solution of the scan alone.

    python studies/bench_search.py table --out reports      # on the truth of exhaustive_pairs.py; about 10 minutes on one core
    python studies/bench_search.py table --by guided_mse --out reports      # on that of what `search` scores by default
    python studies/bench_search.py blocks --out reports     # on the block-level space, scored as it goes; about 40 minutes

`table`: under each budget, after how many evaluations a method has come within 1 % of the true optimum, for ten seeds, at most 5 %
of all sets. `blocks`: the best `eps_mse` (64 samples) after 100, 200 and 400 evaluations, for five seeds; every score is kept in
`bench-search-scores.csv`, so a killed run goes on. An evaluation is a forward pass over the samples. Ours and `exact` are charged
for scoring every unit alone; plain Optuna (TPE, NSGA-II with `set_constraint`) is not charged for proposals outside the budget
or for repeated ones, up to four proposals for each evaluation.
`--dry-run` prints the plan.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from exhaustive_pairs import BUDGETS, FILES, denoiser, space, table
from matplotlib.figure import Figure

from blockprune.measures.score import Score
from blockprune.model import presets
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports.canvas import axis_title, new_figure, png, tidy, title
from blockprune.runs.records import Candidate
from blockprune.stages.search.proposals import sampler_of
from blockprune.stages.search.search import Candidates, Chance, Strategy, search
from blockprune.stages.search.space import Space
from blockprune.stages.search.storage import open_storage
from blockprune.stages.search.trials import Trials

TIGHTER = {"71%params": ("60%params", "50%params"), "60%params": ("55%params", "50%params")}
MACS = ("75%macs", "70%macs", "65%macs")
BLOCK_BUDGETS = [("60%params",), ("65%macs",)]
CLOSE = 1.01
PROPOSALS = 4
SIZES = (100, 200, 400)
Scorer = Callable[[Architecture], float]
Curve = list[float]


def ours(of: Space, score: Scorer, n: int, seed: int) -> Curve:
    known = presets.fitting(of.graph)
    return _run(of, Strategy(of, [of], known, seed=seed), score, n)


def exact(of: Space, score: Scorer, n: int, seed: int) -> Curve:
    return _run(of, Strategy(of, [of], {}, n_exact=n), score, n)


def chance(of: Space, score: Scorer, n: int, seed: int) -> Curve:
    return _run(of, Chance(Strategy(of, [of], {}), seed), score, n)


def _run(of: Space, source: Candidates, score: Scorer, n: int) -> Curve:
    """The best score so far after each of `n` evaluations by the package's own search loop."""
    trials = Trials(open_storage(None, None), "bench", "eps_mse", {"objective": "eps_mse"})

    def scored(candidate: Candidate, _: Any) -> tuple[Score, ...]:
        return (Score(candidate.arch.key, candidate.label, "eps_mse", score(candidate.arch), 1, 0),)

    best, curve = math.inf, Curve()
    for e in search(trials, source, scored, n):
        best = min(best, e.loss) if e.candidate.fits else best
        curve.append(best)
    return curve


def plain(sampler: str, of: Space, score: Scorer, n: int, seed: int) -> Curve:
    """Optuna by ask and tell with a constraint, no repair; only new sets within the budget are charged."""
    study = optuna.create_study(sampler=sampler_of(sampler, seed))
    cache: dict[str, float] = {}
    best, curve = math.inf, Curve()
    for _ in range(PROPOSALS * n):
        trial = study.ask()
        choice = frozenset(label for label in of.labels if trial.suggest_categorical(label, [False, True]))
        over = max(max(of.over(of.arch(choice)).values()), 0.0 if of.valid(choice) else 1.0)
        trial.set_constraint("budget", over)
        if over > 0:
            study.tell(trial, 1.0 + over)
            continue
        arch = of.arch(choice)
        if arch.key not in cache:
            cache[arch.key] = score(arch)
            best = min(best, cache[arch.key])
            curve.append(best)
        study.tell(trial, cache[arch.key])
        if len(curve) == n:
            break
    return curve


Method = Callable[[Space, Scorer, int, int], Curve]
METHODS: Mapping[str, Method] = {
    "ours": ours,
    "exact on the scan alone": exact,
    "TPE, plain": lambda of, score, n, seed: plain("tpe", of, score, n, seed),
    "NSGA-II, plain": lambda of, score, n, seed: plain("nsga2", of, score, n, seed),
    "random": chance,
}
COLOURS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#8a949c")


def table_budgets(by: str) -> list[tuple[str, ...]]:
    """The budget within which all sets are scored, tighter ones, and it with MACs as well."""
    loosest = BUDGETS[by]
    return [(loosest,), *((tighter,) for tighter in TIGHTER[loosest]), *((loosest, macs) for macs in MACS)]


def on_table(reports: Path, n_seeds: int, by: str = "eps_mse") -> Iterator[dict[str, Any]]:
    """One row for each budget and method: evaluations to within 1 % of the optimum, seed by seed, None where it was not reached."""
    truth = table(reports / FILES[by])
    for budgets in table_budgets(by):
        of = space(*budgets)
        scores = {of.arch(choice).key: value for choice, value in truth.items()}
        feasible = [value for choice, value in truth.items() if of.valid(choice) and of.fits(choice)]
        for name, curves in _curves(of, partial(_looked_up, scores), len(feasible) // 20, n_seeds):
            need = [next((i for i, v in enumerate(curve, 1) if v <= CLOSE * min(feasible)), None) for curve in curves]
            row = {"budget": " and ".join(budgets), "n_feasible": len(feasible), "optimum": min(feasible), "method": name}
            print(row["budget"], name, need, flush=True)
            yield row | {"evaluations": need, "curves": curves}


def _looked_up(scores: Mapping[str, float], arch: Architecture) -> float:
    return scores[arch.key]


def _curves(of: Space, score: Scorer, n: int, n_seeds: int) -> Iterator[tuple[str, list[Curve]]]:
    """Each method's curves, seed by seed; the exact solution has no chance in it and is run once."""
    for name, method in METHODS.items():
        once = method is exact
        curves = [method(of, score, n, seed) for seed in range(1 if once else n_seeds)]
        yield name, curves * n_seeds if once else curves


class Kept:
    """Scores by `denoiser`, each computed once and kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.known, self.judge = path, dict[str, float](), denoiser(64)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            self.known = {key: float(value) for key, value in csv.reader(lines[1:])}
        else:
            path.write_text("arch,eps_mse\n", encoding="utf-8")

    def __call__(self, arch: Architecture) -> float:
        if arch.key not in self.known:
            self.known[arch.key] = float(self.judge.errors(arch).mean())
            with self.path.open("a", encoding="utf-8") as out:
                out.write(f"{arch.key},{self.known[arch.key]:.9g}\n")
        return self.known[arch.key]


def block_units(graph: BlockGraph) -> dict[str, Architecture]:
    return graph.units("block") | {"innermost": graph.units("stage")["innermost"]}


def on_blocks(reports: Path, n_seeds: int) -> Iterator[dict[str, Any]]:
    """One row for each budget and method: the best score after each size, seed by seed."""
    score = Kept(reports / "bench-search-scores.csv")
    for budgets in BLOCK_BUDGETS:
        of = space(*budgets, units=block_units)
        for name, curves in _curves(of, score, SIZES[-1], n_seeds):
            at = {n: [curve[min(n, len(curve)) - 1] for curve in curves] for n in SIZES}
            print(" and ".join(budgets), name, {n: f"{np.median(v):.4g}" for n, v in at.items()}, flush=True)
            yield {"budget": " and ".join(budgets), "method": name, "best": at, "curves": curves}


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| budget | sets within it | method | median | 9 of 10 seeds | seeds that got there within 5 % of the sets |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: |")
    for row in rows:
        need = sorted(math.inf if n is None else n for n in row["evaluations"])
        limit = row["n_feasible"] // 20
        ranks = (len(need) - 1) // 2, math.ceil(0.9 * len(need)) - 1
        median, most = (f"more than {limit}" if math.isinf(need[i]) else f"{need[i]:g}" for i in ranks)
        within = f"{sum(n <= limit for n in need)} of {len(need)}"
        lines.append(f"| {row['budget']} | {row['n_feasible']} | {row['method']} | {median} | {most} | {within} |")
    return "\n".join(lines)


def blocks_text(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| budget | method | " + " | ".join(f"{n} evaluations" for n in SIZES) + " |",
        "| --- | --- |" + " ---: |" * len(SIZES),
    ]
    for row in rows:
        cells = [f"{np.median(v):.3g} ({min(v):.3g} to {max(v):.3g})" for v in row["best"].values()]
        lines.append(f"| {row['budget']} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows: Sequence[Mapping[str, Any]], optimum: float | None, by: str) -> Figure:
    """The median best score against evaluations, with the range over seeds."""
    drawn = new_figure(7.4, 4.6)
    title(
        drawn, f"Search under {rows[0]['budget']}", "Median of the seeds; shaded: their range. The scan of single units is charged."
    )
    ax = drawn.add_axes((0.11, 0.12, 0.86, 0.72))
    tidy(ax)
    for row, colour in zip(rows, COLOURS, strict=True):
        longest = max(map(len, row["curves"]))
        curves = np.array([curve + [curve[-1]] * (longest - len(curve)) for curve in row["curves"]])
        known = np.isfinite(curves).all(0)
        x, y = np.arange(1, longest + 1)[known], curves[:, known]
        ax.plot(x, np.median(y, axis=0), color=colour, lw=1.8, label=row["method"])
        ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
    if optimum:
        ax.axhline(optimum, color="#1c2733", lw=0.8, ls=":")
    ax.set_yscale("log")
    ax.set_xlabel("evaluations", fontsize=8.5)
    ax.set_ylabel(axis_title(by), fontsize=8.5)
    ax.legend(fontsize=8, frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "blocks"))
    parser.add_argument("--out", type=Path, default=Path("reports"))
    parser.add_argument("--by", choices=tuple(FILES), default="eps_mse", help="the score of the table")
    parser.add_argument("--seeds", type=int, help="10 for the table, 5 for blocks")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args()
    on_truth = args.what == "table"
    n_seeds, budgets = args.seeds or (10 if on_truth else 5), table_budgets(args.by) if on_truth else BLOCK_BUDGETS
    if args.dry_run:
        print(f"{len(budgets)} budgets x {len(METHODS)} methods x {n_seeds} seeds")
        return
    rows = list(on_table(args.out, n_seeds, args.by) if on_truth else on_blocks(args.out, n_seeds))
    shown = [row for row in rows if row["budget"] == " and ".join((BUDGETS[args.by], MACS[0]) if on_truth else BLOCK_BUDGETS[-1])]
    stem = f"bench-search-{args.what}{'-guided' if args.by == 'guided_mse' else ''}"
    (args.out / f"{stem}.png").write_bytes(png(figure(shown, shown[0].get("optimum"), args.by)))
    (args.out / f"{stem}.md").write_text((table_text if on_truth else blocks_text)(rows) + "\n", encoding="utf-8")
    (args.out / f"{stem}.json").write_text(
        json.dumps([{k: v for k, v in row.items() if k != "curves"} for row in rows], indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
