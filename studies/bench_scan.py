"""Is `scan` faster than a plain loop over the masks, and where does the time of each go?

    python studies/bench_scan.py            # speed: some minutes on 2 cores, written to reports/bench-scan.json
    python studies/bench_scan.py memory     # a full-size SD v1 U-Net: about 5 minutes, 4.3 GB of disk, 8 GB of memory

Three comparisons on the built-in model, each in one run, the ways taking turns:

(a) the plain loop that a competent user of diffusers would write: for each mask the pipeline with a pruned U-Net, full batches, the
    images from memory into the detector, clean-fid's Fréchet distance to the reference's statistics, which are loaded once;
(b) `scan`: same masks, prompts, seeds, steps, guidance, batches, detector and reference, measuring FID with its intervals.
    Both must give the same FID. Expected: (a) takes at most 1.3 times as long, since in both over 90 % is U-Net forwards.
(c) `eps_mse` of every block with replayed upstream modules against the plain way, equal within rounding. Expected: at least 1.7
    times faster.
(d) The graph of SD v1 from its configuration, and the price of 100,000 random architectures of it. Expected: about a second, and
    less than ten.

(e) memory: peak resident memory of `blockprune scan` over three blocks of a random SD v1 at 32x32 latents, float32, on CPU.
Expected: at most the model's own size and 3 GiB.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockprune.measures.denoising import NoisySamples, denoising_errors
from blockprune.measures.images import Judges
from blockprune.measures.runner import Plan
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.model import Model, load_model
from blockprune.model.sampling import Protocol, batches_of
from blockprune.model.trace import trace
from blockprune.progress import Silent
from blockprune.runs.memory import MemoryRun
from blockprune.runs.provenance import made_with
from blockprune.stages import loading
from blockprune.stages.scan.scan import Scan
from blockprune.stages.scan.share import Share

MASKS = ("down_blocks.0.resnets.0", "down_blocks.2.attentions.1", "mid_block", "up_blocks.1.resnets.1", "up_blocks.3.attentions.2")
GIB = 2**30
BATCH = 64
TOLERANCE = 1e-3  # of FID: a pixel may round otherwise, and clean-fid takes the root of a matrix where we take eigenvalues
PARTS_OF = ("unet", "vae", "text", "detector", "rest")


class Stopwatch:
    """Seconds by name, spent inside methods while they are watched."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def watching(self, **methods: tuple[Any, str]) -> Iterator[None]:
        """`methods` are name=(object, its method)."""
        for name, (owner, method) in methods.items():
            setattr(owner, method, self._timed(name, getattr(owner, method)))
        try:
            yield
        finally:
            for owner, method in methods.values():
                delattr(owner, method)

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = method(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return out

        return timed

    def of(self, pipe: Any, detector: Any) -> Any:
        """Watches what a scan computes with."""
        return self.watching(
            unet=(pipe.unet, "forward"), vae=(pipe.vae, "decode"), text=(pipe.text_encoder, "forward"),
            detector=(detector, "features_and_probs"),
        )  # fmt: skip


def plain_loop(
    model: Model,
    archs: Mapping[str, Architecture],
    protocol: Protocol,
    prompts: list[str],
    judges: Judges,
    watch: Stopwatch,
) -> dict[str, float]:
    """FID by label: diffusers' own pipeline for each mask, clean-fid's distance to statistics that were made once."""
    from cleanfid.fid import frechet_distance

    teacher, pipe, scores = model.network, model.pipe, {}
    assert judges.detector is not None and judges.reference is not None
    for label, arch in archs.items():
        features = []
        with model.running(surgery.prune(teacher, arch) if arch else teacher), watch.of(pipe, judges.detector):
            for start in range(0, protocol.n_images, BATCH):
                index = range(start, min(start + BATCH, protocol.n_images))
                images = pipe(
                    [prompts[i] for i in index],
                    num_inference_steps=protocol.n_steps,
                    guidance_scale=protocol.cfg_scale,
                    generator=[torch.Generator().manual_seed(protocol.seed + i) for i in index],
                    output_type="np",
                ).images
                pixels = torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
                features.append(judges.detector.features_and_probs(pixels)[0])
        x = np.concatenate(features).astype(np.float64)
        mu, sigma = judges.reference.mu, judges.reference.sigma
        scores[label] = float(frechet_distance(x.mean(0), np.cov(x, rowvar=False), mu, sigma))
    return scores


def ours(
    model: Model,
    archs: Mapping[str, Architecture],
    protocol: Protocol,
    prompts: list[str],
    judges: Judges,
    watch: Stopwatch,
) -> dict[str, float]:
    plan = Plan(["fid"], protocol, prompts, judges=replace(judges, scorer=None), batch_size=BATCH)
    removals = {label: arch for label, arch in archs.items() if arch}
    with watch.of(model.pipe, judges.detector):
        run = MemoryRun("scan", {}, {})
        Share(Scan(model, removals, plan), run, Silent()).work()
        return {row["label"]: row["value"] or 0.0 for row in run.rows()}


def compare_scan(n_images: int, rounds: int) -> dict[str, Any]:
    model = load_model("tiny-digits")
    model.pipe.set_progress_bar_config(disable=True)
    protocol = Protocol(n_images, model.defaults["steps"], model.defaults["cfg_scale"], 0, model.latent)
    prompts = loading.prompts_of(None, model)
    prompts = [prompts[i % len(prompts)] for i in range(n_images)]
    archs = {"full": Architecture(), **{name: Architecture(frozenset({name})) for name in MASKS}}
    judges = loading.judges_of(model, None, None, None, None)
    ways = {"plain": plain_loop, "scan": ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    fids: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            watch, start = Stopwatch(), time.perf_counter()
            fids[name] = way(model, archs, protocol, prompts, judges, watch)
            seconds[name].append(time.perf_counter() - start)
            parts[name].append(watch.seconds | {"rest": seconds[name][-1] - sum(watch.seconds.values())})
        for label, fid in fids["plain"].items():
            assert abs(fid - fids["scan"][label]) <= TOLERANCE * fid, f"not the same FID of {label}: {fid}, {fids['scan'][label]}"
    ratios = np.divide(seconds["plain"], seconds["scan"])
    return {
        "masks": list(archs),
        "n_images": n_images,
        "steps": protocol.n_steps,
        "cfg_scale": protocol.cfg_scale,
        "batch_size": BATCH,
        "ratio": float(np.median(ratios)),
        "ratios": ratios.tolist(),
        "shares": {
            name: {
                part: float(np.median([p[part] / s for p, s in zip(parts[name], seconds[name], strict=True)])) for part in PARTS_OF
            }
            for name in ways
        },
        "fid": fids,
    }


def compare_replay(n: int, rounds: int) -> dict[str, Any]:
    model = load_model("tiny-digits")
    latents, captions = loading.clean_latents(model, "digits", n, 64) or (torch.empty(0), [])
    condition, _ = model.encode(captions)
    samples = NoisySamples(latents, condition, model.schedule, n, 0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        errors = {}
        for replay in (False, True):
            start = time.perf_counter()
            errors[replay] = [
                denoising_errors(model.network, model.graph, model.graph.units("block"), samples, index, replay=replay)
                for index in batches_of(samples.n, 64)
            ]
            seconds[replay].append(time.perf_counter() - start)
        for plain, fast in zip(errors[False], errors[True], strict=True):
            for label, errors_of in plain.items():
                np.testing.assert_allclose(np.sqrt(fast[label]), np.sqrt(errors_of), rtol=1e-3, atol=1e-4, err_msg=label)
    ratios = np.divide(seconds[False], seconds[True])
    return {
        "n": n,
        "blocks": len(model.graph.units("block")),
        "plain_s": seconds[False],
        "replay_s": seconds[True],
        "ratio": float(np.median(ratios)),
    }


def price_architectures(n: int) -> dict[str, Any]:
    """Seconds to trace SD v1 and to price `n` random architectures of it."""
    config = pretrained.configs("sd-v1-4").unet
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
        result[name] = PARTS[name](args) | {"machine": made_with(torch.device("cpu"))}
        print(name, json.dumps(result[name], indent=2))
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
