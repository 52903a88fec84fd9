"""The removal sets of a U-Net as a 0/1 space: exact best sets for additive scores, and repair to a budget."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, islice

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, milp

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph, Cost, sum_costs
from blockprune.stages.search.budget import Budget

Floats = NDArray[np.float64]
Choice = frozenset[str]


@dataclass(frozen=True)
class Space:
    """Which units may go, and what all of them are bounded by.

    `units` maps a label to what its removal takes, and what is fitted in its place; of those with one level in `levels`, one may go
    at most. `saved_s` is what each is predicted to save of a step's latency, in seconds; latencies do not add up exactly, so a
    latency budget met here is a prediction. Every budget must hold.
    """

    graph: BlockGraph
    units: Mapping[str, Architecture]
    budgets: Sequence[Budget]
    convention: str = "thop"
    latency_s: float = 0.0
    saved_s: Mapping[str, float] = field(default_factory=dict)
    levels: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.units)

    def arch(self, choice: Collection[str]) -> Architecture:
        """The architecture that removes the chosen units."""
        return Architecture(frozenset().union(*(self.units[label].terms for label in choice)))

    def choice(self, arch: Architecture) -> Choice | None:
        """The units that make up `arch`; None when it is no union of units."""
        inside = frozenset(label for label, unit in self.units.items() if _part(unit, arch))
        outermost = frozenset(a for a in inside if not any(a != b and self.units[a] <= self.units[b] for b in inside))
        return outermost if self.arch(outermost) == arch else None

    @cached_property
    def exclusive(self) -> tuple[tuple[str, str], ...]:
        """Pairs of units that do not go together: of one level, one inside the other, two fits in one place, or one where nothing
        can be fitted any more."""
        return tuple((a, b) for a, b in combinations(self.labels, 2) if self._exclude(a, b))

    def _exclude(self, one: str, other: str) -> bool:
        a, b = self.units[one], self.units[other]
        if one in self.levels and self.levels[one] == self.levels.get(other):
            return True
        if any(name in b for name in a) or any(name in a for name in b):
            return True
        return any(self.graph.why_unfit(name, a | b) for name, _ in a.fits | b.fits)

    @cached_property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """The units of which one may go at most, by their level or the label of the plain one: of a block, nothing in its place, or
        a fit."""
        groups: dict[str, tuple[str, ...]] = {}
        for label in self.labels:
            name = self.levels.get(label) or label.partition("~")[0]
            groups[name] = (*groups.get(name, ()), label)
        return groups

    @cached_property
    def required(self) -> tuple[tuple[str, str], ...]:
        """(unit, other) pairs: the first goes only with the second. With the innermost stage goes the mid, so that costs add up."""
        inner = [label for label, unit in self.units.items() if self.graph.innermost and self.graph.innermost <= unit.removed]
        return tuple((label, "mid_block") for label in inner if "mid_block" in self.units)

    def valid(self, choice: Choice) -> bool:
        return not any(a in choice and b in choice for a, b in self.exclusive) and all(
            b in choice for a, b in self.required if a in choice
        )

    @cached_property
    def savings(self) -> Floats:
        """(budgets, units): what the removal of each unit saves of each budget's quantity."""
        total = self.graph.total
        left = [(total - self._saves(label), self.latency_s - self.saved_s.get(label, 0.0)) for label in self.labels]
        rows = [
            [b.of(total, self.latency_s, self.convention) - b.of(*rest, self.convention) for rest in left] for b in self.budgets
        ]
        return np.array(rows, dtype=np.float64).reshape(len(self.budgets), len(self.labels))

    def _saves(self, label: str) -> Cost:
        unit = self.units[label]
        saves = sum_costs(saves for name in unit if (saves := self.graph[name].saves) is not None)
        return saves - sum_costs(self.graph.fit_cost(*fit) for fit in unit.fits)

    @cached_property
    def needed(self) -> Floats:
        """(budgets,): how much of each quantity must go."""
        return np.array([b.of(self.graph.total, self.latency_s, self.convention) - b.limit for b in self.budgets])

    def fits(self, choice: Collection[str]) -> bool:
        """True when every budget holds; a latency budget by prediction."""
        return bool((self.savings @ self._mask(choice) >= self.needed).all())

    def over(self, arch: Architecture) -> dict[str, float]:
        """By how much `arch` exceeds each budget, relative to it, by the budget's text; at most 0 where it fits."""
        cost = self.graph.cost(arch)
        latency_s = self.latency(arch) if any(b.quantity == "latency" for b in self.budgets) else 0.0
        return {b.text: b.of(cost, latency_s, self.convention) / b.limit - 1 for b in self.budgets}

    def holds(self, arch: Architecture) -> bool:
        """`fits` for any architecture, of units or not."""
        return all(excess <= 0 for excess in self.over(arch).values())

    def latency(self, arch: Architecture) -> float:
        """Predicted seconds of a step: what the units save alone, summed; in proportion to MACs for what is no union of units."""
        choice = self.choice(arch)
        if choice is None:
            return self.latency_s * self.graph.cost(arch).thop / self.graph.total.thop
        return self.latency_s - sum(self.saved_s.get(label, 0.0) for label in choice)

    def _mask(self, choice: Collection[str]) -> Floats:
        return np.array([label in choice for label in self.labels], dtype=np.float64)

    def smallest(self) -> dict[str, float]:
        """For each budget, by its text: the least that any valid choice leaves of its quantity."""
        reach = {}
        for i, budget in enumerate(self.budgets):
            row = next(self._solve(-self.savings[i] / max(self.savings[i].max(), 1e-12), self._structure()), frozenset())
            reach[budget.text] = budget.limit + self.needed[i] - float(self.savings[i] @ self._mask(row))
        return reach

    def check(self) -> None:
        """Raises UserError when no choice meets the budgets, with the least that each quantity can come down to."""
        if next(self.best(dict.fromkeys(self.labels, 1.0), 1), None) is None:
            least = self.smallest()
            reach = ", ".join(b.said(least[b.text]) for b in self.budgets)
            raise UserError(
                f"no removal meets the budget {' and '.join(b.text for b in self.budgets)}: the least to be had is {reach}"
            )

    def best(self, scores: Mapping[str, float], k: int) -> Iterator[Choice]:
        """The `k` valid choices within the budgets whose summed scores are least, best first, exactly.

        A 0/1 knapsack (arXiv 2404.11098, section 3.3) by mixed-integer programming; each choice found is cut off for the next.
        """
        values = np.array([scores[label] for label in self.labels])
        within = [
            LinearConstraint(self.savings[i] / self._unit(i), self.needed[i] / self._unit(i), np.inf)
            for i in range(len(self.budgets))
        ]
        return islice(self._solve(values / max(float(np.abs(values).max()), 1e-300), [*within, *self._structure()]), k)

    def _unit(self, i: int) -> float:
        """A scale that keeps the solver's tolerances meaningful for counts of 10^8."""
        return max(float(np.abs(self.savings[i]).max()), 1e-12)

    def _structure(self) -> list[LinearConstraint]:
        index = {label: i for i, label in enumerate(self.labels)}
        rows = []
        for a, b in self.exclusive:
            rows.append((self._row({index[a]: 1.0, index[b]: 1.0}), 1.0))
        for a, b in self.required:
            rows.append((self._row({index[a]: 1.0, index[b]: -1.0}), 0.0))
        return [LinearConstraint(row, -np.inf, limit) for row, limit in rows]

    def _row(self, entries: Mapping[int, float]) -> Floats:
        row = np.zeros(len(self.labels))
        for i, value in entries.items():
            row[i] = value
        return row

    def _solve(self, values: Floats, constraints: Sequence[LinearConstraint]) -> Iterator[Choice]:
        """Valid choices from the least sum of `values` on, without end until there is none left."""
        cuts: list[LinearConstraint] = []
        while True:
            n = len(self.labels)
            found = milp(values, integrality=np.ones(n), bounds=(0, 1), constraints=[*constraints, *cuts])
            if found.x is None:
                return
            mask = found.x.round()
            yield frozenset(label for label, on in zip(self.labels, mask, strict=True) if on)
            cuts.append(LinearConstraint(1 - 2 * mask, 1 - mask.sum(), np.inf))

    def repair(self, choice: Collection[str], scores: Mapping[str, float], minimal: bool = True) -> Choice | None:
        """The nearest valid choice within the budgets: units of least score for what they save are added until it fits; then, when
        `minimal`, those of the highest score that need not go are put back. None when there is none from here."""
        chosen = self._without_overlaps(choice)
        while not self.fits(chosen):
            gaps = np.maximum(self.needed - self.savings @ self._mask(chosen), 0) / np.maximum(self.needed, 1e-12)
            rate = {}
            for i, label in enumerate(self.labels):
                gain = float((gaps * self.savings[:, i] / np.maximum(self.needed, 1e-12)).sum())
                if gain > 0 and label not in chosen and not any(self._exclude(label, c) for c in chosen):
                    rate[label] = scores[label] / gain
            if not rate:
                return None
            label = min(rate, key=rate.__getitem__)
            chosen = chosen | {label} | {b for a, b in self.required if a == label}
        return self._put_back(chosen, scores) if minimal else chosen

    def drawn(self, order: Sequence[str]) -> Choice | None:
        """The units in that order, as many as it takes to meet the budgets; None when all of them do not."""
        chosen: Choice = frozenset()
        for label in order:
            if self.fits(chosen):
                return chosen
            chosen = self._without_overlaps(chosen | {label})
        return chosen if self.fits(chosen) else None

    def _put_back(self, chosen: Choice, scores: Mapping[str, float]) -> Choice:
        """`chosen` without the units that need not go, those of the highest score first."""
        for label in sorted(chosen, key=lambda c: -scores[c]):
            fewer = chosen - {label}
            if self.valid(fewer) and self.fits(fewer):
                return self._put_back(fewer, scores)
        return chosen

    def _without_overlaps(self, choice: Collection[str]) -> Choice:
        """`choice` without the units that another of it excludes, the smaller or the plain one, and with what its units require."""
        chosen = frozenset(choice) | {b for a, b in self.required if a in choice}
        inner = {a if self.units[a] <= self.units[b] else b for a, b in self.exclusive if a in chosen and b in chosen}
        return chosen - inner


def _part(unit: Architecture, arch: Architecture) -> bool:
    """True when `arch` removes what `unit` does, with the same in its place."""
    return unit <= arch and unit.fits <= arch.fits and not any(name in unit.removed for name, _ in arch.fits - unit.fits)
