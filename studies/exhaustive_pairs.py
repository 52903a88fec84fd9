"""The truth on a small space: the score of every removal set of fourteen units of tiny-digits within a budget.

    python studies/exhaustive_pairs.py --out reports                    # `eps_mse`; 25 minutes on one core, goes on when killed
    python studies/exhaustive_pairs.py --by guided_mse --out reports    # with linear maps, as `search` scores; about 20 minutes

The units are those of BK-SDM's hand designs, so that its presets are points of the space, and four more pairs of the inner stages.
Every set within 71 % of the pipeline's parameters is scored, and every unit alone, all on the same 128 noisy samples of held-out
scenes; by `guided_mse` those within 60 %, on 64 samples, with maps fitted on as many more. `exhaustive-pairs.csv` (`-guided.csv`)
then tells any search what it would have got: see `bench_search.py`. `--dry-run` prints the plan.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path

from blockprune.cost.components import outside_params
from blockprune.measures.denoising import Denoiser, NoisySamples
from blockprune.measures.runner import MeasureRunner
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.model import load_model
from blockprune.model.trace import trace
from blockprune.stages import loading
from blockprune.stages.fields import Measuring
from blockprune.stages.plan import plan_of
from blockprune.stages.search.budget import parse_budget
from blockprune.stages.search.space import Choice, Space

PAIRS = (
    *("down_blocks.0.pair.1", "down_blocks.1.pair.0", "down_blocks.1.pair.1", "down_blocks.2.pair.0", "down_blocks.2.pair.1"),
    *("down_blocks.3.pair.1", "up_blocks.0.pair.1", "up_blocks.1.pair.0", "up_blocks.1.pair.1", "up_blocks.1.pair.2"),
    *("up_blocks.2.pair.1", "up_blocks.3.pair.1"),
)
STAGES = ("mid_block", "innermost")
BUDGETS = {"eps_mse": "71%params", "guided_mse": "60%params"}  # the sets within it are all scored
N_SAMPLES = {"eps_mse": 128, "guided_mse": 64}
BATCH_SIZE = 64
FILES = {"eps_mse": "exhaustive-pairs.csv", "guided_mse": "exhaustive-pairs-guided.csv"}


def space(*budgets: str, units: Callable[[BlockGraph], Mapping[str, Architecture]] | None = None) -> Space:
    """The fourteen units, or others, under budgets; those in parameters are of the whole pipeline."""
    configs = pretrained.configs("tiny-digits")
    latent = configs.latent(None)
    graph = trace(configs.unet, latent, configs.n_tokens)
    outside = outside_params(configs)
    return Space(graph, (units or fourteen)(graph), [parse_budget(budget, graph, outside, None) for budget in budgets])


def fourteen(graph: BlockGraph) -> dict[str, Architecture]:
    every = graph.units("pair") | graph.units("stage")
    return {name: every[name] for name in (*PAIRS, *STAGES)}


def choices(of: Space) -> Iterator[Choice]:
    """Every unit alone, then every valid set within the budget."""
    singles = [frozenset({label}) for label in of.labels]
    yield from singles
    for bits in product((False, True), repeat=len(of.labels)):
        choice = frozenset(label for label, on in zip(of.labels, bits, strict=True) if on)
        if choice not in singles and of.valid(choice) and of.fits(choice):
            yield choice


def text_of(choice: Choice) -> str:
    return " ".join(sorted(choice))


def table(path: Path) -> dict[Choice, float]:
    """The scores of a stored table, by removal set; a last line torn by a kill is left out."""
    if not path.exists():
        return {}
    lines, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return {frozenset(removed.split()): float(score) for removed, score in list(csv.reader(lines.splitlines()))[1:]}


def denoiser(n: int) -> Denoiser:
    model = load_model("tiny-digits")
    clean = loading.clean_latents(model, None, n, BATCH_SIZE)
    assert clean
    samples = NoisySamples(clean[0], model.encode(clean[1])[0], model.schedule, n, seed=0)
    return Denoiser(model.network, model.graph, samples, BATCH_SIZE)


def guided(n: int) -> Callable[[Architecture], float]:
    """The error of the guided prediction of students with linear fits, as `search` scores by default."""
    model = load_model("tiny-digits")
    asked = Measuring(eps_samples=n, batch_size=BATCH_SIZE).filled(model.defaults)
    runner = MeasureRunner(model, plan_of(model, asked, ["guided_mse"]))
    samples = runner.noisy({}, "guided_mse")
    judge = Denoiser(model.network, model.graph, samples, BATCH_SIZE, fits=runner.fitter({}))
    return lambda arch: float(judge.errors(model.graph.fitted(arch, "linear")).mean())


def plain(n: int) -> Callable[[Architecture], float]:
    judge = denoiser(n)
    return lambda arch: float(judge.errors(arch).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    parser.add_argument("--by", choices=tuple(FILES), default="eps_mse")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args()
    path, budget = args.out / FILES[args.by], BUDGETS[args.by]
    of = space(budget)
    todo = list(choices(of))
    known = table(path)
    print(
        f"{len(todo)} removal sets of {len(of.labels)} units within {budget}, {N_SAMPLES[args.by]} samples each, {len(known)} done"
    )
    if args.dry_run:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
    score, start = (guided if args.by == "guided_mse" else plain)(N_SAMPLES[args.by]), time.monotonic()
    with path.open("a", buffering=1, encoding="utf-8") as out:
        if out.tell() == 0:
            out.write(f"removed,{args.by}\n")
        for i, choice in enumerate(todo):
            if choice not in known:
                out.write(f"{text_of(choice)},{score(of.arch(choice)):.9g}\n")
            if i % 500 == 0:
                print(f"{i}/{len(todo)} after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
