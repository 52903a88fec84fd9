"""After a longer training, is what `search` finds by default better than the designs by hand?

    python studies/after_training.py --out runs/after --reports reports/after-training --updates 50 200 600 2000 --seeds 0 1 2 \\
        --only bk-sdm-base "base-guided_mse, linear" bk-sdm-small "small-guided_mse, linear" bk-sdm-tiny "tiny-guided_mse, linear"
    (the same with --task-only --seeds 0)
    python studies/after_training_proof.py --reports reports/after-training

The first takes about two hours on two CPU cores, the second ten minutes; the last reads their rows and writes `proof.md` and
`proof.png` beside them. At each size the two have at most the parameters and the MACs of the design, the same training and the
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
from matplotlib.figure import Figure

from blockprune.reports.canvas import new_figure, png, tidy, title

UPDATES, TABLE_UPDATES = 2000, 600
COLOURS = {"design": "#d55e00", "search": "#0072b2", "teacher": "#5f6b73"}


def read(folder: Path, updates: int, kind: str = "") -> list[Row]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*-{updates}{kind}.json"))]


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
TOLD = ("digits read, CFG 3", "CLIP score, CFG 3", "FID, best CFG")


def over_seeds(rows: Sequence[Row], value: Value) -> str:
    """The mean, and the range over seeds."""
    values = [value(row) for row in rows]
    return f"{np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def better(ours: Sequence[Row], theirs: Sequence[Row], value: Value, up: bool) -> str:
    """Which has the better value with every seed."""
    mine, hand = ([value(row) * (1 if up else -1) for row in rows] for rows in (ours, theirs))
    return "found" if min(mine) > max(hand) else "design" if min(hand) > max(mine) else "not told apart"


def dominated(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[int, int]:
    """How many points of our mean FID-CLIP curve have a point of theirs with lower FID and higher CLIP score, and the other way."""
    curves = [np.array([[(fid_at(d), -d["clip_score"]) for d in row["truth"]] for row in rows]).mean(0) for rows in (ours, theirs)]
    a, b = (sum(any((other < point).all() for other in there) for point in here) for here, there in (curves, curves[::-1]))
    return a, b


def place(name: str, table: Sequence[Row]) -> str:
    """The place by digits read among all students of its size in the truth table."""
    mine = next(row for row in table if row["name"] == name)
    group = sorted((row for row in table if row["size"] == mine["size"]), key=TRUTHS["digits read"])
    return f"{group.index(mine) + 1} of {len(group)}"


def markdown(rows: Sequence[Row], alone: Sequence[Row], table: Sequence[Row], teacher: Row) -> str:
    lines = ["# What search finds by default against the designs by hand, after a longer training", ""]
    lines += section(rows, table, teacher)
    if alone:
        lines += ["", "## The same without distillation: trained on the images alone", "", *section(alone, table, teacher)]
    return "\n".join(lines) + "\n"


def section(rows: Sequence[Row], table: Sequence[Row], teacher: Row) -> list[str]:
    """The scores of one kind of training, and who is better."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"{UPDATES} updates of 16 images, {len(seeds)} seed{'s' * (len(seeds) > 1)} each; n = 512 at CFG 3 for digits and CLIP "
        "score, else 256. Mean, and range over seeds in brackets.",
        "Commands in `studies/after_training_proof.py`.",
        "",
        f"| student | parameters | MACs | {' | '.join(SHOWN)} | place in the table by digits read |",
        f"| --- | ---: | ---: |{' ---: |' * (len(SHOWN) + 1)}",
    ]
    shown = [f"{v(teacher):.3g}" for name, v in SHOWN.items() if name != "guided error"]
    lines.append(
        f"| the teacher | {teacher['params'] / 1e6:.2f} M | {teacher['macs_thop'] / 1e6:.1f} M | {' | '.join(shown)} | 0 | |"
    )
    names = dict.fromkeys(row["name"] for row in sorted(rows, key=lambda r: (r["size"], r["source"] != "design")))
    of = {name: [row for row in rows if row["name"] == name] for name in names}
    for name, group in of.items():
        cells = " | ".join(over_seeds(group, value) for value in SHOWN.values())
        costs = f"{group[0]['params'] / 1e6:.2f} M | {group[0]['macs_thop'] / 1e6:.1f} M"
        lines.append(f"| {name} | {costs} | {cells} | {place(name, table)} |")
    lines += [
        "",
        "| better in | digits read, CFG 3 | CLIP score, CFG 3 | FID, best CFG | points of the FID-CLIP curve beaten |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for name in (n for n, group in of.items() if group[0]["source"] == "design"):
        ours = next(group for group in of.values() if group[0]["size"] == name and group[0]["source"] != "design")
        told = [better(ours, of[name], SHOWN[key], up=not key.startswith("FID")) for key in TOLD]
        lost, won = dominated(ours, of[name])
        lines.append(f"| {name} | {' | '.join(told)} | {won} of the design's 4, {lost} of the found one's 4 |")
    return lines


def figure(rows: Sequence[Row], teacher: Row) -> Figure:
    """FID against CLIP score over guidance scales, one line for each seed."""
    sizes = sorted({row["size"] for row in rows})
    drawn = new_figure(4.2 * len(sizes), 4.6)
    title(
        drawn,
        f"FID and CLIP score after {UPDATES} updates",
        "Designs by hand orange, found blue, the teacher grey; a line for each seed over CFG scales; down and right is better.",
    )
    for i, (ax, size) in enumerate(zip(drawn.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True)):
        tidy(ax)
        for row in [*(row for row in rows if row["size"] == size), teacher]:
            kind = "teacher" if row is teacher else "design" if row["source"] == "design" else "search"
            points = [(d["clip_score"], fid_at(d)) for d in row["truth"]]
            ax.plot(*zip(*points, strict=True), color=COLOURS[kind], lw=1.4, marker=".", ms=4)
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
    alone = read(args.reports / "rows", UPDATES, "-task")
    (args.reports / "proof.md").write_text(markdown(rows, alone, table, teacher), encoding="utf-8")
    (args.reports / "proof.png").write_bytes(png(figure(rows, teacher)))


if __name__ == "__main__":
    main()
