"""What does it save that candidates of a recovery share what their teacher says?

    python studies/bench_recover.py --out reports      # tiny-digits, about 3 minutes on one core

Distils the three BK-SDM designs one after another for the same updates, as `search --recover` does: once with the teacher's answers
kept for the next one, and once, the plain way, with the teacher run for each. Both encode the images once. In turns, several
rounds. Writes `bench-recover.json`: seconds of both, their ratio by round, and that the students are the same. `--dry-run` prints
the plan.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from blockprune.model import presets
from blockprune.model.model import load_model
from blockprune.runs.provenance import made_with
from blockprune.stages.train.distill import TeacherCache
from blockprune.stages.train.recover import Recovery

DESIGNS = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")


def seconds(updates: int, batch_size: int, shared: bool) -> tuple[float, list[dict[str, torch.Tensor]]]:
    """How long all designs take, and their weights."""
    model = load_model("tiny-digits")
    cache = TeacherCache() if shared else TeacherCache(keep_bytes=0)
    recovery, students = Recovery(model, None, batch_size, 0, cache=cache), list[dict[str, torch.Tensor]]()
    begun = time.perf_counter()
    for name in DESIGNS:
        students.append(recovery.student(presets.parse(name, model.graph), updates).state_dict())
    return time.perf_counter() - begun, students


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    args = parser.parse_args()
    if args.dry_run:
        print(f"{args.rounds} rounds of {len(DESIGNS)} designs x {args.updates} updates x {args.batch_size} images, both ways")
        return
    rounds = list[dict[str, float]]()
    for _ in range(args.rounds):
        (shared, ours), (plain, theirs) = (seconds(args.updates, args.batch_size, way) for way in (True, False))
        assert all(torch.equal(a[k], b[k]) for a, b in zip(ours, theirs, strict=True) for k in a)
        rounds.append({"shared_s": shared, "plain_s": plain, "ratio": plain / shared})
        print(rounds[-1], flush=True)
    found: dict[str, Any] = {"updates": args.updates, "batch_size": args.batch_size, "designs": DESIGNS, "rounds": rounds}
    (args.out / "bench-recover.json").write_text(
        json.dumps(found | made_with(torch.device("cpu")), indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
