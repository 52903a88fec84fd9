"""Does taking blocks out speed up every runtime, or only PyTorch?

    OMP_NUM_THREADS=1 python studies/bench_runtimes.py --out reports      # about half an hour on two CPU cores

Times a U-Net step of the teacher and of `bk-sdm-small` in each runtime with random weights in float32 on the CPU, batch 2, teacher
and student in turn: tiny-digits at its own size, all runtimes in one run; SD v1 at a small latent, each runtime in a run of its own
but for the two of PyTorch, which share their weights: the two networks take 5.4 GB in each other one. Writes `runtimes.md` and
`runtimes.json` after every run; `--model` and `--runtime` choose, and what was measured before stays. Runtimes that are not
installed are left out, and named in the JSON. `--dry-run` prints the plan. Expected: about the same ratio everywhere.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from blockprune.errors import UserError
from blockprune.export.runtimes import COMPILED, TORCH
from blockprune.export.runtimes.network import check_runtime, time_runtimes
from blockprune.model import pretrained
from blockprune.model.presets import preset
from blockprune.runs.atomic import writing

ARCH = "bk-sdm-small"
LATENTS = {"tiny-digits": (16, 16), "sd-v1-4": (16, 16)}
RUNTIMES = (TORCH, COMPILED, "onnxruntime", "openvino", "aot-inductor")  # an exported program computes as PyTorch does
LARGE = {"sd-v1-4"}  # models that are measured in one runtime at a time, for their memory
BATCH_SIZE = 2  # one image with guidance
ROUNDS = 10


def installed() -> tuple[list[str], list[str]]:
    """The runtimes that are here, and a line for each that is not."""
    here, missing = [], []
    for name in RUNTIMES:
        try:
            check_runtime(name)
            here.append(name)
        except UserError as err:
            missing.append(str(err))
    return here, missing


def runs(model: str, runtimes: list[str]) -> Iterator[list[str]]:
    """The runtimes that are measured in turn with one another, run by run."""
    apart = [name for name in runtimes if model in LARGE and name not in (TORCH, COMPILED)]
    if together := [name for name in runtimes if name not in apart]:
        yield together
    yield from ([name] for name in apart)


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | run | runtime | teacher, ms | student, ms | student / teacher | 95 % interval |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for model, measured in results.items():
        for run, rows in enumerate(measured.values(), 1):
            for name, row in rows.items():
                ms = [f"{1000 * row[who]['median_s']:.1f}" for who in ("teacher", "student")]
                r = row["ratio"]
                lines.append(
                    f"| {model} | {run} | {name} | {ms[0]} | {ms[1]} | {r['value']:.3f} | {r['low']:.3f} to {r['high']:.3f} |"
                )
    return "\n".join(lines)


def page(known: dict[str, Any]) -> str:
    """The report on all that was measured."""
    size = ", ".join(f"{model} {h} x {w}" for model, (h, w) in LATENTS.items())
    return (
        f"# A U-Net step outside PyTorch\n\nTeacher and `{ARCH}`, random weights, float32, batch {BATCH_SIZE}; latents: {size}; "
        f"{known['machine']}, {known['threads']} thread(s), other work beside. What has the same number was measured in turn in "
        "one run: compare ratios, and times only within a run.\n"
        f"`OMP_NUM_THREADS={known['threads']} python studies/bench_runtimes.py --out reports`\n\n{table(known['results'])}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=tuple(LATENTS), action="append", help="only this; repeatable")
    parser.add_argument("--runtime", choices=RUNTIMES, action="append", help="only this; repeatable")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args()
    models, (here, missing) = args.model or list(LATENTS), installed()
    here = [name for name in here if name in (args.runtime or RUNTIMES)]
    if args.dry_run:
        print(f"{len(models)} models x {len(RUNTIMES)} runtimes, {args.rounds} rounds, teacher and {ARCH} in turn")
        return
    path = args.out / "runtimes.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": {}}
    known |= {"arch": ARCH, "latents": LATENTS, "threads": torch.get_num_threads(), "machine": processor(), "missing": missing}
    for model in models:
        configs = pretrained.configs(model)
        for names in runs(model, here):
            rows = time_runtimes(configs, preset(ARCH), LATENTS[model], BATCH_SIZE, names, args.rounds)
            known["results"].setdefault(model, {})[" ".join(names)] = rows
            print(table({model: {"": rows}}), flush=True)
            for file, text in ((path, json.dumps(known, indent=1) + "\n"), (args.out / "runtimes.md", page(known))):
                with writing(file) as part:
                    part.write_text(text, encoding="utf-8")


def processor() -> str:
    """The processor's name, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
