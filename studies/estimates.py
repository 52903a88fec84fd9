"""How near are the time, the memory and the disk that `--dry-run` says to what a run takes?

    OMP_NUM_THREADS=1 python studies/estimates.py

runs each command in miniature on the built-in model, each in a process of its own, and prints what was said and what it took. Time:
seconds of the process on the processor, not of the clock, so that other work on the machine does not count; what is said is
measured the same way, just before. Memory: by how much the peak of the process grew beyond one that had drawn an image and
loaded the libraries of statistics, searches and figures (62 MiB, which are not said), plus the weights of the model, which that one
held as well. Disk: bytes of the run directory with its report. About ten minutes.
Expected: times within a factor 1.5, but for runs of seconds; memory, too, but for runs so small that what never grows outweighs it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

import blockprune as bp
from blockprune.cost.estimate import Estimate
from blockprune.request import Request
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.outline import outline_of
from blockprune.stages.personalise.request import PersonaliseRequest
from blockprune.stages.scan.request import ScanRequest
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.train.request import TrainRequest

MIB = 2**20
LIBRARIES = ("optuna", "matplotlib.pyplot", "sklearn.linear_model", "scipy.linalg", "cleanfid.fid", "pandas")


def requests(folder: Path) -> dict[str, tuple[Callable[..., Any], Request]]:
    """Each command in miniature; the subject's images go to `folder`."""
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(folder / f"{i}.png")
    measures = ("eps_mse", "guided_mse", "clip_score")
    few: dict[str, Any] = {"unit": "stage", "steps": 3, "eps_samples": 32}
    search = SearchRequest(**few, budget=("75%params",), trials=16, n_images=4, finalists=1)
    subject = PersonaliseRequest(instance_data_dir=str(folder), instance_prompt="bold upright: sks top left")
    return {
        "scan --unit stage": (bp.scan, ScanRequest(**few, measures=measures, n_images=8)),
        "search --objective guided_mse": (bp.search, replace(search, objective=("guided_mse",))),
        "search": (bp.search, replace(search, n_images=16)),
        "distill --arch bk-sdm-small": (bp.distill, TrainRequest(arch="bk-sdm-small", max_train_steps=60)),
        "distill --train-batch-size 256": (bp.distill, TrainRequest(arch="bk-sdm-small", max_train_steps=4, train_batch_size=256)),
        "evaluate --arch bk-sdm-small": (bp.evaluate, EvaluateRequest(arch="bk-sdm-small", n_images=256)),
        "evaluate --batch-size 512": (bp.evaluate, EvaluateRequest(n_images=512, steps=(1,), batch_size=512)),
        "personalise": (bp.personalise, replace(subject, max_train_steps=30, train_batch_size=4, n_images=16)),
    }


def taken(name: str, folder: Path) -> tuple[float, int, int]:
    """Seconds, bytes of memory and bytes on the disk that a command takes, run in this process."""
    bp.load_pipeline("tiny-digits")("one top left", num_inference_steps=1)
    for library in LIBRARIES:
        import_module(library)
    run, request = requests(folder)[name]
    before, begun = _peak_bytes(), time.process_time()
    result = run(request=request, out=folder / "run", progress=bp.Silent())
    seconds, grown = time.process_time() - begun, _peak_bytes() - before
    result.save(folder / "run")
    disk = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
    return seconds, grown + outline_of("tiny-digits").weight_bytes(4), disk


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="commands by the beginning of their names")
    parser.add_argument("--dry-run", action="store_true", help="print the passes of each, reckoned for a device that is not here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        chosen = {n: r for n, (_, r) in requests(Path(scratch)).items() if not args.only or n.startswith(tuple(args.only))}
        if args.dry_run:
            for name, request in chosen.items():
                print(f"{name}: {bp.estimate(request, 'T4 fp16').work.n_passes:,} passes")
            return
        print("| command | passes | said, s | taken, s | said / taken | memory, MiB | taken | disk, MiB | taken |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for name, request in chosen.items():
            with mock.patch("time.perf_counter", time.process_time):
                said = bp.estimate(request)
            print(_row(name, said), flush=True)


def _row(name: str, said: Estimate) -> str:
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as process:
        seconds, memory, disk = process.submit(taken, name, Path(folder)).result()
    passes = f"{'at most ' * said.work.at_most}{said.work.n_passes:,}"
    time_s = f"{said.total_s:.0f} | {seconds:.0f} | {said.total_s / seconds:.2f}"
    sizes = " | ".join(f"{n / MIB:.3g}" for n in (said.work.mem_bytes, memory, said.work.disk_bytes, disk))
    return f"| `{name}` | {passes} | {time_s} | {sizes} |"


if __name__ == "__main__":
    main()
