"""How much faster is `scan` than the straightforward way, and where does its time go?

    python studies/bench_scan.py            # speed: about 12 minutes on 2 cores, written to reports/bench-scan.json
    python studies/bench_scan.py memory     # a full-size SD v1 U-Net: about 5 minutes, 4.3 GB of disk, 8 GB of memory

Three comparisons on the built-in model, each in one run, the ways taking turns:

(a) the straightforward way: for each mask a deep copy of the diffusers pipeline with the block removed, its images as PNG files,
    `cleanfid.fid.compute_fid` between that folder and a folder of the real images;
(b) `scan`: same masks, prompts, seeds, steps, guidance and reference images, measuring FID.
    Expected: (b) at least 3 times (a)'s images/s, and at least 85 % of (b)'s time inside U-Net forwards.
(c) `eps_mse` of every block with replayed upstream modules against the plain way, equal within rounding. Expected: 1.7 times
    as fast at least.
(d) The graph of SD v1 from its configuration, and the price of 100,000 random architectures of it. Expected: about a second, and
    less than ten.

(e) memory: peak resident memory of `blockprune scan` over three blocks of a random SD v1 at 32x32 latents, float32, on CPU.
Expected: at most the model's own size and 3 GiB.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from blockprune import checkpoints, features, surgery, workbench
from blockprune.arch import Architecture
from blockprune.denoising import NoisySamples, denoising_errors
from blockprune.digits import DigitScenes
from blockprune.records import Score
from blockprune.sampling import Protocol, encode
from blockprune.scan import Scan
from blockprune.scoring import Plan
from blockprune.trace import trace

MASKS = ("down_blocks.0.resnets.0", "down_blocks.2.attentions.1", "mid_block", "up_blocks.1.resnets.1", "up_blocks.3.attentions.2")
GIB = 2**30
N_REAL = 2000  # as many as the built-in reference was made from


class Stopwatch:
    """Seconds spent inside the forward of a module while it is watched."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watching(self, module: torch.nn.Module) -> Iterator[None]:
        forward = module.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = forward(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return out

        module.forward = timed
        try:
            yield
        finally:
            module.forward = forward


def write_real(folder: Path, n: int) -> None:
    for i, (image, _, _) in enumerate(DigitScenes("held-out", 0, n)):
        Image.fromarray(image).save(folder / f"{i:05d}.png")


def straightforward(
    bench: workbench.Bench, archs: Mapping[str, Architecture], protocol: Protocol, prompts: list[str], real: Path
) -> dict[str, float]:
    """FID by label: a deep copy per mask, PNG files, clean-fid on folders."""
    from cleanfid.fid import compute_fid

    detector = features.load_detector("tiny-digits")

    def extract(batch: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.interpolate(batch, size=(32, 32), mode="area")
        return torch.from_numpy(detector(small.round().to(torch.uint8)))

    scores = {}
    for label, arch in archs.items():
        pipe = copy.deepcopy(bench.pipe)
        pipe.unet = surgery.prune(pipe.unet, arch)
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, protocol.n_images, 64):
                index = range(start, min(start + 64, protocol.n_images))
                generators = [torch.Generator().manual_seed(protocol.seed + i) for i in index]
                images = pipe(
                    [prompts[i] for i in index],
                    num_inference_steps=protocol.n_steps,
                    guidance_scale=protocol.cfg_scale,
                    generator=generators,
                ).images
                for i, image in zip(index, images, strict=True):
                    image.save(f"{folder}/{i:05d}.png")
            scores[label] = float(
                compute_fid(
                    folder, str(real), mode="clean", num_workers=0, batch_size=64, device=torch.device("cpu"),
                    custom_feat_extractor=extract, use_dataparallel=False, verbose=False,
                )
            )  # fmt: skip
    return scores


def ours(
    bench: workbench.Bench, archs: Mapping[str, Architecture], protocol: Protocol, prompts: list[str], watch: Stopwatch
) -> dict[str, float]:
    judges = workbench.judges_of(bench, None, None, None, None)
    plan = Plan(["fid"], protocol, prompts, judges=judges, batch_size=64)
    removals = {label: arch for label, arch in archs.items() if arch}
    with watch.watching(bench.pipe.unet):
        return {r.label: r.value or 0.0 for r in Scan(bench.pipe, bench.graph, removals, plan) if isinstance(r, Score)}


def compare_scan(n_images: int, rounds: int) -> dict[str, Any]:
    bench = workbench.load_bench("tiny-digits", None, torch.device("cpu"), torch.float32)
    protocol = Protocol(n_images, bench.defaults["steps"], bench.defaults["cfg_scale"], 0, bench.latent)
    prompts = workbench.prompts_of(None, bench)
    prompts = [prompts[i % len(prompts)] for i in range(n_images)]
    archs = {"full": Architecture(), **{name: Architecture(frozenset({name})) for name in MASKS}}
    drawn, shares = len(archs) * n_images, list[float]()
    times: dict[str, list[float]] = {"a": [], "b": []}
    with tempfile.TemporaryDirectory() as real:
        write_real(Path(real), N_REAL)
        for _ in range(rounds):
            start = time.perf_counter()
            fid_a = straightforward(bench, archs, protocol, prompts, Path(real))
            times["a"].append(time.perf_counter() - start)
            watch, start = Stopwatch(), time.perf_counter()
            fid_b = ours(bench, archs, protocol, prompts, watch)
            times["b"].append(time.perf_counter() - start)
            shares.append(watch.seconds / times["b"][-1])
    ratios = np.divide(times["a"], times["b"])
    return {
        "masks": list(archs),
        "n_images": n_images,
        "steps": protocol.n_steps,
        "cfg_scale": protocol.cfg_scale,
        "images_per_s_a": float(np.median(drawn / np.array(times["a"]))),
        "images_per_s_b": float(np.median(drawn / np.array(times["b"]))),
        "ratio": float(np.median(ratios)),
        "ratios": ratios.tolist(),
        "unet_share_b": float(np.median(shares)),
        "fid_a": fid_a,
        "fid_b": fid_b,
    }


def compare_replay(n: int, rounds: int) -> dict[str, Any]:
    bench = workbench.load_bench("tiny-digits", None, torch.device("cpu"), torch.float32)
    latents, captions = workbench.clean_latents(bench, "digits", n, 64) or (torch.empty(0), [])
    condition, _ = encode(bench.pipe, captions, bench.latent)
    samples = NoisySamples(latents, condition, DDPMScheduler.from_config(bench.pipe.scheduler.config), n, 0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        errors = {}
        for replay in (False, True):
            start = time.perf_counter()
            errors[replay] = list(
                denoising_errors(bench.pipe.unet, bench.graph, bench.graph.units("block"), samples, 64, replay=replay)
            )
            seconds[replay].append(time.perf_counter() - start)
        for plain, fast in zip(errors[False], errors[True], strict=True):
            for label, errors_of in plain.items():
                np.testing.assert_allclose(np.sqrt(fast[label]), np.sqrt(errors_of), rtol=1e-3, atol=1e-4, err_msg=label)
    ratios = np.divide(seconds[False], seconds[True])
    return {
        "n": n,
        "blocks": len(bench.graph.units("block")),
        "plain_s": seconds[False],
        "replay_s": seconds[True],
        "ratio": float(np.median(ratios)),
    }


def price_architectures(n: int) -> dict[str, Any]:
    """Seconds to trace SD v1 and to price `n` random architectures of it."""
    config = checkpoints.configs("sd-v1-4").unet
    trace(config, (8, 8))  # imports and caches
    start = time.perf_counter()
    graph = trace(config)
    traced = time.perf_counter()
    blocks, draw = [next(iter(a)) for a in graph.units("block").values()], random.Random(0)
    for _ in range(n):
        graph.cost(Architecture(frozenset(draw.sample(blocks, draw.randint(1, 12)))))
    return {"graph_s": traced - start, "n": n, "price_s": time.perf_counter() - traced}


def measure_memory() -> dict[str, Any]:
    """Peak resident memory of a scan of a random SD v1, in a process of its own."""
    from sd_folder import write_random_pipeline

    with tempfile.TemporaryDirectory() as folder:
        n_bytes = write_random_pipeline("sd-v1-4", Path(folder) / "sd")
        args = ["--arch", "down_blocks.0.attentions.1", "--arch", "mid_block", "--arch", "up_blocks.3.resnets.2"]
        args += [
            "--measures",
            "latency,eps_mse",
            "--resolution",
            "256",
            "--n-images",
            "2",
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--eps-samples",
            "4",
        ]
        command = [sys.executable, "-m", "blockprune", "scan", "--model", f"{folder}/sd", *args, "--out", f"{folder}/run"]
        subprocess.run(command, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"model_gib": n_bytes / GIB, "peak_gib": peak / GIB, "above_model_gib": (peak - n_bytes) / GIB}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "scan": lambda args: compare_scan(args.n_images, args.rounds),
    "replay": lambda args: compare_replay(256, args.rounds),
    "pricing": lambda args: price_architectures(100_000),
    "memory": lambda args: measure_memory(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"what to measure: {', '.join(PARTS)}; default: all but memory")
    parser.add_argument("--out", type=Path, default=Path("reports"))
    parser.add_argument("--n-images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    args = parser.parse_args()
    parts = args.parts or ("scan", "replay", "pricing")
    if args.dry_run:
        print(f"{', '.join(parts)}: {args.rounds} rounds, {args.n_images} images")
        return
    file = args.out / "bench-scan.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in parts:
        result[name] = PARTS[name](args) | {"machine": workbench.made_with(torch.device("cpu"))}
        print(name, json.dumps(result[name], indent=2))
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
