"""After a longer training, is what `search` finds better than the designs by hand?

    python studies/after_training.py --out runs/after --reports reports/after-training --updates 50 200 600 2000 --seeds 0 1 2 \\
        --only bk-sdm-base "base-guided_mse, linear" bk-sdm-small "small-guided_mse, linear" bk-sdm-tiny "tiny-guided_mse, linear"
    (the same with "base-feature_distance, linear" "small-feature_distance, linear" "tiny-feature_distance, linear" base-grown)
    python studies/after_training_proof.py --reports reports/after-training

The first takes about two hours on two CPU cores, the second as long; the last reads their rows and writes `proof.md` and
`proof.png` beside them. At each size all have at most the parameters and the MACs of the design, the same training and the
same judges. Two are told apart where the ranges over seeds do not meet. Expected: what is found reads more digits, and its FID-
CLIP curve lies below. Measured: `proof.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from after_training_table import CFG_SCALE, TRUTHS, Row, Value, drawn_at, fid_at
from candidates import BY_IMAGES, GROWN
from matplotlib.figure import Figure

from blockprune.reports.canvas import new_figure, png, tidy, title

UPDATES, TABLE_UPDATES = 2000, 600
BY = {  # how a student was found, and the colour of its curves
    "design": ("by hand", "#d55e00"),
    "search by guided_mse, linear": ("by guided_mse", "#0072b2"),
    BY_IMAGES: ("by images", "#009e73"),
    GROWN: ("by images, with the smaller size", "#cc79a7"),
}
TEACHER_COLOUR = "#5f6b73"


def read(folder: Path, updates: int) -> list[Row]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*-{updates}.json"))]


def best(row: Row) -> Row:
    """What it drew at the guidance scale of its best FID."""
    drawn: Row = min(row["truth"], key=fid_at)
    return drawn


SHOWN: dict[str, Value] = {
    "digits read, CFG 3": lambda row: float(drawn_at(row, CFG_SCALE)["digits_read"]),
    "CLIP score, CFG 3": lambda row: float(drawn_at(row, CFG_SCALE)["clip_score"]),
    "FID, CFG 3": lambda row: fid_at(drawn_at(row, CFG_SCALE)),
    "FID, best CFG": lambda row: fid_at(best(row)),
    "CLIP score there": lambda row: float(best(row)["clip_score"]),
    "digits read there": lambda row: float(best(row)["digits_read"]),
    "guided error": lambda row: float(row["training"][-1]["guided_mse"]),
}
TOLD = ("digits read, CFG 3", "CLIP score, CFG 3", "FID, best CFG", "CLIP score there", "digits read there")


def over_seeds(rows: Sequence[Row], value: Value) -> str:
    """The mean, and the range over seeds where there are several."""
    values = [value(row) for row in rows]
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{spread}"


def better(ours: Sequence[Row], theirs: Sequence[Row], value: Value, up: bool) -> str:
    """Which has the better value with every seed."""
    mine, hand = ([value(row) * (1 if up else -1) for row in rows] for rows in (ours, theirs))
    return "found" if min(mine) > max(hand) else "design" if min(hand) > max(mine) else "not told apart"


def dominated(here: Sequence[Row], there: Sequence[Row]) -> str:
    """How many points of the first mean FID-CLIP curve have a point of the second with lower FID and higher CLIP score."""
    first, second = (
        np.array([[(fid_at(d), -d["clip_score"]) for d in row["truth"]] for row in rows]).mean(0) for rows in (here, there)
    )
    return f"{sum(any((other < point).all() for other in second) for point in first)} of {len(first)}"


def place(name: str, table: Sequence[Row]) -> str:
    """The place by digits read among all students of its size in the truth table."""
    mine = next(row for row in table if row["name"] == name)
    group = sorted((row for row in table if row["size"] == mine["size"]), key=TRUTHS["digits read"])
    return f"{group.index(mine) + 1} of {len(group)}"


def markdown(rows: Sequence[Row], table: Sequence[Row], teacher: Row) -> str:
    """The scores of all, and who is better."""
    of = by_name(rows)
    lines = [
        "# What search finds against the designs by hand, after a longer training",
        "",
        f"{UPDATES} updates of 16 images; n = 512 at CFG 3 for digits and CLIP score, else 256. Mean, and range over the seeds "
        "of the training in brackets.",
        "Commands in `studies/after_training_proof.py`. `base-grown` is the best of three (`grown` in `studies/candidates.py`); a "
        "whole search ranks other sets before it (`reports/LOG.md`).",
        "",
        f"| student | found | seeds | parameters | MACs | {' | '.join(SHOWN)} | best CFG | place in the table by digits read |",
        f"| --- | --- | ---: | ---: | ---: |{' ---: |' * (len(SHOWN) + 2)}",
    ]
    shown = [f"{v(teacher):.3g}" for name, v in SHOWN.items() if name != "guided error"]
    lines.append(f"| the teacher | | | {costs(teacher)} | {' | '.join(shown)} | 0 | {best(teacher)['cfg_scale']:g} | |")
    for name, group in of.items():
        cells = " | ".join(over_seeds(group, value) for value in SHOWN.values())
        scales = ", ".join(sorted({f"{best(row)['cfg_scale']:g}" for row in group}))
        about = f"{BY[group[0]['source']][0]} | {len(group)} | {costs(group[0])}"
        lines.append(f"| {name} | {about} | {cells} | {scales} | {place(name, table)} |")
    lines += [
        "",
        f"| found | against | {' | '.join(TOLD)} | points of the design's curve beaten | points of the found one's curve beaten |",
        f"| --- | --- |{' --- |' * len(TOLD)} --- | --- |",
    ]
    for group in (group for group in of.values() if group[0]["source"] != "design"):
        design = of[group[0]["size"]]
        told = [better(group, design, SHOWN[key], up=not key.startswith("FID")) for key in TOLD]
        curves = f"{dominated(design, group)} | {dominated(group, design)}"
        lines.append(f"| {BY[group[0]['source']][0]} | {group[0]['size']} | {' | '.join(told)} | {curves} |")
    return "\n".join(lines) + "\n"


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each student, size by size, the designs by hand first."""
    ordered = sorted(rows, key=lambda row: (row["size"], list(BY).index(row["source"])))
    return {name: [row for row in ordered if row["name"] == name] for name in dict.fromkeys(row["name"] for row in ordered)}


def costs(row: Row) -> str:
    return f"{row['params'] / 1e6:.2f} M | {row['macs_thop'] / 1e6:.1f} M"


def figure(rows: Sequence[Row], teacher: Row) -> Figure:
    """FID against CLIP score over guidance scales, one line for each seed."""
    sizes = sorted({row["size"] for row in rows})
    drawn = new_figure(4.2 * len(sizes), 4.6)
    title(
        drawn,
        f"FID and CLIP score after {UPDATES} updates",
        "A line for each seed over CFG scales: designs by hand orange, found by guided_mse blue, by images green, and with the "
        "smaller size purple; the teacher grey. Down and right is better.",
    )
    for i, (ax, size) in enumerate(zip(drawn.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True)):
        tidy(ax)
        for row in [*(row for row in rows if row["size"] == size), teacher]:
            points = [(d["clip_score"], fid_at(d)) for d in row["truth"]]
            colour = BY[row["source"]][1] if "source" in row else TEACHER_COLOUR
            ax.plot(*zip(*points, strict=True), color=colour, lw=1.4, marker=".", ms=4)
        ax.set_title(f"size of {size}", fontsize=9)
        ax.set_xlabel("CLIP score", fontsize=8.5)
        ax.set_yscale("log")
        if i == 0:
            ax.set_ylabel("FID", fontsize=8.5)
    drawn.subplots_adjust(left=0.07, right=0.99, top=0.8, bottom=0.12, wspace=0.06)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="print what would be written")
    args = parser.parse_args()
    rows = read(args.reports / "rows", UPDATES)
    if args.dry_run:
        print(f"proof.md and proof.png from {len(rows)} rows")
        return
    teacher = json.loads((args.reports / "teacher.json").read_text(encoding="utf-8"))
    table = [row for row in read(args.reports / "rows", TABLE_UPDATES) if row["seed"] == 0]
    (args.reports / "proof.md").write_text(markdown(rows, table, teacher), encoding="utf-8")
    (args.reports / "proof.png").write_bytes(png(figure(rows, teacher)))


if __name__ == "__main__":
    main()
