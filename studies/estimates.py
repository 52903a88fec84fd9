"""How near is the time that `--dry-run` says to what a run takes?

    OMP_NUM_THREADS=1 python studies/estimates.py

runs each command in miniature on the built-in model, in memory, and prints what was said before and what it took: seconds of this
process on the processor, not of the clock, so that other work on the machine does not count. What is said is measured the same way,
just before. About five minutes. Expected: ratios between 0.67 and 1.5; a search takes less than is said, which is the most.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from PIL import Image

import blockprune as bp
from blockprune.request import Request
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.personalise.request import PersonaliseRequest
from blockprune.stages.scan.request import ScanRequest
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.train.request import TrainRequest


def requests(folder: Path) -> dict[str, tuple[Callable[..., object], Request]]:
    """Each command in miniature; the subject's images go to `folder`."""
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(folder / f"{i}.png")
    measures = ("eps_mse", "guided_mse", "clip_score")
    subject = PersonaliseRequest(instance_data_dir=str(folder), instance_prompt="bold upright: sks top left")
    return {
        "scan --unit stage": (bp.scan, ScanRequest(unit="stage", measures=measures, n_images=8, steps=3, eps_samples=32)),
        "search --budget 75%params": (
            bp.search,
            SearchRequest(
                unit="stage",
                budget=("75%params",),
                objective=("guided_mse",),
                trials=16,
                n_images=4,
                steps=3,
                eps_samples=32,
                finalists=1,
            ),
        ),
        "distill --arch bk-sdm-small": (bp.distill, TrainRequest(arch="bk-sdm-small", max_train_steps=12)),
        "evaluate --arch bk-sdm-small": (bp.evaluate, EvaluateRequest(arch="bk-sdm-small", n_images=64, steps=(5,))),
        "personalise": (bp.personalise, replace(subject, max_train_steps=30, train_batch_size=4, n_images=16)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the passes of each, reckoned for a device that is not here")
    if parser.parse_args().dry_run:
        with tempfile.TemporaryDirectory() as folder:
            for name, (_, request) in requests(Path(folder)).items():
                print(f"{name}: {bp.estimate(request, 'T4 fp16').work.n_passes:,} passes")
        return
    print("| command | passes | said, s | taken, s | said / taken |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (run, request) in requests(Path(folder)).items():
            with mock.patch("time.perf_counter", time.process_time):
                said = bp.estimate(request)
            begun = time.process_time()
            run(request=request, progress=bp.Silent())
            taken = time.process_time() - begun
            passes = f"{'at most ' * said.work.at_most}{said.work.n_passes:,}"
            print(f"| `{name}` | {passes} | {said.total_s:.0f} | {taken:.0f} | {said.total_s / taken:.2f} |", flush=True)


if __name__ == "__main__":
    main()
