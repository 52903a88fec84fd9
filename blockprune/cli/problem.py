"""What a search may remove and what must hold: the part of a search that needs no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from blockprune.cost.components import pipeline_costs
from blockprune.errors import UserError
from blockprune.model import presets, pretrained
from blockprune.model.architecture import Architecture, BlockGraph
from blockprune.reports.view import PAIRED
from blockprune.stages.search.budget import Budget, parse_budget
from blockprune.stages.search.search import Strategy
from blockprune.stages.search.space import Space

N_EXACT = 8
SWEEP = (90, 80, 70, 60, 50, 40, 30)
_LATENCY = re.compile(r"([0-9]\s*m?s|%latency)$")


def units_of(graph: BlockGraph, text: str, kept: Architecture) -> dict[str, Architecture]:
    """The units that may go, of one granularity or of several with commas between; the innermost stage is one of them."""
    units: dict[str, Architecture] = {}
    for name in text.split(","):
        units |= graph.units(name.strip())
    if text != "layer" and (inner := graph.units("stage").get("innermost")):
        units["innermost"] = inner
    left = {label: unit for label, unit in units.items() if not touches(unit, kept)}
    if not left:
        raise UserError(f"nothing is left to remove: of the unit {text!r} this U-Net has {len(units)}, all of them kept by --keep")
    return left


def touches(arch: Architecture, kept: Architecture) -> bool:
    """True when removing `arch` takes a kept block, a part of one, or what holds one."""
    return any(name in arch for name in kept) or any(name in kept for name in arch)


class Problem:
    """Units, budgets and known designs of one model, as the options say them.

    "latency_s" among them is the teacher's step in seconds and "saved_s" what each unit saves of it, where they were measured.
    """

    def __init__(self, graph: BlockGraph, opts: Mapping[str, Any]) -> None:
        self.graph, self.opts = graph, opts
        self.kept = presets.parse(opts["keep"], graph) if opts["keep"] else Architecture()
        self.units = units_of(graph, opts["unit"], self.kept)
        self.presets = {name: arch for name, arch in presets.fitting(graph).items() if not touches(arch, self.kept)}

    @property
    def timed(self) -> bool:
        """True when a budget or the front is about latency, which must be measured first."""
        return self.opts["pareto"] == "latency" or any(_LATENCY.search(text) for text in self.texts)

    @property
    def texts(self) -> Sequence[str]:
        return [text.strip() for text in self.opts["budget"]]

    @cached_property
    def outside_params(self) -> int:
        """Parameters of the pipeline outside its U-Net, as the papers count them."""
        latent = (self.graph.latent[1], self.graph.latent[2])
        return sum(c.params for c in pipeline_costs(pretrained.configs(self.opts["model"]), latent).values())

    def budget(self, text: str) -> Budget:
        return parse_budget(
            text, self.graph, self.outside_params, self.opts.get("latency_s"), self.opts["macs"], self.opts["scope"]
        )

    def _space(self, budgets: Sequence[Budget]) -> Space:
        timings = self.opts.get("latency_s") or 0.0, self.opts.get("saved_s") or {}
        return Space(self.graph, self.units, budgets, self.opts["macs"], *timings)

    @property
    def free(self) -> Space:
        """The units without any budget."""
        return self._space([])

    @cached_property
    def space(self) -> Space:
        """The budgets that are given; UserError when nothing meets them."""
        space = self._space([self.budget(text) for text in self.texts])
        space.check()
        return space

    @cached_property
    def spaces(self) -> list[Space]:
        """Where candidates are sought: `space`, or for a front one for each step of the sweep that can be reached."""
        if not self.opts["pareto"]:
            return [self.space]
        steps = [self.budget(f"{percent}%{self.opts['pareto']}") for percent in SWEEP]
        spaces = [self._space([*self.space.budgets, step]) for step in steps]
        return [space for space in spaces if next(space.best(dict.fromkeys(space.labels, 1.0), 1), None) is not None]

    def strategy(self, seed: int) -> Strategy:
        """How candidates are found. Units are scored one by one where the trials allow it or their scores are there already."""
        left = self.opts["trials"] - len(self.units) - len(self.presets)
        scan, teacher = left > 0 or bool(self.opts["from_scan"]), self.opts["objective"] not in PAIRED
        n_exact = max(1, min(N_EXACT, left) // len(self.spaces)) if scan else 0
        return Strategy(self.space, self.spaces, self.presets, self.opts["sampler"], seed, n_exact, scan, teacher)
