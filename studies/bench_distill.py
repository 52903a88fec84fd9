"""How fast is a distillation step, beside a plain loop written as the published scripts are?

    python studies/bench_distill.py --out reports                                       # tiny-digits on the CPU, about 3 minutes
    python studies/bench_distill.py --model /path/to/sd-v1 --resolution 512 --batch-size 8 --device cuda --mixed-precision bf16

The plain loop encodes images with the VAE and captions with the text encoder in every step, runs the teacher without autograd, and
keeps the default memory format. Ours reads encoded pairs (kept after their first use). Same model, architecture, batch, losses and
machine, in turns, several rounds; also the bare work: teacher forward, student forward and backward. Writes `bench-distill.json`:
images/s, the ratios by round, and on CUDA the peak memory. `--dry-run` prints the plan.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional

from blockprune import presets, workbench
from blockprune.cli.samples import provider_of, samples_of
from blockprune.distill import Distiller, Settings, student_of
from blockprune.recipe import read_recipe
from blockprune.sampling import encode

Step = Callable[[], None]


class Plain:
    """One update as the published scripts make it; the images are in memory already, as a loader's workers would have them."""

    def __init__(self, bench: Any, arch: Any, batch_size: int, taps: list[Any], precision: str) -> None:
        self.bench, self.batch_size, self.taps = bench, batch_size, taps
        self.teacher, self.device = copy.deepcopy(bench.pipe.unet), bench.pipe.device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.student = student_of(bench.pipe.unet, arch, "teacher", 0).to(self.device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-5, weight_decay=1e-2)
        self.seen: dict[tuple[str, str], torch.Tensor] = {}
        for who, unet in (("teacher", self.teacher), ("student", self.student)):
            modules = dict(unet.named_modules())
            for tap in taps:
                modules[getattr(tap, who)].register_forward_hook(self._keep(who, getattr(tap, who)))
        side = bench.latent[0] * bench.pipe.vae_scale_factor
        self.images = torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8)
        prompts = workbench.prompts_of(None, bench)
        self.captions = [prompts[i % len(prompts)] for i in range(batch_size)]

    def _keep(self, who: str, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen[who, name] = output[0] if isinstance(output, tuple) else output

        return hook

    def __call__(self) -> None:
        pipe, schedule = self.bench.pipe, self.bench.pipe.scheduler
        with torch.no_grad():
            pixels = self.images.to(self.device).float() / 127.5 - 1
            latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.sample() * pipe.vae.config.scaling_factor
            condition = encode(pipe, self.captions, self.bench.latent)[0]
        condition = {k: v.clone() if torch.is_tensor(v) else {n: t.clone() for n, t in v.items()} for k, v in condition.items()}
        noise = torch.randn_like(latents)
        t = torch.randint(0, schedule.config.num_train_timesteps, (self.batch_size,), device=self.device)
        noisy = schedule.add_noise(latents, noise, t)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            with torch.no_grad():
                expected = self.teacher(noisy, t, **condition, return_dict=False)[0]
            predicted = self.student(noisy, t, **condition, return_dict=False)[0]
        mse = functional.mse_loss
        loss = mse(predicted.float(), noise.float()) + mse(predicted.float(), expected.float())
        for tap in self.taps:
            loss = loss + mse(self.seen["student", tap.student].float(), self.seen["teacher", tap.teacher].float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def bare(run: Distiller) -> Step:
    """The teacher's forward, and the student's forward and backward, alone."""
    batch = run.sampler.batch(range(run.settings.batch_size), run.accelerator.device)

    def step() -> None:
        _, _, predicted, _ = run._both(batch)
        predicted.float().square().mean().backward()
        run.student.zero_grad()

    return step


def _advance(states: Iterator[Any]) -> None:
    next(states)


def timed(step: Step, n: int, device: torch.device) -> float:
    """Seconds of `n` calls."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    parser.add_argument("--model", default="tiny-digits")
    parser.add_argument("--arch", default="bk-sdm-base")
    parser.add_argument("--data", help="training pairs; default: the digits")
    parser.add_argument("--resolution")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="updates of each in a round")
    parser.add_argument("--dry-run", action="store_true", help="print what would be timed")
    args = parser.parse_args()
    if args.dry_run:
        print(f"{args.rounds} rounds of {args.steps} updates each of the plain loop, ours and the bare work")
        return
    device = torch.device(args.device)
    bench = workbench.load_bench(args.model, args.resolution, device, torch.float32)
    arch = presets.parse(args.arch, bench.graph)
    samples = samples_of(bench, provider_of(bench, args.data), 0)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=args.mixed_precision)
    settings = Settings(args.batch_size, channels_last=device.type == "cuda")
    student = student_of(bench.pipe.unet, arch, "teacher", 0)
    teacher = copy.deepcopy(bench.pipe.unet)
    run = Distiller(accelerator, teacher, student, bench.graph, arch, samples, read_recipe("bk-sdm"), settings)
    n = args.rounds * args.steps + 2
    samples.data.latents([samples.index(g) for g in range(n * args.batch_size)], [False] * n * args.batch_size, torch.zeros(()))
    states = run.run(n)
    plain = Plain(bench, arch, args.batch_size, run.taps, args.mixed_precision)
    ways: dict[str, Step] = {"plain": plain, "ours": partial(_advance, states), "bare": bare(run)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in ways.values():
        timed(step, 2, device)
    for _ in range(args.rounds):
        for name, step in ways.items():
            seconds[name].append(timed(step, args.steps, device))
    rates = {name: [args.steps * args.batch_size / s for s in rows] for name, rows in seconds.items()}
    result = {
        "model": args.model,
        "arch": args.arch,
        "batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        **workbench.made_with(device),
        "images_per_s": {name: float(np.median(rows)) for name, rows in rates.items()},
        "ours_over_plain": [o / p for o, p in zip(rates["ours"], rates["plain"], strict=True)],
        "time_over_bare": [o / b for o, b in zip(seconds["ours"], seconds["bare"], strict=True)],
    }
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench-distill.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
