"""How fast is a distillation step, beside a plain loop written as the published scripts are?

    python studies/bench_distill.py --compile --out reports                  # tiny-digits on the CPU, about 8 minutes, 5 to compile
    python studies/bench_distill.py --model /path/to/sd-v1 --resolution 512 --batch-size 8 --device cuda --mixed-precision bf16

The plain loop encodes images with the VAE and captions with the text encoder in every step, runs the teacher without autograd, and
keeps the default memory format; once as it is and once with gradient checkpointing, which the published commands switch on. Ours
reads encoded pairs (kept after their first use) and keeps channels last; `--compile` adds it with torch.compile. Same model,
architecture, batch, losses and machine, in turns, several rounds; also the bare work: teacher forward, student forward and
backward, channels last. Writes `bench-distill.json`: images/s, ratios to the plain loop by round, and what an update allocates
at its peak. `--dry-run` prints the plan.
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

from blockprune.cost.latency import peak_bytes
from blockprune.model import presets
from blockprune.model.model import Model, load_model
from blockprune.runs.provenance import made_with
from blockprune.stages import loading
from blockprune.stages.train.distill import Distiller, student_of
from blockprune.stages.train.recipe import read_recipe
from blockprune.stages.train.samples import Batch, Sampler, data_of, provider_of, samples_of
from blockprune.stages.train.trainer import Settings

Step = Callable[[], None]


class Plain:
    """One update as the published scripts make it; the images are in memory already, as a loader's workers would have them."""

    def __init__(self, model: Model, arch: Any, batch_size: int, taps: list[Any], precision: str, checkpointing: bool) -> None:
        self.model, self.batch_size, self.taps = model, batch_size, taps
        self.teacher, self.device = copy.deepcopy(model.network), model.device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.student = student_of(model.network, arch, "teacher", 0).to(self.device)
        if checkpointing:
            self.student.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-5, weight_decay=1e-2)
        self.seen: dict[tuple[str, str], torch.Tensor] = {}
        for who, unet in (("teacher", self.teacher), ("student", self.student)):
            modules = dict(unet.named_modules())
            for tap in taps:
                modules[getattr(tap, who)].register_forward_hook(self._keep(who, getattr(tap, who)))
        self.images = torch.randint(256, (batch_size, 3, *model.pixels), dtype=torch.uint8)
        prompts = loading.prompts_of(None, model)
        self.captions = [prompts[i % len(prompts)] for i in range(batch_size)]

    def _keep(self, who: str, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen[who, name] = output[0] if isinstance(output, tuple) else output

        return hook

    def __call__(self) -> None:
        pipe, schedule = self.model.pipe, self.model.pipe.scheduler
        with torch.no_grad():
            pixels = self.images.to(self.device).float() / 127.5 - 1
            latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.sample() * pipe.vae.config.scaling_factor
            condition = self.model.encode(self.captions)[0]
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


class Bare:
    """The teacher's forward, and the student's forward and backward, alone."""

    def __init__(self, model: Model, arch: Any, batch: Batch) -> None:
        self.teacher = copy.deepcopy(model.network)
        self.student = student_of(model.network, arch, "teacher", 0).to(model.device)
        for unet in (self.teacher, self.student):
            unet.to(memory_format=torch.channels_last)
        self.kwargs = {"sample": batch.noisy, "timestep": batch.timesteps, **batch.condition, "return_dict": False}

    def __call__(self) -> None:
        with torch.no_grad():
            self.teacher(**self.kwargs)
        self.student(**self.kwargs)[0].float().square().mean().backward()
        self.student.zero_grad()


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
    parser.add_argument("--data", help="training pairs; default: the model's own")
    parser.add_argument("--resolution")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="updates of each in a round")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile, too")
    parser.add_argument("--dry-run", action="store_true", help="print what would be timed")
    args = parser.parse_args()
    if args.dry_run:
        print(f"{args.rounds} rounds of {args.steps} updates each of the plain loop, ours and the bare work")
        return
    device = torch.device(args.device)
    model = load_model(args.model, args.resolution, device)
    ways = ways_of(model, args)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in ways.values():
        timed(step, 2, device)
    for _ in range(args.rounds):
        for name, step in ways.items():
            seconds[name].append(timed(step, args.steps, device))
    images = args.steps * args.batch_size
    result = {
        "model": args.model,
        "arch": args.arch,
        "batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        **made_with(device),
        "images_per_s": {name: float(np.median([images / s for s in rows])) for name, rows in seconds.items()},
        "over_plain": {name: [p / s for p, s in zip(seconds["plain"], rows, strict=True)] for name, rows in seconds.items()},
        "peak_bytes": {name: peak_bytes(step, device) for name, step in ways.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench-distill.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def ways_of(model: Model, args: argparse.Namespace) -> dict[str, Step]:
    """Every way to make an update, by name; each with its own teacher, student and optimiser."""
    arch = presets.parse(args.arch, model.graph)
    samples = samples_of(model, provider_of(model, data_of(model.name, model.defaults, args.data)), 0)
    n = args.rounds * args.steps + 3
    samples.data.latents([samples.index(g) for g in range(n * args.batch_size)], [False] * n * args.batch_size, torch.zeros(()))
    runs = {"ours": _ours(model, arch, samples, args, "")}
    if args.compile:
        runs["ours, compiled"] = _ours(model, arch, samples, args, "inductor")
    kwargs = model, arch, args.batch_size, runs["ours"].taps, args.mixed_precision
    plain = {"plain": Plain(*kwargs, checkpointing=False), "plain, gradient checkpointing": Plain(*kwargs, checkpointing=True)}
    bare = Bare(model, arch, samples.batch(range(args.batch_size), model.device))
    return {**plain, **{name: partial(_advance, run.run(n)) for name, run in runs.items()}, "bare work": bare}


def _ours(model: Model, arch: Any, samples: Sampler, args: argparse.Namespace, compiler: str) -> Distiller:
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    student, teacher = student_of(model.network, arch, "teacher", 0), copy.deepcopy(model.network)
    settings = Settings(args.batch_size, compiler=compiler)
    return Distiller(accelerator, teacher, student, model.graph, arch, samples, read_recipe("bk-sdm"), settings)


if __name__ == "__main__":
    main()
