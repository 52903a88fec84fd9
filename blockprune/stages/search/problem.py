"""What a search may remove and what must hold: the part of a search that needs no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from blockprune.errors import UserError
from blockprune.export import stock_config
from blockprune.measures.measure import measure
from blockprune.model import presets
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.stages.search.budget import Budget, bounds_latency, parse_budgets
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.search.search import Strategy
from blockprune.stages.search.space import Space

N_EXACT = 8
SWEEP = (90, 80, 70, 60, 50, 40, 30)


@dataclass(frozen=True)
class Latencies:
    """The teacher's step in seconds, and what each unit saves of it."""

    full_s: float
    saved_s: Mapping[str, float] = field(default_factory=dict)


def units_of(graph: BlockGraph, text: str, kept: Architecture, fits: Sequence[str] = ()) -> dict[str, Architecture]:
    """The units that may go, of one granularity or of several with commas between, the innermost stage among them; and each
    with a fit of those kinds in its place, where there can be one."""
    units: dict[str, Architecture] = {}
    for name in text.split(","):
        units |= graph.units(name.strip())
    if text not in ("layer", "component") and (inner := graph.units("stage").get("innermost")):
        units["innermost"] = inner
    left = {label: unit for label, unit in units.items() if not touches(unit, kept)}
    if not left:
        raise UserError(f"nothing is left to remove: of the unit {text!r} this U-Net has {len(units)}, all of them kept by --keep")
    for kind in fits:
        fitted = {label: graph.fitted(unit.plain, kind) for label, unit in left.items() if not unit.fits}
        left |= {f"{label}~{kind}": unit for label, unit in fitted.items() if unit.fits}
    return left


def stock_units(graph: BlockGraph, text: str, kept: Architecture) -> tuple[dict[str, Architecture], dict[str, str]]:
    """The units after whose removal a stock configuration can say what is left, and the level of each, of which one goes at most.

    Layers as deep as a configuration says of one attention alone; else what can go of a level, or the innermost stage.
    """
    units, levels = dict[str, Architecture](), dict[str, str]()
    for unit in text.split(","):
        if unit.strip() == "layer":
            tied = _tied(graph)
            units |= {label: layer for label, layer in graph.units("layer").items() if not label.startswith(tied)}
            continue
        for level, of in stock_config.stock_options(graph).items():
            units |= of
            levels |= dict.fromkeys(of, level)
        units |= {"innermost": Architecture(graph.innermost)} if graph.innermost else {}
    left = {label: unit for label, unit in units.items() if not touches(unit, kept)}
    if not left:
        raise UserError("nothing is left to remove for stock diffusers: all of it is kept by --keep; leave out --stock-only")
    return left, levels


def _tied(graph: BlockGraph) -> tuple[str, ...]:
    """Attentions whose depths a configuration says together: the mid stage's, and the first one of the down stage before it."""
    down = [b.name for b in graph if b.kind == "R" and b.stage.startswith("down_blocks")][-1].partition(".resnets")[0]
    first = f"{down}.attentions.0"
    return (f"{first}.", "mid_block.") if first in graph and "mid_block.attentions.0" in graph else ()


def touches(arch: Architecture, kept: Architecture) -> bool:
    """True when removing `arch` takes a kept block, a part of one, or what holds one."""
    return any(name in arch for name in kept) or any(name in kept for name in arch)


class Problem:
    """Units, budgets and known designs of one network.

    `outside_params` are the parameters of the pipeline outside it; `latencies` are None until they are measured.
    """

    def __init__(self, graph: BlockGraph, request: SearchRequest, outside_params: int, latencies: Latencies | None = None) -> None:
        self.graph, self.request, self.outside_params, self.latencies = graph, request, outside_params, latencies
        self.kept = presets.parse(request.keep, graph) if request.keep else Architecture()
        self.levels: Mapping[str, str] = {}
        if request.stock_only:
            self.units, self.levels = stock_units(graph, request.unit, self.kept)
        else:
            self.units = units_of(graph, request.unit, self.kept, request.fit)
        self.presets = {name: arch for name, arch in presets.fitting(graph).items() if self._allowed(arch)}

    @cached_property
    def given(self) -> dict[str, Architecture]:
        """The architectures of --arch, but presets."""
        known = {*self.presets.values()}
        return {label: arch for label, arch in presets.named(self.request.arch, self.graph).items() if arch not in known}

    def check(self) -> None:
        """Raises UserError when nothing meets the budgets, and for an architecture of --arch that breaks what is asked for."""
        for label, arch in self.given.items():
            if not self._allowed(arch):
                raise UserError(f"--arch {label} removes what --keep or --stock-only rules out: leave out one of them")
            if not self.timed and not any(space.holds(arch) for space in self.spaces):
                over = " and ".join(f"{text} by {excess:.1%}" for text, excess in self.space.over(arch).items() if excess > 0)
                raise UserError(f"--arch {label} exceeds {over or 'every size of the front'}: give one within the budget")
        if not self.timed:
            self.space.check()

    def _allowed(self, arch: Architecture) -> bool:
        """True for an architecture that keeps what must stay, and is stock where that is asked."""
        return not touches(arch, self.kept) and (not self.request.stock_only or self.free.choice(arch) is not None)

    @property
    def timed(self) -> bool:
        """True when a budget or the front is about latency, which must be measured first."""
        return self.request.pareto == "latency" or any(map(bounds_latency, self.request.budget))

    def budgets(self, text: str) -> list[Budget]:
        """What a text bounds: one quantity, or two of a design."""
        full_s = self.latencies.full_s if self.latencies else None
        return parse_budgets(text, self.graph, self.outside_params, full_s, self.request.macs, self.request.scope)

    def _space(self, budgets: Sequence[Budget]) -> Space:
        latencies = self.latencies or Latencies(0.0)
        return Space(self.graph, self.units, budgets, self.request.macs, latencies.full_s, latencies.saved_s, self.levels)

    @property
    def free(self) -> Space:
        """The units without any budget."""
        return self._space([])

    @cached_property
    def space(self) -> Space:
        """The budgets that are given; UserError when nothing meets them."""
        space = self._space([budget for text in self.request.budget for budget in self.budgets(text)])
        space.check()
        return space

    @cached_property
    def spaces(self) -> list[Space]:
        """Where candidates are sought: `space`, or for a front one for each step of the sweep that can be reached."""
        if not self.request.pareto:
            return [self.space]
        steps = [step for percent in SWEEP for step in self.budgets(f"{percent}%{self.request.pareto}")]
        spaces = [self._space([*self.space.budgets, step]) for step in steps]
        return [space for space in spaces if next(space.best(dict.fromkeys(space.labels, 1.0), 1), None) is not None]

    def strategy(self, seed: int) -> Strategy:
        """How candidates are found. Units are scored one by one where the trials allow it or their scores are there already."""
        request = self.request
        left = request.trials - len(self.units) - len(self.presets) - len(self.given)
        scan, teacher = left > 0 or request.from_scan is not None, not measure(request.measure).paired
        n_exact = max(1, min(N_EXACT, left) // len(self.spaces)) if scan else 0
        return Strategy(self.space, self.spaces, self.presets, request.sampler, seed, n_exact, scan, teacher, self.given)
