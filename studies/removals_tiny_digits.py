"""Does tiny-digits need its blocks? What each single removal does to FID and to the reading of captioned digits.

    python studies/removals_tiny_digits.py --out reports      # about 5 minutes on 2 cores

Every block is removed by itself, without retraining. Teacher and masks share captions and seeds; the reader is the independent
one of `quality_tiny_digits.py`, FID is of the shipped detector. An effect counts when the 95 % interval of its paired
difference to the teacher leaves zero out. Expected: at least half of the removals worsen FID or reading, some do neither, some
are ruinous, and the mid stage is among those that do. Measured: `reports/tiny-digits-removals.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_tiny_digits import cells, real_scenes, train_reader

from blockprune.data.digits import EMPTY
from blockprune.measures.fid_kid import fid_statistic
from blockprune.measures.intervals import Statistic, mean_statistic, paired_interval
from blockprune.model.architecture import Architecture
from blockprune.model.model import load_model
from blockprune.model.sampling import Protocol, batches_of
from blockprune.runs.provenance import made_with
from blockprune.stages import loading

Row = dict[str, Any]


class Scenes:
    """The same held-out captions and seeds, drawn by any architecture: statistics of their FID and of the digits read."""

    def __init__(self, n: int) -> None:
        self.model = load_model("tiny-digits")
        _, captions, self.digits = real_scenes(23, n)
        values = self.model.defaults
        self.protocol = Protocol(n, values["steps"], values["cfg_scale"], 5000, self.model.latent)
        self.conditions = self.model.encode(captions)
        self.judges = loading.judges_of(self.model, None, None, None, None)
        self.reader = train_reader(4000)

    def measure(self, arch: Architecture) -> dict[str, Statistic]:
        with self.model.removed(arch):
            numbers = batches_of(self.protocol.n_images, 64)
            batches = [self.model.draw(self.protocol, *self.conditions, index)[1] for index in numbers]
        images = torch.cat(batches)
        assert self.judges.detector
        assert self.judges.reference
        right = self.reader.predict(cells(images.permute(0, 2, 3, 1).numpy())).reshape(-1, 4) == self.digits
        named = self.digits != EMPTY
        read = (right & named).sum(1) / named.sum(1)
        return {"fid": fid_statistic(self.judges.detector(images), self.judges.reference), "read": mean_statistic(read)}


def compare(label: str, own: dict[str, Statistic], teacher: dict[str, Statistic], n: int) -> Row:
    """Values of both measures, and the paired interval of each difference to the teacher."""
    row: Row = {"removed": label, "n": n}
    for name, statistic in own.items():
        row[name] = float(statistic(np.arange(n)[None])[0])
        row[f"{name}_delta"] = paired_interval(statistic, teacher[name], n, seed=0)
    worse = row["fid_delta"][0] > 0 or row["read_delta"][1] < 0
    return row | {"worse": bool(worse and label != "full")}


def report(rows: list[Row]) -> str:
    removals = rows[1:]
    n_worse = sum(row["worse"] for row in removals)
    mid = next(row for row in removals if row["removed"] == "mid_block")
    lines = [
        "# What each block of tiny-digits is good for",
        "",
        f"{n_worse} of {len(removals)} single removals worsen FID or the reading of digits beyond the 95 % interval of the paired",
        f"difference ({rows[0]['n']} scenes each); the mid stage {'does' if mid['worse'] else 'does not'}.",
        "",
        "| removed | FID | difference | digits read | difference | worse |",
        "| --- | ---: | ---: | ---: | ---: | :---: |",
    ]
    for row in [rows[0], *sorted(removals, key=lambda r: r["fid"])]:
        fid, read = ("{:.2f} to {:.2f}".format(*row["fid_delta"]), "{:.3f} to {:.3f}".format(*row["read_delta"]))
        lines.append(
            f"| {row['removed']} | {row['fid']:.1f} | {fid} | {row['read']:.3f} | {read} | {'yes' if row['worse'] else ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    args = parser.parse_args()
    if args.dry_run:
        print(f"every block removed by itself, {args.n} images each")
        return
    scenes = Scenes(args.n)
    teacher = scenes.measure(Architecture())
    rows = [compare("full", teacher, teacher, args.n)]
    for label, arch in scenes.model.graph.units("block").items():
        rows.append(compare(label, scenes.measure(arch), teacher, args.n))
        print(json.dumps(rows[-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"rows": rows, "machine": made_with(torch.device("cpu"))}
    (args.out / "tiny-digits-removals.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.out / "tiny-digits-removals.md").write_text(report(rows), encoding="utf-8")
    print(report(rows))


if __name__ == "__main__":
    main()
