"""Can the block before a removed one do its work? No parameter is added, and stock diffusers can load the student.

    python studies/absorb.py --out reports                       # tiny-digits, about a minute

For each ResNet and attention with a block before it in its stage, the last linear layer of that block is solved in closed form, so
that the block gives what the removed one would have: of a ResNet's `conv2` the middle tap alone is changed, of an attention its
`proj_out`. It is the fit of `blockprune.model.fit`, with the layer's input in place of the hidden state and its weights in place of
the identity. Beside it the plain removal, and a linear map fitted in the removed block's place. Writes `absorb.json`: `eps_mse` of
each on noise that no fit has seen, and how many removals each makes better than the plain one. `--dry-run` prints the plan.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from blockprune.measures.denoising import Answer
from blockprune.measures.runner import FIT_SEED, MeasureRunner
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.fit import HELD_OUT, RIDGES, Fitter, Moments, _rows
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model, load_model
from blockprune.runs.provenance import made_with
from blockprune.stages.plan import plan_of
from blockprune.stages.scan.request import ScanRequest

LAST = {"R": "conv2", "A": "proj_out"}


def before(graph: BlockGraph) -> Iterator[tuple[str, str]]:
    """(removed block, last linear layer of the block before it in its stage)."""
    blocks = [b for b in graph if b.kind in "RA"]
    for first, second in pairwise(blocks):
        if first.stage == second.stage and second.removable and second.stand_in != "Shortcut":
            yield second.name, f"{first.name}.{LAST[first.kind]}"


def solved(x: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
    """(W, b) of the change of a layer with input x, by the ridge that is best on samples held out."""
    held = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
    used, rest = Moments(), Moments()
    used.add(_rows(x[~held]), _rows(lacking[~held]))
    rest.add(_rows(x[held]), _rows(lacking[held]))
    ridge = min(((rest.error(w, b), ridge) for ridge, w, b in used.solutions(RIDGES)))[1]
    ((_, w, b),) = (used + rest).solutions((ridge,))
    return w, b


@contextmanager
def changed(layer: nn.Module, w: Tensor, b: Tensor) -> Iterator[None]:
    """Within this context W is added to the layer's weights, of a 3x3 convolution to its middle tap, and b to its bias."""
    assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
    old = layer.weight.detach().clone(), layer.bias.detach().clone()
    try:
        with torch.no_grad():
            tap = layer.weight[:, :, 1, 1] if layer.weight.shape[-1] == 3 else layer.weight.view(w.shape)
            tap += w.float()
            layer.bias += b.float()
        yield
    finally:
        with torch.no_grad():
            layer.weight.copy_(old[0])
            layer.bias.copy_(old[1])


def main(model: Model) -> list[dict[str, object]]:
    plan = plan_of(model, ScanRequest(measures=("eps_mse",)).filled(model.defaults), ["eps_mse"])
    samples = MeasureRunner(model, plan).noisy({})
    answer = Answer(model.network, model.graph, samples, range(samples.n), replay=False)
    batch = replace(samples, seed=FIT_SEED).batch(range(samples.n), model.network)
    fitter, rows = Fitter(model.network, model.graph, [batch]), []
    for name, last in before(model.graph):
        seen: dict[str, Tensor] = {}
        hooks = [
            model.network.get_submodule(last).register_forward_hook(lambda m, args, out, s=seen: s.update(x=args[0])),
            model.network.get_submodule(last.rpartition(".")[0]).register_forward_hook(_keep(seen, "given")),
            model.network.get_submodule(name).register_forward_hook(_keep(seen, "wanted")),
        ]
        with torch.no_grad():
            model.network(batch[0], batch[1], **batch[2], return_dict=False)
        for hook in hooks:
            hook.remove()
        plain, linear = Architecture(frozenset({name})), Architecture(frozenset({f"{name}~linear"}))
        row: dict[str, object] = {"removed": name, "none": float(answer.errors(plain).mean())}
        with surgery.removed(model.network, linear, fitter(linear)):
            row["linear"] = float(answer.errors_of(model.network).mean())
        with changed(model.network.get_submodule(last), *solved(seen["x"], seen["wanted"] - seen["given"])):
            row["absorbed"] = float(answer.errors(plain).mean())
        rows.append(row)
        print({k: v if isinstance(v, str) else f"{v:.3g}" for k, v in row.items()}, flush=True)
    return rows


def _keep(seen: dict[str, Tensor], key: str) -> object:
    def hook(module: nn.Module, args: object, output: object) -> None:
        seen[key] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]

    return hook


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    loaded = load_model("tiny-digits")
    if args.dry_run:
        print(f"{len(list(before(loaded.graph)))} removals, each plain, fitted and absorbed")
    else:
        rows = main(loaded)
        better = {k: sum(row[k] < row["none"] for row in rows) for k in ("absorbed", "linear")}  # type: ignore[operator]
        falls = {k: float(np.median([row["none"] / row[k] for row in rows])) for k in better}  # type: ignore[operator]
        print(f"better than nothing in {better} of {len(rows)}; median fall {falls}")
        if args.out:
            found = {"rows": rows, "better": better, "median_fall": falls, "made_with": made_with(torch.device("cpu"))}
            (args.out / "absorb.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
