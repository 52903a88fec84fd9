"""What does a fit cost, and what does it win back?

    python studies/bench_fit.py --out reports                                     # tiny-digits, about 2 minutes
    python studies/bench_fit.py --model sd-v1-4 --size 32 --samples 64 --arch down_blocks.1.resnets.1 \
        --arch mid_block --arch up_blocks.1.resnets.1                             # full width on a CPU, minutes; 4 GiB + the model

On tiny-digits: seconds for each of many random architectures with linear fits, beside the plain way, in turns. The plain way is
what a careful user would write: the teacher's pass over the samples once for all architectures, then for each architecture a whole
pass of the student for each fitted block, in forward order, and a solve. Both get the same samples, and the students that they give
are compared (within 1e-3). Writes `bench-fit.json`: seconds of both, their ratio by round, and `eps_mse` on other noise with
nothing fitted, `channel` and `linear`. `--dry-run` prints the plan.

With --arch: one fit of these blocks together, its seconds by part, and the peak memory beyond the model's.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockprune.cost.components import random_unet
from blockprune.measures.denoising import Denoiser, NoisySamples
from blockprune.measures.runner import FIT_SEED, MeasureRunner
from blockprune.model import fit as fitting
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.families import family_of
from blockprune.model.fit import Batch, Fitter, Moments
from blockprune.model.graph import BlockGraph
from blockprune.model.model import load_model
from blockprune.model.trace import trace
from blockprune.runs.provenance import made_with
from blockprune.stages.plan import plan_of
from blockprune.stages.scan.request import ScanRequest


class Plain:
    """Fits an architecture from scratch: a whole pass of the student for each block; the teacher's pass was made before."""

    def __init__(self, unet: Any, graph: BlockGraph, batch: Batch) -> None:
        self.unet, self.batch, self.order = unet, batch, [b.name for b in graph]
        self.given: dict[str, Tensor] = {}
        hooks = [
            unet.get_submodule(b.name).register_forward_hook(self._keep(self.given, b.name)) for b in graph if b.kind in "RATMS"
        ]
        self._run()
        for hook in hooks:
            hook.remove()

    @staticmethod
    def _keep(into: dict[str, Any], name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            into[name] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def _run(self) -> None:
        self.unet(self.batch[0], self.batch[1], **self.batch[2], return_dict=False)

    @torch.no_grad()
    def __call__(self, arch: Architecture) -> None:
        masks = surgery.stand_ins(self.unet, arch)
        with surgery.swapped(self.unet, masks):
            for name, kind in sorted(arch.fits, key=lambda fit: self.order.index(fit[0])):
                problem, fit = fitting._Problem(name, kind), masks[name].fit
                assert fit is not None
                hook = fit.register_forward_hook(
                    lambda module, args, output, p=problem, n=name: p.add(args[0], output, self.given[n])
                )
                self._run()
                hook.remove()
                problem.solve(fit)
        found = {f"{name}.{key}": t for name in masks for key, t in masks[name].state_dict().items()}
        self.weights = {key: t for key, t in found.items() if ".fit." in key}


def random_archs(graph: BlockGraph, n: int, seed: int) -> list[Architecture]:
    """Random sets of 4 to 14 blocks, all of them fitted."""
    draw, blocks = random.Random(seed), list(graph.units("block").values())
    sets = (draw.sample(blocks, draw.randint(4, 14)) for _ in range(n))
    return [graph.fitted(Architecture(frozenset().union(*(b.removed for b in parts))), "linear") for parts in sets]


def tiny(args: argparse.Namespace) -> dict[str, Any]:
    model = load_model("tiny-digits")
    plan = plan_of(model, ScanRequest(measures=("eps_mse",)).filled(model.defaults), ["eps_mse"])
    samples = MeasureRunner(model, plan).noisy({})
    batch = NoisySamples(samples.latents, samples.condition, samples.schedule, args.samples, FIT_SEED).batch(
        range(args.samples), model.network
    )
    plain, rounds = Plain(model.network, model.graph, batch), []
    for r in range(args.rounds):
        ours, seconds = Fitter(model.network, model.graph, [batch]), {"plain": 0.0, "ours": 0.0}
        ours.fits(Architecture(frozenset({"mid_block~linear"})))  # the teacher's pass
        for arch in random_archs(model.graph, args.archs, r):
            for name, way in (("plain", plain), ("ours", ours)):
                start = time.perf_counter()
                way(arch)
                seconds[name] += time.perf_counter() - start
            check(model.network, arch, ours(arch), plain.weights, batch)
        rounds.append({name: s / args.archs for name, s in seconds.items()} | {"ratio": seconds["plain"] / seconds["ours"]})
        print(rounds[-1], flush=True)
    errors = Denoiser(model.network, model.graph, samples, plan.batch_size, fits=Fitter(model.network, model.graph, [batch]))
    table = [
        {kind: float(errors.errors(model.graph.fitted(arch, kind)).mean()) for kind in ("none", "channel", "linear")}
        for arch in random_archs(model.graph, args.archs, 0)
    ]
    falls = {kind: float(np.median([row["none"] / row[kind] for row in table])) for kind in ("channel", "linear")}
    print(f"eps_mse falls, median over {len(table)}: {falls}")
    return {
        "rounds": rounds,
        "eps_mse": table,
        "median_fall": falls,
        "n_samples": args.samples,
        "made_with": made_with(torch.device("cpu")),
    }


def check(unet: Any, arch: Architecture, ours: Any, plain: Any, batch: Batch) -> None:
    """Both ways give the same student, within 1e-3."""
    outputs = []
    for weights in (ours, plain):
        with torch.no_grad(), surgery.removed(unet, arch, weights):
            outputs.append(unet(batch[0], batch[1], **batch[2], return_dict=False)[0])
    apart = float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
    assert apart < 1e-3, f"the two ways differ by {apart:.2g}"


def full_size(args: argparse.Namespace) -> None:
    config = pretrained.configs(args.model).unet
    graph = trace(config, (args.size, args.size))
    unet, draw = random_unet(config, Architecture(), torch.device("cpu"), torch.float32), torch.Generator().manual_seed(0)
    size = args.batch_size or args.samples
    batches: list[Batch] = []
    for _ in range(0, args.samples, size):
        sample = torch.randn(size, config["in_channels"], args.size, args.size, generator=draw)
        condition = {k: torch.randn(v.shape, generator=draw) for k, v in family_of(config).blank(config, size, 77, sample).items()}
        batches.append((sample, torch.randint(1000, (size,), generator=draw), condition))
    arch, before = graph.check(graph.fitted(Architecture(frozenset(args.arch)), "linear")), peak()
    parts = {"eigenvectors": 0.0, "sums": 0.0}
    for name, owner, method in (("eigenvectors", torch.linalg, "eigh"), ("sums", Moments, "add")):
        setattr(owner, method, timed(getattr(owner, method), parts, name))
    start = time.perf_counter()
    fits = Fitter(unet, graph, batches).fits(arch)
    seconds = time.perf_counter() - start
    for fit in fits:
        print(f"{fit.name}: error {fit.plain:.3g} -> {fit.error:.3g}, ridge {fit.ridge:g}")
    rest = seconds - sum(parts.values())
    print(f"{seconds:.0f} s: {', '.join(f'{k} {v:.0f} s' for k, v in parts.items())}, passes {rest:.0f} s")
    print(f"{(peak() - before) / 2**30:.2f} GiB beyond the model's {before / 2**30:.2f} GiB")


def timed(call: Any, parts: dict[str, float], name: str) -> Any:
    def run(*args: Any) -> Any:
        start = time.perf_counter()
        out = call(*args)
        parts[name] += time.perf_counter() - start
        return out

    return run


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-digits")
    parser.add_argument("--arch", action="append")
    parser.add_argument("--size", type=int, default=32, help="of the latents")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--archs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        print(f"{args.rounds} rounds of {args.archs} random architectures, {args.samples} samples")
    elif args.arch:
        full_size(args)
    else:
        result = tiny(args)
        if args.out:
            (args.out / "bench-fit.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
