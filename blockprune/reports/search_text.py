"""The text of a search's report: best.json, pareto.json, its tables and Markdown. Every string from outside is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from blockprune.export.model_card import in_words
from blockprune.measures.intervals import kendall_tau
from blockprune.measures.measure import MEASURES
from blockprune.measures.score import TEACHER
from blockprune.model.graph import CONVENTIONS
from blockprune.reports.captions import caption_title, warning
from blockprune.reports.search_view import SearchView
from blockprune.reports.table import STEP_LATENCY, Cell, Column, Table, escaped, facts_table, share_of, to_markdown, with_interval
from blockprune.reports.text import pictures
from blockprune.runs.records import PRESET, Evaluation


def best_json(view: SearchView) -> str:
    """The winner: architecture, exact cost, scores with n, seed and interval, what to be warned of, protocol, versions."""
    best = view.best
    cost = view.cost(best)
    data = {
        "format": 1,
        "architecture": best.candidate.arch.to_json(),
        "label": best.score.label,
        "source": best.candidate.source,
        "warning": warning(view),
        "cost": cost.to_json() | {"pipeline_params": cost.params + view.outside_params},
        "teacher_cost": view.graph.total.to_json() | {"pipeline_params": view.graph.total.params + view.outside_params},
        "scores": [s.to_json() for s in [best.score, *view.scores.get(best.score.label, {}).values()]],
        "score_in_search": next(e.score.to_json() for e in view.search if e.candidate.arch == best.candidate.arch),
        "score_recovered": after.score.to_json() if (after := view.after(best)) else None,
        "n_evaluations": len(view.search),
        "protocol": dict(view.protocol),
    }
    return json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n"


def rows(view: SearchView) -> list[dict[str, Any]]:
    """One flat row per finalist, the winner or the front first, then those that hold the budgets by score, then the others."""
    return [_row(view, rank, e) for rank, e in enumerate(view.order, 1)]


def _row(view: SearchView, rank: int, e: Evaluation) -> dict[str, Any]:
    cost, scores = view.cost(e), view.scores.get(e.score.label, {})
    row: dict[str, Any] = {"rank": rank, "label": e.score.label, "source": e.candidate.source, "holds_budget": view.holds(e)}
    row |= {"on_front": e in view.front(view.protocol["pareto"])} if view.protocol["pareto"] else {}
    row |= {view.measure: e.score.value, "low": e.score.low, "high": e.score.high, "n": e.score.n, "seed": e.score.seed}
    if (after := view.after(e)) is not None:
        row |= {"recovered_updates": after.updates}
        row |= {"recovered": after.score.value, "recovered_low": after.score.low, "recovered_high": after.score.high}
    if (caption := view.caption(e)) is not None:
        names = ("n", "low", "high", "delta", "delta_low", "delta_high")
        row |= {"clip_score": caption.value} | {f"clip_score_{name}": getattr(caption, name) for name in names}
    elif view.caption(None) is not None:
        row |= {"clip_score": None}
    row |= {m: scores[m].value if m in scores else None for m in _others(view) if m != "clip_score"}
    row |= {"params": cost.params, "pipeline_params": cost.params + view.outside_params}
    return row | {f"macs_{c}": cost.macs(c) for c in CONVENTIONS} | {"removed": " ".join(e.candidate.arch.terms)}


def _others(view: SearchView) -> list[str]:
    """The measures of finalists beside the objective and the costs, in the order of `MEASURES`, but what captions say first."""
    seen = {m for e in view.finals for m in view.scores.get(e.score.label, {})}
    return sorted((m for m in MEASURES if m in seen and m != view.measure), key=lambda m: m != "clip_score")


def pareto_json(view: SearchView) -> str:
    """The front of the finalists: quality against parameters, MACs or latency, smallest first."""
    points = [
        {
            "architecture": e.candidate.arch.to_json(),
            "label": e.score.label,
            "source": e.candidate.source,
            "share_of_teacher": view.share(e, view.quantity),
            "cost": view.cost(e).to_json(),
            "score": e.score.to_json(),
            "knee": e == view.knee,
        }
        for e in view.front(view.quantity)
    ]
    return json.dumps({"format": 1, "quantity": view.quantity, "measure": view.measure, "front": points}, indent=2) + "\n"


def finding(searches: Mapping[str, SearchView]) -> str:
    """In how many searches something found beats the best design by hand within its budget, before any training, in a line."""
    ranked = [view for view in searches.values() if view.ranked]
    if not ranked:
        return "No search has ended." if searches else ""
    pairs = [(view.judged(best), view.judged(p)) for view in ranked for p in _best_design(view) if (best := _found(view, p))]
    apart = sum(p.score.clearly_worse(best.score) for best, p in pairs)
    evaluations = sum(len(view.search) - view.n_taken_over for view in ranked)
    said = f"{evaluations:,} evaluation{'s' * (evaluations != 1)}"
    if not pairs:
        searches_of = f"One search of {said}" if len(ranked) == 1 else f"{len(ranked)} searches of {said} in all"
        return f"{searches_of}; no design by hand was small enough to compare with."
    if len(ranked) == 1:
        better = f"the search ({said}) {'beats' if apart else 'does not beat'}"
    else:
        better = f"{apart} of {len(pairs)} searches ({said} in all) beat"
    return f"Before any training, by {MEASURES[ranked[0].measure].title}, {better} the design by hand, 95 % intervals apart."


def _best_design(view: SearchView) -> list[Evaluation]:
    """The best preset that holds the budgets; none where none does."""
    sound = [e for e in view.known_designs if view.holds(e) and e.score.value is not None]
    return sorted(sound, key=lambda e: view.judged(e).loss)[:1]


def _found(view: SearchView, design: Evaluation) -> Evaluation | None:
    """What was found for the place of a design: the best within the budgets, and on a front the best that is no larger."""
    if view.is_front:
        return view.against(design)
    return next((e for e in view.ranked if e.candidate.source != PRESET), None)


def against(view: SearchView) -> list[str]:
    """For each preset, whether something found beats it at no larger size, with intervals that do not overlap."""
    lines, size = [], " and ".join(QUANTITIES[q] for q in view.quantities)
    for preset in view.known_designs:
        best, name = view.against(preset), f"`{escaped(preset.score.label)}`"
        if best is None:
            lines.append(f"No finalist is as small as {name} in {size}: ask for its size as a budget to compare with it.")
            continue
        mine, theirs = view.judged(best), view.judged(preset)
        scores = f"`{best.score.label}` {_scored(mine)} against {name} {_scored(theirs)} (n = {mine.score.n}, fresh seeds)"
        if mine.score.bounds[1] < theirs.score.bounds[0]:
            lines.append(f"Better than {name} at no more {size}, intervals apart: {scores}.{_larger(view, best, preset)}")
        elif mine.loss < theirs.loss:
            lines.append(f"Better than {name} at no more {size}, but the intervals overlap: {scores}.{_larger(view, best, preset)}")
        else:
            lines.append(f"Not better than {name}: {scores}. The hand design stays ahead on this measure.")
    return lines


def _larger(view: SearchView, best: Evaluation, preset: Evaluation) -> str:
    """What is not budgeted and where the finalist takes more than the preset."""
    lines = []
    for q in ("params", "macs"):
        mine, theirs = view.share(best, q), view.share(preset, q)
        if q not in view.quantities and mine > theirs:
            lines.append(f" It takes more {QUANTITIES[q]}: {mine:.1%} of the teacher's against {theirs:.1%}.")
    return "".join(lines)


def _scored(e: Evaluation) -> str:
    return with_interval(e.score.value, e.score.low, e.score.high)


def _front_summary(view: SearchView) -> str:
    front, quantity = view.chosen, str(view.protocol["pareto"])
    ends = [f"`{escaped(e.score.label)}` at {view.share(e, quantity):.1%} with {_scored(e)}" for e in (front[0], front[-1])]
    knee = f" The front bends most at `{escaped(view.knee.score.label)}`." if view.knee else ""
    return (
        f"{len(front)} of {len(view.finals)} finalists are on the front of {view.measure} and {QUANTITIES[quantity]}"
        f", from {' to '.join(ends)}, on n = {front[0].score.n} samples of fresh seeds, after {_evaluations(view)}. "
        f"No budget was given, so none of them is the best: choose by `pareto.json`.{knee}"
    )


def summary(view: SearchView) -> str:
    if view.is_front:
        return _front_summary(view)
    best, measure = view.best, MEASURES[view.measure]
    cost, total = view.cost(best), view.graph.total
    whole = f"{view.params(cost) / 1e6:,.4g} M of {view.params(total) / 1e6:,.4g} M parameters in the {view.scope}"
    shares = f"{whole} ({view.share(best, 'params'):.1%}), {cost.thop / total.thop:.1%} of the U-Net's MACs (thop)"
    ratio = view.latency_ratio(best)
    timed = f", {ratio:.1%} of its measured step latency" if ratio is not None else ""
    return (
        f"`{best.score.label}` has the best {measure.title}, {_scored(best)}, of {len(view.ranked)} finalists within the budget"
        f"{_bounded(view)}, "
        f"on n = {best.score.n} samples of fresh seeds, after {_evaluations(view)}. It keeps {shares}{timed}."
    )


def _evaluations(view: SearchView) -> str:
    """How many there are, and how many of them another run had made."""
    taken = f", {view.n_taken_over:,} of them taken over from another run" if view.n_taken_over else ""
    return f"{len(view.search):,} evaluations{taken}"


def _bounded(view: SearchView) -> str:
    return f" and with {' and '.join(view.bounds)}" if view.bounds else ""


def search_markdown(view: SearchView, figures: Sequence[str]) -> str:
    """The report; `figures` are the file names of the figures that lie beside it."""
    first, rest = ([f for f in figures if f.startswith("unet") == is_first] for is_first in (True, False))
    removed = "\n".join(f"- {line}" for line in in_words(view.chosen[0].candidate.arch)) or "Nothing."
    if view.is_front:
        lines = [f"- `{escaped(e.score.label)}`: {'; '.join(in_words(e.candidate.arch)) or 'nothing'}" for e in view.chosen]
        removed = "\n".join(lines)
    asked = view.protocol["budget"] or f"front over {view.protocol['pareto']}"
    parts = [
        f"**{escaped(warned[:1].upper() + warned[1:])}.**" if (warned := warning(view)) else "",
        f"# Search on {escaped(view.protocol.get('model', 'a U-Net'))}: {escaped(asked)}",
        summary(view),
        *pictures(first, CAPTIONS),
        "## What is removed",
        removed,
        "## Against the known designs",
        "\n".join(f"- {line}" for line in against(view)) or "No preset of this U-Net fits the budget.",
        "## Finalists, on fresh seeds",
        to_markdown(finalists_table(view, [m for m in _others(view) if MEASURES[m].of_quality])),
        *(["## After recovery", _recovery(view)] if view.recovered else []),
        *(["## Figures"] if rest else []),
        *pictures(rest, CAPTIONS),
        *([f"## {frequency.title}", to_markdown(frequency)] if (frequency := frequency_table(view)) else []),
        "## What was asked",
        to_markdown(facts_table(view.protocol)),
        "## Caveats",
        "\n".join(f"- {line}" for line in caveats(view)),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


QUANTITIES = {"params": "parameters", "macs": "MACs", "latency": "latency"}
CAPTIONS: Mapping[str, str] = {
    "unet-best.svg": "The U-Net of the architecture found: what it lacks is hatched.",
    "unet-preset.svg": "The U-Net of the preset that is nearest in size.",
    "history.svg": "The best score so far against the number of evaluations; steps where the way of proposing changes are named.",
    "front.svg": "Every architecture scored: quality against size, with presets, the budget and the front of the finalists.",
    "grid.png": "Teacher, presets and finalists at the same prompts and seeds.",
}


def finalists_table(view: SearchView, measures: Sequence[str]) -> Table:
    """The teacher and the finalists, the winner or the front first, with the objective, these measures and what each costs."""
    order, total = view.order, view.graph.total
    costs = [total, *map(view.cost, order)]
    scores = [view.scores.get(label, {}) for label in (TEACHER, *(e.score.label for e in order))]
    answers = [Cell(_answer(view, e)) for e in order]
    columns = [
        (Column("#", "plain"), [Cell(), *map(Cell, range(1, len(order) + 1))]),
        (Column("architecture", "code"), [Cell("teacher"), *(Cell(e.score.label) for e in order)]),
        (Column(view.measure), [Cell(), *(replace(Cell.of(e.score), remark=e.score.error) for e in order)]),
        *((Column(caption_title(view) if m == "clip_score" else m), [Cell.of(s.get(m)) for s in scores]) for m in measures),
        (Column(f"parameters, {view.scope}", "share"), [share_of(view.params(cost), view.params(total)) for cost in costs]),
        (Column("MACs (thop)", "share"), [share_of(cost.thop, total.thop) for cost in costs]),
        (STEP_LATENCY, [Cell.of(s.get("latency_ratio")) for s in scores]),
        (Column("on the front" if view.is_front else "within budget", "text"), [Cell(), *answers]),
    ]
    return Table.of_columns("Finalists", columns)


def _answer(view: SearchView, e: Evaluation) -> str:
    """Whether a finalist is among what the search answers, or may be."""
    if view.is_front:
        return "knee" if e == view.knee else "yes" if e in view.chosen else "no"
    return "yes" if view.holds(e) else "no"


def _recovery(view: SearchView) -> str:
    """What a short distillation changes, and whether the order survives it."""
    pairs = [(e, after) for e in view.ranked if (after := view.after(e)) is not None]
    updates = view.stops
    columns = [Column("architecture", "code"), *(Column(text) for text in ("one-shot", *(f"{n} updates" for n in updates)))]
    blank = [Cell()] * len(updates)
    rows = [[Cell(e.score.label), *[Cell.of(s) for s in (e.score, *after.tiers)], *blank[len(after.tiers) :]] for e, after in pairs]
    taus = [_tau([(e.loss, after.tiers[i].loss) for e, after in pairs if len(after.tiers) > i]) for i in range(len(updates))]
    order = "; ".join(f"{tau} with that after {n} updates" for tau, n in zip(taus, updates, strict=True) if tau)
    intro = (
        f"Every finalist was distilled for {updates[0]} updates (`--recover`) on the same samples, the best third went on at each "
        "further number; the last score of each decides."
    )
    told = f"Kendall τ of the one-shot order: {order}." if order else ""
    return f"{intro}\n\n{to_markdown(Table(view.measure, columns, rows))}\n\n{told}".strip()


def _tau(pairs: Sequence[tuple[float, float]]) -> str:
    tau = kendall_tau([a for a, _ in pairs], [b for _, b in pairs])
    return "" if tau is None else f"{tau:.2f} (n = {len(pairs)})"


def frequency_table(view: SearchView) -> Table | None:
    """How often each unit is removed among the best tenth of a search; None when none is."""
    shares = sorted(view.frequency().items(), key=lambda item: -item[1])
    rows = [[Cell(label), Cell(share)] for label, share in shares if share]
    note = f"Of {len(shares)} units, the {len(shares) - len(rows)} that are not listed never are."
    columns = [Column("unit", "block"), Column("removed in", "share")]
    return Table("How often a unit is removed among the best tenth", columns, rows, note) if rows else None


def _with_fits(view: SearchView) -> str:
    fit = view.protocol.get("score_fit")
    return f"; each architecture is scored with {fit} maps fitted in place of its blocks, which it does not keep" if fit else ""


def caveats(view: SearchView) -> list[str]:
    """What a reader must know before leaning on the numbers."""
    lines = [
        f"Scores are one-shot: nothing is retrained{_with_fits(view)}. What is best now need not be best after distillation.",
        "The search's own scores favour what was lucky on its samples; the choice is by fresh seeds, on other noise and timesteps.",
        f"Scores compare only under the same protocol: {MEASURES[view.measure].title}, n = {view.chosen[0].score.n}.",
    ]
    if any(q == "latency" for q, _ in view.limits.values()):
        lines.append("In the search latency is predicted from single removals; finalists are measured, in turn with the teacher.")
    return lines
