"""What to take at each size, and how sure that is: computed from evaluated models, with the sentences that say it.

The best is who follows captions best, by the measure that hears them; among those that its intervals do not tell apart, who has the
best FID. What is found must be better than the design by hand in one of the two, intervals apart; else the design is recommended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from blockprune.measures.measure import MEASURES, names
from blockprune.measures.score import TEACHER, Score
from blockprune.progress import duration
from blockprune.reports.models import Model, Reading, at_own_best, readings_of
from blockprune.reports.next_command import next_command
from blockprune.reports.report_data import ReportData
from blockprune.reports.search_view import SearchView
from blockprune.reports.table import Cell, Column, Table
from blockprune.stages.search.budget import QUANTITIES

LOOKS = ("fid", "kid", "is")  # of how images look, the first that was measured speaks
NEAR = 0.01  # a design within this share of a budget is what the budget is for
WORDS = {"params": "parameters", "macs": "MACs", "latency": "latency"}
WORDS_OF_TOLD = {1: "better", -1: "worse", 0: "undecided"}
FEW = 2  # others that are named
Verdict = Literal["better", "mixed", "hand", "alone", "none"]


@dataclass(frozen=True)
class Size:
    """What a student may cost at most, in shares of the teacher: parameters of the whole pipeline, MACs and latency of a step.

    `texts` say each limit as it was given to a search, or name the design by hand whose size it is.
    """

    texts: Mapping[str, str]
    limits: Mapping[str, float]
    searches: Sequence[str] = ()
    convention: str = "thop"  # of its MACs

    @property
    def text(self) -> str:
        return ", ".join(self.texts.values())

    @property
    def words(self) -> str:
        return ", ".join(f"{100 * limit:.3g}\u00a0% of the {WORDS[quantity]}" for quantity, limit in self.limits.items())


@dataclass(frozen=True)
class Comparison:
    """One measure of the recommended model beside its rival's, None without one; with `guidance` each at the scale that is best
    for it, which may turn the order round."""

    mine: Score
    theirs: Score | None = None
    guidance: tuple[float, float] | None = None

    @property
    def told(self) -> int:
        """1 where the model is better, -1 where it is worse, 0 where the intervals meet."""
        return int(self.theirs.clearly_worse(self.mine)) - int(self.mine.clearly_worse(self.theirs)) if self.theirs else 0

    @property
    def word(self) -> str:
        return WORDS_OF_TOLD[self.told] if self.theirs else ""

    @property
    def lead(self) -> str:
        """Who is ahead by the values, whatever their intervals."""
        assert self.theirs is not None
        mine, theirs = self.mine.loss, self.theirs.loss
        return "ahead" if mine < theirs else "behind" if mine > theirs else "level"

    @property
    def title(self) -> str:
        return MEASURES[self.mine.measure].title + ", best CFG" * bool(self.guidance)


@dataclass(frozen=True)
class Recommendation:
    """At a size: the model to take, None where none was evaluated, and what it is compared with: the best design by hand, or for a
    design the best that is none. `spent` are its shares of the teacher's costs; `alike` are others that captions do not tell apart
    from it; `command` is what to run next, "" where that is not known."""

    size: Size
    reading: Reading
    take: Model | None = None
    rival: Model | None = None
    comparisons: Sequence[Comparison] = ()
    alike: Sequence[Model] = ()
    answers: Sequence[str] = ()
    spent: Mapping[str, float] = field(default_factory=dict)
    command: str = ""

    @property
    def spends(self) -> str:
        """What the model takes of each limit of the size, in words."""
        return " and ".join(f"{100 * self.spent[quantity]:.3g}\u00a0%" for quantity in self.size.limits if quantity in self.spent)

    @property
    def verdict(self) -> Verdict:
        """Better than the design by hand, mixed where also worse, hand for the design itself, alone without a rival."""
        if self.take is None:
            return "none"
        if self.take.kind == "hand":
            return "hand"
        if self.rival is None:
            return "alone"
        return "mixed" if any(c.told < 0 for c in self._at_reading) else "better"

    @property
    def sentence(self) -> str:
        """The verdict, after the size and the model's name."""
        if self.take is None:
            found = f" The search answers {', '.join(self.answers)}: distil and evaluate it." if self.answers else ""
            return f"no student that holds this was evaluated.{found}"
        hand = self.take.kind == "hand"
        if self.rival is None:
            trained = "trained " if self.take.updates != 0 else ""
            other = f"no other {trained}student" if hand else f"no {trained}design by hand"
            return f"{other} of this size was evaluated."
        first = "nothing beats this design by hand: " if hand else ""
        who = "the best other" if hand else "the best design by hand"
        return f"{first}{self._told}, compared with `{self.rival.name}`, {who} that fits."

    @property
    def remarks(self) -> str:
        """How sure the verdict is, and what else might be taken."""
        said = [self._trained]
        for c in self.comparisons:
            if c.guidance:
                within = ": compare within a row" if c.mine.n != self.reading.n else ""
                (mine, theirs), n = c.guidance, f"n\u00a0=\u00a0{c.mine.n:,}"
                said.append(f"Best CFG by {MEASURES[c.mine.measure].title}: {mine:g} and {theirs:g}, {n}{within}.")
        if self.alike:
            names = ", ".join(f"`{m.name}`" for m in self.alike[:FEW]) + ", …" * (len(self.alike) > FEW)
            hears, looks = (c.title for c in self._at_reading)
            said.append(f"Similar {hears}, {looks} no better: {names}.")
        return " ".join(said)

    @property
    def table(self) -> Table:
        """The measures that decide, for the model and its rival, and in which one is better."""
        names = [model.name for model in (self.take, self.rival) if model]
        scores = zip(*((c.mine, c.theirs) for c in self.comparisons), strict=True)
        columns = [(Column("", "text"), [Cell(c.title) for c in self.comparisons])]
        columns += [(Column(name), [Cell.of(s) for s in of]) for name, of in zip(names, scores, strict=False)]
        return Table.of_columns("", [*columns, (Column("", "text"), [Cell(c.word or None) for c in self.comparisons])])

    def to_json(self) -> dict[str, Any]:
        take, rival = (model.name if model else None for model in (self.take, self.rival))
        named = {"size": self.size.text, "limits": dict(self.size.limits), "take": take, "against": rival}
        rows = [[column.line(cell) for column, cell in row] for row in self.table.paired()]
        said = {"sentence": self.sentence, "comparisons": rows, "remarks": self.remarks if self.take else ""}
        return named | {"verdict": self.verdict, "reading": self.reading.label, **said, "command": self.command}

    @property
    def _at_reading(self) -> list[Comparison]:
        return [c for c in self.comparisons if c.guidance is None]

    @property
    def _told(self) -> str:
        """In which measures the two differ beyond their intervals, and who is ahead where each has its best guidance."""
        parts = [(word, [self._with_lead(c) for c in self._at_reading if c.told == told]) for told, word in WORDS_OF_TOLD.items()]
        return ", ".join(f"{word} in {' and '.join(titles)}" for word, titles in parts if titles)

    def _with_lead(self, c: Comparison) -> str:
        """The title, and who leads where that is undecided, and where each has its best guidance."""
        own = [f"{o.lead} at best CFG" for o in self.comparisons if o.guidance and o.mine.measure == c.mine.measure]
        leads = "; ".join([*([c.lead] if not c.told else []), *own])
        return c.title + f" ({leads})" * bool(leads)

    @property
    def _trained(self) -> str:
        assert self.take is not None
        once = "One training each" if self.rival and self.rival.updates == self.take.updates else "One training"
        updates, n = self.take.updates, f"n\u00a0=\u00a0{self.reading.n:,}" if self.reading.n is not None else "n not recorded"
        trained = "Training not recorded" if updates is None else f"{once}, {updates:,} updates" if updates else "Not trained"
        trained += f" in {duration(self.take.trained_s)}" if updates and self.take.trained_s else ""
        return f"{trained}; {n}."


def judges(models: Sequence[Model], reading: Reading) -> list[str]:
    """The measures that speak: the one that hears captions, then how images look; those that are there."""
    hears = next((m for m in names("images") if "scorer" in MEASURES[m].needs and any(x.score(reading, m) for x in models)), None)
    looks = next((m for m in LOOKS if any(x.score(reading, m) for x in models)), None)
    return [m for m in (hears, looks) if m]


def best(models: Sequence[Model], reading: Reading, measures: Sequence[str]) -> Model | None:
    """Who is best by the first measure; of those that it does not tell apart from that one, by the next. None without a score."""
    left = [m for m in models if any(m.score(reading, name) for name in measures)]
    for name in measures:
        scored = {m.name: score for m in left if (score := m.score(reading, name))}
        if scored:
            top = min(scored.values(), key=lambda s: s.loss)
            left = [m for m in left if m.name in scored and not scored[m.name].clearly_worse(top)]
    last = next((name for name in reversed(measures) if any(m.score(reading, name) for m in left)), "")
    return min(left, key=lambda m: (s.loss if (s := m.score(reading, last)) else math.inf, m.name), default=None)


def recommended(size: Size, models: Sequence[Model], reading: Reading, shares: Mapping[str, Mapping[str, float]]) -> Recommendation:
    """What to take of the models whose `shares` of the teacher hold the size; untrained ones only where no trained one does."""
    holds = [m for m in models if m.arch and all(shares[m.name].get(q, math.inf) <= limit for q, limit in size.limits.items())]
    measures = judges(holds, reading)
    candidates = [m for m in holds if m.updates != 0] or holds
    design = best([m for m in candidates if m.design], reading, measures)
    found = best([m for m in candidates if not m.design], reading, measures)
    take = best(candidates, reading, measures)
    if take is found and found and design and not any(c.told > 0 for c in _compared(found, design, reading, measures)):
        take = design
    if take is None:
        return Recommendation(size, reading)
    rival = design if take is found else found
    compared = _compared(take, rival, reading, measures)
    alike = _alike([m for m in candidates if m not in (take, rival)], reading, [c.mine for c in compared])
    compared += _at_best_guidance(take, rival, measures)
    return Recommendation(size, reading, take, rival, compared, alike, spent=shares[take.name])


def _compared(one: Model, other: Model | None, reading: Reading, measures: Sequence[str]) -> list[Comparison]:
    pairs = ((one.score(reading, m), other.score(reading, m) if other else None) for m in measures)
    return [Comparison(mine, theirs) for mine, theirs in pairs if mine and (theirs or not other)]


def _at_best_guidance(one: Model, other: Model | None, measures: Sequence[str]) -> list[Comparison]:
    """How images of both look, each at the guidance that is best for it; [] where they were not drawn at several."""
    looks = [m for m in measures if m in LOOKS]
    both = at_own_best([one, other], looks[0]) if other and looks else []
    return [Comparison(both[0][1], both[1][1], (both[0][0].cfg_scale, both[1][0].cfg_scale))] if both else []


def _alike(others: Sequence[Model], reading: Reading, best_scores: Sequence[Score]) -> list[Model]:
    """Who the first of two measures does not tell apart from what is taken, and is no better by the second, which decided."""
    if len(best_scores) < 2:
        return []
    scored = [(m, [m.score(reading, best.measure) for best in best_scores]) for m in others]
    hears, looks = best_scores
    return [m for m, (a, b) in scored if a and b and not a.clearly_worse(hears) and b.loss >= looks.loss]


def recommendations(data: ReportData) -> list[Recommendation]:
    """One for each size that the runs name, the largest first, by the reading that most models have; none without an evaluation."""
    models, readings = list(data.models.values()), readings_of(data.models)
    found = []
    for size in _sizes(data) if readings else []:
        shares = {m.name: shares_of(m, data, size.convention) for m in models}
        ended = [data.searches[name] for name in size.searches if data.searches[name].ranked]
        answers = dict.fromkeys(f"`{e.score.label}`" for view in ended for e in view.chosen)
        of_size = replace(recommended(size, models, readings[0], shares), answers=list(answers))
        found.append(replace(of_size, command=next_command(data, of_size.take, size.searches)))
    return found


def shares_of(model: Model, data: ReportData, convention: str) -> dict[str, float]:
    """What a model has of the teacher's parameters (whole pipeline), MACs and latency; without what is not known."""
    shares = dict[str, float]()
    if data.graph and model.cost:
        outside = data.outside_params or 0
        shares["params"] = (model.cost.params + outside) / (data.graph.total.params + outside)
        shares["macs"] = model.cost.macs(convention) / data.graph.total.macs(convention)
    if (ratio := model.latency_ratio) is not None:
        shares["latency"] = ratio
    return shares


def _sizes(data: ReportData) -> list[Size]:
    """The budgets of the searches, and the sizes of evaluated designs by hand that no budget is for."""
    sizes = dict[tuple[tuple[str, float], ...], Size]()
    for name, view in data.searches.items():
        # of two budgets on one quantity the smaller one binds
        bounds = {q: (share, text) for q, share, text in sorted(_limits(view), key=lambda bound: -bound[1])}
        bounds = {q: bounds[q] for q in QUANTITIES if q in bounds}
        if bounds:
            limits = {q: share for q, (share, _) in bounds.items()}
            known = sizes.get(tuple(limits.items()))
            searches = [*(known.searches if known else []), name]
            sizes[tuple(limits.items())] = Size({q: text for q, (_, text) in bounds.items()}, limits, searches, view.convention)
    budgets = list(sizes.values())
    for model in data.models.values():
        if model.design and not any(_is_near(shares_of(model, data, size.convention), size) for size in budgets):
            share = shares_of(model, data, "thop")["params"]
            sizes[("params", share),] = Size({"params": model.design}, {"params": share})
    return sorted(sizes.values(), key=lambda size: -next(iter(size.limits.values())))


def _is_near(shares: Mapping[str, float], size: Size) -> bool:
    """True where these shares hold the size and nearly use it up."""
    return all(0 <= limit - shares.get(quantity, -1.0) <= NEAR for quantity, limit in size.limits.items())


def _limits(view: SearchView) -> Iterator[tuple[str, float, str]]:
    """(quantity, share of the teacher, text) of each budget of a search, a latency where the teacher was timed."""
    full = view.scores.get(TEACHER, {}).get("latency")
    for text, (quantity, limit) in view.limits.items():
        if quantity == "params":
            yield quantity, (limit + view.outside_params) / (view.graph.total.params + view.outside_params), text
        elif quantity == "macs":
            yield quantity, limit / view.graph.total.macs(view.convention), text
        elif full and full.value:
            yield quantity, limit / full.value, text
