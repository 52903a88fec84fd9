"""Does taking blocks out speed up every runtime, or only PyTorch?

    python studies/bench_runtimes.py --out reports      # about ten minutes on two CPU cores, 24 GiB of memory for SD v1

Times a U-Net step of the teacher and of `bk-sdm-small` in each runtime, all in turn in one run, with random weights in float32 on
the CPU: tiny-digits at its own size, and SD v1 at small latents. Writes `runtimes.md` and `runtimes.json`. `--model` and
`--runtime` choose; runtimes that are not installed are left out, and named in the JSON. `--dry-run` prints the plan.
Expected: the same ratio of student to teacher everywhere, within a tenth.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from blockprune.errors import UserError
from blockprune.export.runtimes.network import check_runtime, time_runtimes
from blockprune.model import pretrained
from blockprune.model.presets import preset

ARCH = "bk-sdm-small"
CASES = {"tiny-digits": (16, 16), "sd-v1-4": (16, 16)}
RUNTIMES = ("torch", "torch-compile", "onnxruntime", "openvino", "aot-inductor")
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


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | runtime | teacher, ms | student, ms | student / teacher | 95 % interval |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for model, rows in results.items():
        for name, row in rows.items():
            ms = [f"{1000 * row[who]['median_s']:.1f}" for who in ("teacher", "student")]
            r = row["ratio"]
            lines.append(f"| {model} | {name} | {ms[0]} | {ms[1]} | {r['value']:.3f} | {r['low']:.3f} to {r['high']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=tuple(CASES), action="append", help="only this; repeatable")
    parser.add_argument("--runtime", choices=RUNTIMES, action="append", help="only this; repeatable")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args()
    models, (here, missing) = args.model or list(CASES), installed()
    here = [name for name in here if name in (args.runtime or RUNTIMES)]
    if args.dry_run:
        print(f"{len(models)} models x {len(RUNTIMES)} runtimes, {args.rounds} rounds, teacher and {ARCH} in turn")
        return
    path = args.out / "runtimes.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": {}}
    for model in models:
        configs = pretrained.configs(model)
        known["results"][model] = time_runtimes(configs, preset(ARCH), CASES[model], 2, here, args.rounds)
        known |= {"arch": ARCH, "latents": CASES, "threads": torch.get_num_threads(), "machine": processor(), "missing": missing}
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(table({model: known["results"][model]}), flush=True)
    text = (
        f"# A U-Net step outside PyTorch\n\nTeacher and `{ARCH}`, random weights, float32, batch 2, latents of 16 x 16; "
        f"{known['machine']}, {known['threads']} threads. Every row of a model was measured in turn in one run.\n"
        f"`{command(models, here)}`\n\n{table(known['results'])}\n"
    )
    (args.out / "runtimes.md").write_text(text, encoding="utf-8")


def command(models: list[str], runtimes: list[str]) -> str:
    """What was run for these models and runtimes."""
    chosen = [*(f"--model {name}" for name in models), *(f"--runtime {name}" for name in runtimes)]
    return " ".join(["python studies/bench_runtimes.py --out reports", *chosen])


def processor() -> str:
    """The processor's name, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
