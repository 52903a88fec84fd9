"""The table of `after_training.py`: how well each score of an untrained student ranks what students are worth after training.

    python studies/after_training_table.py --reports reports/after-training

Reads the rows there and writes `table.md` and `curves.png` beside them. Kendall τ is taken over the students of one size and
averaged over the three sizes. Scores of `predictors.py` are taken from `predictors/` there. Regret at 5: how far the best of a
score's first five is behind the best of that size, in the unit of the truth, averaged as well. The two seeds of a student say how
well one training ranks another, which no score can beat.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from candidates import BY_IMAGES, GROWN
from matplotlib.figure import Figure
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_predict

from blockprune.measures.intervals import kendall_tau
from blockprune.reports.canvas import new_figure, png, tidy, title

Row = Mapping[str, Any]
Value = Callable[[Row], float]
N_IMAGES, CFG_SCALE, TOP = 256, 3.0, 5
UP = ("clip_score", "digits_read")
LATER = (BY_IMAGES, GROWN)  # found by the score that ranked best, so no part of the ranking
# how `after_training.py` and `predictors.py` score
N_NOISY, N_FITTED, STEPS, BATCH_SIZE = 256, 256, 6, 16


def drawn_at(row: Row, cfg_scale: float) -> Row:
    found: Row = next(d for d in row["truth"] if d["cfg_scale"] == cfg_scale)
    return found


def fid_at(drawn: Row) -> float:
    """At the n that all guidance scales share."""
    return float(drawn.get(f"fid_{N_IMAGES}") or drawn["fid"])


# what a trained student is worth, as losses: less is better
TRUTHS: dict[str, Value] = {
    "digits read": lambda row: -float(drawn_at(row, CFG_SCALE)["digits_read"]),
    "CLIP score": lambda row: -float(drawn_at(row, CFG_SCALE)["clip_score"]),
    "FID, best scale": lambda row: min(fid_at(d) for d in row["truth"]),
    "eps_mse": lambda row: float(row["training"][-1]["eps_mse"]),
}


def untrained(name: str, row: Row) -> float:
    return float(row["untrained"][name]) * (-1 if name.split(",")[0] in UP else 1)


def early(i: int, name: str, row: Row) -> float:
    """At the checkpoint `i`."""
    return float(row["training"][i][name])


def dearer(rows: Sequence[Row], folder: Path) -> list[Row]:
    """The rows with the scores that `predictors.py` has of all of them."""
    rows = list(rows)
    for path in sorted(folder.glob("*.json")):
        scores = json.loads(path.read_text(encoding="utf-8"))
        if all(row["name"] in scores for row in rows):
            rows = [{**row, "dearer": {**row.get("dearer", {}), **scores[row["name"]]}} for row in rows]
    return rows


def predictors(rows: Sequence[Row]) -> dict[str, Value]:
    """Scores that are there before the training is over, as losses."""
    mine: dict[str, Value] = {name: lambda row, name=name: float(row["dearer"][name]) for name in rows[0].get("dearer", ())}  # type: ignore[misc]
    return mine | _of_rows(rows)


def _of_rows(rows: Sequence[Row]) -> dict[str, Value]:
    found: dict[str, Value] = {f"untrained: {name}": partial(untrained, name) for name in rows[0]["untrained"]}
    for i, at in enumerate(rows[0]["training"][:-1]):
        found |= {f"after {at['updates']} updates: {name}": partial(early, i, name) for name in ("eps_mse", "guided_mse")}
    return found | {"parameters, more is better": lambda row: -row["params"], "MACs, more is better": lambda row: -row["macs_thop"]}


def passes(name: str) -> str:
    """How many samples a U-Net must pass to score one student; an update counts as three passes of its images."""
    if ": " in name and (fit := name.rpartition(", ")[2]) in ("none", "channel", "linear"):
        of_fit, n_drawn = N_FITTED if fit != "none" else 0, 64 if fit == "channel" or "distance" in name else 128
        by = {"eps_mse": N_NOISY, "guided_mse": 2 * N_NOISY}
        return f"{by.get(name.split(': ')[1].split(',')[0], 2 * STEPS * n_drawn) + of_fit:,}"
    if found := re.match(r"after (\d+) updates: (\w+)", name):
        errors = {"loss": 0, "eps_mse": N_NOISY, "guided_mse": 2 * N_NOISY}.get(found[2], 2 * STEPS * N_IMAGES)
        return f"{3 * BATCH_SIZE * int(found[1]) + errors:,}"
    return {"shared": "once a long training", "learned": "a training for each size"}.get(name.split(" ")[0], "0")


def surrogate(rows: Sequence[Row], truth: Value) -> float:
    """Kendall τ of a ridge regression of the truth on which units are gone and on the size, each student predicted by a fit to the
    students of the other two thirds."""
    names = sorted({term for row in rows for term in row["removed"]})
    sizes = sorted({row["size"] for row in rows})
    masks = np.array([[n in row["removed"] for n in names] + [row["size"] == s for s in sizes] for row in rows], dtype=float)
    truths = np.array([truth(row) for row in rows])
    thirds = KFold(3, shuffle=True, random_state=0)
    scale = truths.std() or 1.0
    guessed = dict(zip(map(id, rows), cross_val_predict(Ridge(1.0), masks, truths / scale, cv=thirds), strict=True))
    return tau(rows, lambda row: float(guessed[id(row)]), truth)


def by_size(rows: Sequence[Row]) -> list[list[Row]]:
    sizes = dict.fromkeys(row["size"] for row in rows)
    return [[row for row in rows if row["size"] == size] for size in sizes]


def tau(rows: Sequence[Row], score: Value, truth: Value) -> float:
    """Kendall τ within each size, averaged."""
    taus = [kendall_tau([score(r) for r in group], [truth(r) for r in group]) for group in by_size(rows)]
    return float(np.mean([t for t in taus if t is not None]))


def regret(rows: Sequence[Row], score: Value, truth: Value) -> float:
    """How far the best of the first five is behind the best of all, averaged over sizes."""
    behind = [min(map(truth, sorted(group, key=score)[:TOP])) - min(map(truth, group)) for group in by_size(rows)]
    return float(np.mean(behind))


def between_seeds(pairs: Sequence[tuple[Row, Row]], truth: Value) -> tuple[float | None, float]:
    """Kendall τ between the seeds over all sizes, and the standard deviation of one training."""
    a, b = [truth(x) for x, _ in pairs], [truth(y) for _, y in pairs]
    return kendall_tau(a, b), float(np.sqrt(np.mean(np.square(np.subtract(a, b))) / 2)) if pairs else 0.0


def markdown(rows: Sequence[Row], seconds: Sequence[Row], reference: Sequence[Row]) -> str:
    plain = [row for row in rows if not any("~" in term for term in row["removed"])]
    ranked = [row for row in plain if row["source"] not in LATER]
    lines = [
        "# What is a score of an untrained student worth after training?",
        "",
        f"{len(plain)} plain students of tiny-digits and {len(rows) - len(plain)} with linear maps, at three sizes, each distilled "
        f"for {rows[0]['training'][-1]['updates']} updates of 16 images. Rows in `rows/`, by\n"
        "`python studies/after_training.py --out runs/after --reports reports/after-training`.",
        "",
        f"## Scores against truths, the {len(ranked)} plain students that no search by images found",
        "",
        "Kendall τ within a size, averaged over sizes; in brackets how far the best of the first five is behind the best.",
        "",
        "| score | U-Net passes | " + " | ".join(TRUTHS) + " |",
        "| --- |" + " ---: |" * (1 + len(TRUTHS)),
    ]
    scores = predictors(ranked)
    for name in sorted(scores, key=lambda n: -tau(ranked, scores[n], TRUTHS["digits read"])):
        cells = [f"{tau(ranked, scores[name], t):.2f} ({regret(ranked, scores[name], t):.3g})" for t in TRUTHS.values()]
        lines.append(f"| {name} | {passes(name)} | " + " | ".join(cells) + " |")
    guessed = [f"{surrogate(ranked, truth):.2f}" for truth in TRUTHS.values()]
    lines.append(
        f"| linear in the removed blocks, fitted to two thirds of the truth | {len(ranked) * 2 // 3} trainings | "
        + " | ".join(guessed)
        + " |"
    )
    first = {row["name"]: row for row in rows}
    pairs = [(first[row["name"]], row) for row in seconds if row["name"] in first]
    if pairs:
        cells = [f"{t:.2f} (sd {sd:.3g})" if t is not None else "" for t, sd in (between_seeds(pairs, v) for v in TRUTHS.values())]
        lines.append(f"| another seed of the training, {len(pairs)} students | another training | " + " | ".join(cells) + " |")
    heard = ["", "## Who still hears the prompt", "", hearing(plain)]
    return "\n".join([*lines, *heard, "", "## Students", "", *_students(rows, reference)]) + "\n"


def hearing(rows: Sequence[Row]) -> str:
    """What those read after training that, untrained and with linear maps, follow captions worse than every design of that size or
    below; and the others."""
    designs = [row for row in rows if row["source"] == "design"]
    groups: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        if row["source"] == "design":
            continue
        size = next(d["params"] for d in designs if d["name"] == row["size"])
        least = min(d["untrained"]["clip_score, linear"] for d in designs if d["params"] <= size)
        groups[row["untrained"]["clip_score, linear"] < least].append(-TRUTHS["digits read"](row))
    told = {True: "worse than every design by hand", False: "others"}
    lines = [f"| {told[k]} | {len(v)} | {np.median(v):.3f} | {min(v):.3f} to {max(v):.3f} |" for k, v in groups.items() if v]
    heads = ["| CLIP score untrained, with linear maps | students | digits read after training, median | range |"]
    return "\n".join([*heads, "| --- | ---: | ---: | ---: |", *lines])


def _students(rows: Sequence[Row], reference: Sequence[Row]) -> list[str]:
    lines = [
        "| size | student | found by | parameters | MACs | digits read | CLIP score | FID at CFG 1.5, 2, 3, 4.5 |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in [reference, *by_size(rows)]:
        for row in sorted(group, key=TRUTHS["digits read"]):
            at = drawn_at(row, CFG_SCALE)
            read, clip = (
                f"{at[m]:.3f} [{at[f'{m}_interval'][0]:.3f}, {at[f'{m}_interval'][1]:.3f}]" for m in ("digits_read", "clip_score")
            )
            fids = ", ".join(f"{fid_at(d):.1f}" for d in row["truth"])
            costs = f"{row['params'] / 1e6:.2f} M | {row['macs_thop'] / 1e6:.1f} M"
            lines.append(
                f"| {row.get('size', '')} | {row['name']} | {row.get('source', 'teacher')} | {costs} | {read} | {clip} | {fids} |"
            )
    return lines


def figure(rows: Sequence[Row]) -> Figure:
    """FID against CLIP score over guidance scales, one line for each student: designs and winners are named."""
    groups = by_size(rows)
    drawn = new_figure(4.2 * len(groups), 4.6)
    title(
        drawn,
        "FID and CLIP score after training",
        "One line for each student over guidance scales; n = 256; down and right is better.",
    )
    for i, (ax, group) in enumerate(zip(drawn.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups, strict=True)):
        tidy(ax)
        for row in group:
            shown = {"design": "#d55e00", "design with linear maps": "#cc79a7"}.get(row["source"], "#0072b2")
            chance = row["source"] in ("uniform", "informed")
            points = [(d["clip_score"], fid_at(d)) for d in row["truth"]]
            ax.plot(*zip(*points, strict=True), color="#b8c0c6" if chance else shown, lw=0.8 if chance else 1.6, marker=".", ms=4)
        ax.set_title(f"size of {group[0]['size']}", fontsize=9)
        ax.set_xlabel("CLIP score", fontsize=8.5)
        ax.set_yscale("log")
        if i == 0:
            ax.set_ylabel("FID", fontsize=8.5)
    drawn.subplots_adjust(left=0.07, right=0.99, top=0.8, bottom=0.12, wspace=0.06)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=600, help="of the trainings to tell of")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written")
    args = parser.parse_args()
    files = sorted((args.reports / "rows").glob(f"*-{args.updates}.json"))
    if args.dry_run:
        print(f"table.md and curves.png from {len(files)} rows")
        return
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    others = [row for row in rows if row["source"] in LATER or any("~" in term for term in row["removed"])]
    rows = dearer([row for row in rows if row not in others], args.reports / "predictors") + others
    teacher = args.reports / "teacher.json"
    reference = [json.loads(teacher.read_text(encoding="utf-8"))] if teacher.exists() else []
    first, second = ([row for row in rows if row["seed"] == seed] for seed in (0, 1))
    (args.reports / "table.md").write_text(markdown(first, second, reference), encoding="utf-8")
    (args.reports / "curves.png").write_bytes(png(figure(first)))


if __name__ == "__main__":
    main()
