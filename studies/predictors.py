"""Dearer scores of students before training, for the table of `after_training.py`: images, a few updates, shared trainings.

    python studies/predictors.py --reports reports/after-training    # about 45 minutes on two cores; goes on when killed

`drawn`: distance to the teacher's images, of 64 images, with nothing, a scale and shift, or a linear map fitted in place of each
block; FID and CLIP score with a scale and shift. `early`: loss and errors after 25 and 100 updates of each, and what it draws then.
`shared`: one training of a U-Net in which every update removes another random set within the budgets; candidates are scored with
its weights. `gates`: for each size one training in which every block may be passed by, with a probability that is learned (as
TinyFusion, arXiv 2412.01199, which chooses among blocks of equal size), under a penalty for what exceeds the budgets; a candidate
scores the sum over the blocks that it lacks. Each part writes `predictors/PART.json`: student => score => loss, less is better.
`--dry-run` says what is left.
Expected: `shared` ranks better than any score without training, as in one-shot architecture search.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from after_training import BATCH_SIZE, N_IMAGES, students, the_judge
from candidates import SIZES, Student, units
from diffusers import UNet2DConditionModel
from exhaustive_pairs import space as space_of
from torch import Tensor, nn

from blockprune.measures.images import judge
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.runs.atomic import writing
from blockprune.stages.search.space import Space
from blockprune.stages.train.losses import output_loss, task_loss
from blockprune.stages.train.recover import LEARNING_RATE, Recovery
from blockprune.stages.train.samples import Batch, Sampler

FITS = ("none", "channel", "linear")
DRAWN = ("fid", "clip_score", "feature_distance")
STOPS = (25, 100)
EARLY_CFG_SCALE, EARLY_DRAWN = 2.0, {"fid": 1, "clip_score": -1, "digits_read": -1}  # at the scale where most have their best FID
N_DRAWN = 64
SHARED_UPDATES, GATE_UPDATES = 1200, 400
GATE_RATE, PENALTY, TEMPERATURE = 5e-2, 20.0, 0.5
PARTS = ("drawn", "early", "shared", "gates")
Scores = dict[str, float]
Parts = dict[str, Callable[[Student], Scores]]


def drawn(student: Student) -> Scores:
    """What it draws untrained, as losses."""
    of, scores = the_judge(), Scores()
    teacher, _ = first_images()
    for fit in FITS:
        fitted = of.model.graph.fitted(student.arch, fit)
        with surgery.removed(of.model.network, fitted, of.fitter(fitted)) as network, of.model.running(network):
            seen, _ = of.runner.observe(Architecture(), student.name, N_DRAWN)
        for score in judge("", student.name, list(DRAWN), seen, teacher, of.plan.judges, 0):
            if fit == "channel" or score.measure == "feature_distance":  # the others are in the rows
                scores[f"untrained: {score.measure}, {fit}"] = score.loss
    return scores


@cache
def first_images() -> tuple[Any, Any]:
    """What the judges see in the teacher's first images."""
    return the_judge().runner.observe(Architecture(), "teacher", N_DRAWN)


@cache
def recovery() -> Recovery:
    return Recovery(the_judge().model, None, BATCH_SIZE, 0)


def early(student: Student) -> Scores:
    """Its loss (mean of the last ten updates) and its errors at each stop of a short training."""
    of, scores, losses = the_judge(), Scores(), list[float]()
    with recovery()._training(student.arch) as run:
        for state in run.run(STOPS[-1]):
            losses.append(state.losses["loss"])
            if state.step in STOPS:
                network = surgery.prune(of.model.network, student.arch)
                network.load_state_dict(run.weights(averaged=True))
                scores[f"after {state.step} updates: loss"] = float(np.mean(losses[-10:]))
                scores |= {f"after {state.step} updates: {name}": error for name, error in of.denoised(network.eval()).items()}
    seen = of.drawn(network, EARLY_CFG_SCALE, N_IMAGES)
    return scores | {f"after {STOPS[-1]} updates: {name}": sign * seen[name] for name, sign in EARLY_DRAWN.items()}


@cache
def spaces() -> dict[str, Space]:
    return {design: space_of(*budgets, units=units) for design, budgets in SIZES.items()}


def batches(n: int) -> Iterator[tuple[Batch, Tensor]]:
    """Training pairs of scenes, with the teacher's answers."""
    sampler: Sampler = recovery().samples
    network = the_judge().model.network
    for i in range(n):
        batch = sampler.batch(range(i * BATCH_SIZE, (i + 1) * BATCH_SIZE), torch.device("cpu"))
        with torch.no_grad():
            expected = answer(network, batch)
        yield batch, expected


def answer(network: nn.Module, batch: Batch) -> Tensor:
    output: Tensor = network(batch.noisy, timestep=batch.timesteps, **batch.condition, return_dict=False)[0]
    return output


def train(
    network: UNet2DConditionModel,
    n: int,
    removing: Callable[[int], AbstractContextManager[Any]],
    more: Sequence[dict[str, Any]] = (),
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> None:
    """Trains all weights for `n` updates, each with what `removing(i)` changes, and `more` groups of parameters."""
    network.requires_grad_(True).train()
    groups = [{"params": list(network.parameters()), "lr": LEARNING_RATE, "weight_decay": 0.01}, *more]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for i, (batch, expected) in enumerate(batches(n)):
        with removing(i):
            predicted = answer(network, batch)
        loss = task_loss(predicted, batch.target) + output_loss(predicted, expected) + penalty()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()


@cache
def shared_network() -> UNet2DConditionModel:
    """One U-Net that has lacked other blocks in every update, at the three sizes in turn."""
    network, of, draw = copy.deepcopy(the_judge().model.network), list(spaces().values()), np.random.default_rng(0)

    def removing(i: int) -> AbstractContextManager[Any]:
        space = of[i % len(of)]
        choice = space.drawn(draw.permutation(space.labels).tolist())
        return surgery.removed(network, space.arch(choice or frozenset()))

    train(network, SHARED_UPDATES, removing)
    return network.eval().requires_grad_(False)


def shared(student: Student) -> Scores:
    """Errors with the weights that all candidates share."""
    with surgery.removed(shared_network(), student.arch) as network:
        return {f"shared weights: {name}": error for name, error in the_judge().denoised(network).items()}


class Gate(nn.Module):
    """A block and its stand-in: `open` mixes what they give, 1 for the block alone."""

    def __init__(self, block: nn.Module, stand_in: nn.Module) -> None:
        super().__init__()
        self.block, self.stand_in, self.open = block, stand_in, torch.ones(())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept, passed = self.block(*args, **kwargs), self.stand_in(*args, **kwargs)
        if isinstance(kept, tuple):
            return (self.open * kept[0] + (1 - self.open) * passed[0],)
        return self.open * kept + (1 - self.open) * passed


@cache
def logits(design: str) -> Mapping[str, float]:
    """Block => the logit of keeping it, learned within the budgets of a design."""
    network, of = copy.deepcopy(the_judge().model.network), spaces()[design]
    names = [name for name in of.labels if ".resnets." in name or ".attentions." in name]
    gates = {name: Gate(network.get_submodule(name), surgery.stand_in(network, name)) for name in names}
    keep, draw = torch.full((len(names),), 2.0, requires_grad=True), torch.Generator().manual_seed(0)
    saved = torch.tensor(of.savings[:, [of.labels.index(name) for name in names]] / of.needed[:, None], dtype=torch.float32)

    def removing(i: int) -> AbstractContextManager[Any]:
        noise = torch.rand(len(names), generator=draw).clamp(1e-6, 1 - 1e-6).logit()
        soft = ((keep + noise) / TEMPERATURE).sigmoid()
        hard = (soft > 0.5).float() + soft - soft.detach()  # the Gumbel trick for two choices, straight through
        for gate, value in zip(gates.values(), hard, strict=True):
            gate.open = value
        return surgery.swapped(network, gates)

    def penalty() -> Tensor:
        """For what is expected to be short of the budgets, each relative to what must go."""
        return PENALTY * (1 - saved @ (1 - keep.sigmoid())).clamp(min=0).square().sum()

    train(network, GATE_UPDATES, removing, [{"params": [keep], "lr": GATE_RATE, "weight_decay": 0.0}], penalty)
    return dict(zip(names, keep.tolist(), strict=True))


def gates(student: Student) -> Scores:
    """How much learned gates would rather keep of what it lacks."""
    learned, arch = logits(student.size), student.arch
    return {"learned gates": sum(keep for name, keep in learned.items() if name in arch)}


OF_PART: Parts = {"drawn": drawn, "early": early, "shared": shared, "gates": gates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print what is left")
    args = parser.parse_args()
    for part in args.part or PARTS:
        path = args.reports / "predictors" / f"{part}.json"
        known: dict[str, Scores] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        left = [s for s in students(args.reports) if s.name not in known and not s.arch.fits]
        print(f"{part}: {len(left)} students are left", flush=True)
        for student in () if args.dry_run else left:
            known[student.name] = OF_PART[part](student)
            with writing(path) as temporary:
                temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(f"{student.name}: " + ", ".join(f"{name} {loss:.4g}" for name, loss in known[student.name].items()), flush=True)


if __name__ == "__main__":
    main()
