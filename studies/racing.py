"""How many images does `blockprune scan --racing` save, and does it rank alike?

    python studies/racing.py --unit stage --out runs/racing

Every removal gets all images once; the race is then run over what was seen, as `scan --racing` runs it over images as they come:
for as many images as were drawn, for halves of that, and for more, which are drawn from these with replacement. Two removals are
told apart where the 95 % interval of their paired difference over all images excludes 0. About 5 minutes on a core for the stages
of tiny-digits; the same command again goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

import blockprune as bp
from blockprune.measures.fid_kid import feature_distance
from blockprune.measures.intervals import Floats, kendall_tau, mean_statistic, paired_interval
from blockprune.model.architecture import Architecture
from blockprune.runs.directory import Stored
from blockprune.runs.series import Series
from blockprune.stages.scan.racing import Race, rounds_of

MEASURE = "feature_distance"


def distances(folder: Path, n: int) -> dict[str, Floats]:
    """Removal => (n,) distances of its images to the teacher's."""
    run = Stored(folder, "scan")
    keys = {label: Architecture(frozenset(names)).key for label, names in run.about["archs"].items()}
    features = {label: Series(run, key, n).seen()["features"] for label, key in keys.items()}
    teacher = features.pop("full")
    return {label: feature_distance(of, teacher) for label, of in features.items()}


def redrawn(of: Mapping[str, Floats], n: int) -> dict[str, Floats]:
    """What `n` images would give, if they were like these: the same images for all removals, drawn again with replacement."""
    index = np.random.default_rng(0).integers(0, len(next(iter(of.values()))), n)
    return {label: values[index] for label, values in of.items()}


def raced(of: Mapping[str, Floats], n: int) -> dict[str, int]:
    """Removal => how many of at most `n` images it gets."""
    race = Race(of, rounds_of(n), 0)
    while race.open:
        race.end_round({label: mean_statistic(values[: race.wanted[label]]) for label, values in of.items()})
    return race.wanted


def compared(of: Mapping[str, Floats], n: int) -> dict[str, float]:
    """The race for at most `n` images beside the scan of `n` images each."""
    wanted = raced(of, n)
    whole, part = {k: v[:n].mean() for k, v in of.items()}, {k: v[: wanted[k]].mean() for k, v in of.items()}
    apart = []
    for a, b in combinations(of, 2):
        low, high = paired_interval(mean_statistic(of[a][:n]), mean_statistic(of[b][:n]), n, 0) or (0.0, 0.0)
        if not low <= 0 <= high:
            apart.append((part[a] < part[b]) == (whole[a] < whole[b]))
    images, tau = sum(wanted.values()), kendall_tau(list(whole.values()), list(part.values()))
    saved = {"all": n * len(of), "raced": images, "saved": n * len(of) / images}
    return {"n": n, **saved, "alike": sum(apart), "apart": len(apart), "tau": tau or 0.0}


def simulated(gap: float, n: int, races: int = 150) -> str:
    """How often two removals that are `gap` standard deviations apart are called clear of one another, and the wrong way round."""
    clear = wrong = 0
    for seed in range(races):
        draw = np.random.default_rng(seed)
        of = {"better": draw.normal(size=n), "worse": gap + draw.normal(size=n)}
        seen = raced(of, n)["better"]
        clear += seen < n
        wrong += bool(seen < n and of["worse"][:seen].mean() < of["better"][:seen].mean())
    return (
        f"two removals {gap} apart, {n} images at most: called clear in {clear / races:.1%}, the wrong way in {wrong / races:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", default="stage")
    parser.add_argument("--n-images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="say what would be drawn")
    args = parser.parse_args()
    if args.dry_run:
        print(f"{len(bp.graph().units(args.unit))} removals, {args.n_images} images each")
        return
    bp.scan(unit=args.unit, measures=[MEASURE], n_images=args.n_images, steps=args.steps, out=args.out)
    n, of = args.n_images, distances(args.out, args.n_images)
    rows = [compared(of, n // 4), compared(of, n // 2), compared(of, n)]
    rows += [compared(redrawn(of, n * more), n * more) for more in (4, 8)]
    print("| at most | images of all | raced | times fewer | Kendall τ of both rankings | pairs told apart, ranked alike |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        alike = f"{row['alike']} of {row['apart']}"
        cells = (row["n"], row["all"], row["raced"], f"{row['saved']:.2f}", f"{row['tau']:.3f}", alike)
        print("|", " | ".join(map(str, cells)), "|")
    for gap in (0.0, 0.35, 0.5):
        print(simulated(gap, 64))


if __name__ == "__main__":
    main()
