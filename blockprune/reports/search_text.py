"""The text of a search's report: best.json, finalists.csv, pareto.json and Markdown. Every string from outside is escaped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from blockprune.export.model_card import in_words
from blockprune.measures.measure import MEASURES
from blockprune.measures.score import TEACHER, Score
from blockprune.measures.statistics import kendall_tau
from blockprune.model.architecture import CONVENTIONS
from blockprune.reports.captions import caption_title, warning
from blockprune.reports.search_view import SearchView
from blockprune.reports.text import escaped, table, with_interval
from blockprune.reports.view import short
from blockprune.runs.records import Evaluation


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
    cost, own = view.cost(e), view.scores.get(e.score.label, {})
    row: dict[str, Any] = {"rank": rank, "label": e.score.label, "source": e.candidate.source, "holds_budget": view.holds(e)}
    row |= {"on_front": e in view.front(view.protocol["pareto"])} if view.protocol["pareto"] else {}
    row |= {view.measure: e.score.value, "low": e.score.low, "high": e.score.high, "n": e.score.n, "seed": e.score.seed}
    if (after := view.after(e)) is not None:
        row |= {"recovered": after.score.value, "recovered_low": after.score.low, "recovered_high": after.score.high}
    if (caption := view.caption(e)) is not None:
        names = ("n", "low", "high", "delta", "delta_low", "delta_high")
        row |= {"clip_score": caption.value} | {f"clip_score_{name}": getattr(caption, name) for name in names}
    elif view.caption(None) is not None:
        row |= {"clip_score": None}
    row |= {m: own[m].value if m in own else None for m in _others(view) if m != "clip_score"}
    row |= {"params": cost.params, "pipeline_params": cost.params + view.outside_params}
    return row | {f"macs_{c}": cost.macs(c) for c in CONVENTIONS} | {"removed": " ".join(e.candidate.arch)}


def _others(view: SearchView) -> list[str]:
    """The measures of finalists beside the objective and the costs, in the order of `MEASURES`, but what captions say first."""
    seen = {m for e in view.finals for m in view.scores.get(e.score.label, {})}
    return sorted((m for m in MEASURES if m in seen and m != view.measure), key=lambda m: m != "clip_score")


def finalists_csv(view: SearchView) -> str:
    out = io.StringIO()
    lines = rows(view)
    columns = dict.fromkeys(name for line in sorted(lines, key=len, reverse=True) for name in line)
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def pareto_json(view: SearchView, quantity: str) -> str:
    """The front of the finalists: quality against parameters, MACs or latency, smallest first."""
    points = [
        {
            "architecture": e.candidate.arch.to_json(),
            "label": e.score.label,
            "source": e.candidate.source,
            "share_of_teacher": view.share(e, quantity),
            "cost": view.cost(e).to_json(),
            "score": e.score.to_json(),
        }
        for e in view.front(quantity)
    ]
    return json.dumps({"format": 1, "quantity": quantity, "measure": view.measure, "front": points}, indent=2) + "\n"


def against(view: SearchView) -> list[str]:
    """For each preset, whether something found beats it at no larger size, with intervals that do not overlap."""
    lines, size = [], " and ".join(QUANTITIES[q] for q in view.quantities)
    for preset in view.known_designs:
        own, name = view.against(preset), f"`{escaped(preset.score.label)}`"
        if own is None:
            lines.append(f"No finalist is as small as {name} in {size}: ask for its size as a budget to compare with it.")
            continue
        mine, theirs = view.judged(own), view.judged(preset)
        said = f"`{own.score.label}` {_scored(mine)} against {name} {_scored(theirs)} (n = {mine.score.n}, fresh seeds)"
        if mine.score.bounds[1] < theirs.score.bounds[0]:
            lines.append(f"Better than {name} at no more {size}, intervals apart: {said}.{_larger(view, own, preset)}")
        elif mine.loss < theirs.loss:
            lines.append(f"Better than {name} at no more {size}, but the intervals overlap: {said}.{_larger(view, own, preset)}")
        else:
            lines.append(f"Not better than {name}: {said}. The hand design stays ahead on this measure.")
    return lines


def _larger(view: SearchView, own: Evaluation, preset: Evaluation) -> str:
    """What is not budgeted and where the finalist takes more than the preset."""
    lines = []
    for q in ("params", "macs"):
        mine, theirs = view.share(own, q), view.share(preset, q)
        if q not in view.quantities and mine > theirs:
            lines.append(f" It takes more {QUANTITIES[q]}: {mine:.1%} of the teacher's against {theirs:.1%}.")
    return "".join(lines)


def _scored(e: Evaluation) -> str:
    return with_interval(e.score.value, e.score.low, e.score.high)


def _front_summary(view: SearchView) -> str:
    front, quantity = view.chosen, str(view.protocol["pareto"])
    ends = [f"`{escaped(e.score.label)}` at {view.share(e, quantity):.1%} with {_scored(e)}" for e in (front[0], front[-1])]
    return (
        f"{len(front)} of {len(view.finals)} finalists are on the front of {view.measure} and {QUANTITIES[quantity]}"
        f", from {' to '.join(ends)}, on n = {front[0].score.n} samples of fresh seeds, after {len(view.search)} evaluations. "
        "No budget was given, so none of them is the best: choose by `pareto.json`."
    )


def summary(view: SearchView) -> str:
    if view.is_front:
        return _front_summary(view)
    best, measure = view.best, MEASURES[view.measure]
    cost, total, outside = view.cost(best), view.graph.total, view.outside_params
    whole = f"{(cost.params + outside) / 1e6:,.4g} M of {(total.params + outside) / 1e6:,.4g} M parameters in the whole pipeline"
    shares = f"{whole} ({view.share(best, 'params'):.1%}), {cost.thop / total.thop:.1%} of the U-Net's MACs (thop)"
    ratio = view.latency_ratio(best)
    timed = f", {ratio:.1%} of its measured step latency" if ratio is not None else ""
    return (
        f"`{best.score.label}` has the best {measure.title}, {_scored(best)}, of {len(view.ranked)} finalists within the budget, "
        f"on n = {best.score.n} samples of fresh seeds, after {len(view.search)} evaluations. It keeps {shares}{timed}."
    )


def search_markdown(view: SearchView, figures: Sequence[str]) -> str:
    """The report; `figures` are the file names of the figures that lie beside it."""
    protocol = [(escaped(k), escaped(v)) for k, v in view.protocol.items()]
    unets = [name for name in figures if name.startswith("unet-")]
    titles = {"unet-best.svg": "the architecture found", "unet-preset.svg": "the nearest preset"}
    drawn = table([titles[n] for n in unets], [[f"![U-Net of {titles[n]}]({n})" for n in unets]]) if unets else ""
    rest = [name for name in figures if name not in unets]
    removed = "\n".join(f"- {line}" for line in in_words(view.chosen[0].candidate.arch)) or "Nothing."
    if view.is_front:
        lines = [f"- `{escaped(e.score.label)}`: {'; '.join(in_words(e.candidate.arch)) or 'nothing'}" for e in view.chosen]
        removed = "\n".join(lines)
    asked = view.protocol["budget"] or f"front over {view.protocol['pareto']}"
    parts = [
        f"**{escaped(warned[:1].upper() + warned[1:])}.**" if (warned := warning(view)) else "",
        f"# Search on {escaped(view.protocol.get('model', 'a U-Net'))}: {escaped(asked)}",
        summary(view),
        drawn,
        "## What is removed",
        removed,
        "## Against the known designs",
        "\n".join(f"- {line}" for line in against(view)) or "No preset of this U-Net fits the budget.",
        "## Finalists, on fresh seeds",
        _finalists(view),
        *(["## After recovery", _recovery(view)] if view.recovered else []),
        *(["## Figures"] if rest else []),
        *(f"![{CAPTIONS[name]}]({name})\n\n*{CAPTIONS[name]}*" for name in rest),
        "## How often each unit is removed among the best tenth",
        _frequency(view),
        "## What was asked",
        table(["", ""], protocol),
        "## Caveats",
        "\n".join(f"- {line}" for line in caveats(view)),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


QUANTITIES = {"params": "parameters", "macs": "MACs", "latency": "latency"}
CAPTIONS: Mapping[str, str] = {
    "history.png": "The best score so far against the number of evaluations; steps where the way of proposing changes are named.",
    "front.png": "Every architecture scored: quality against size, with presets, the budget and the front of the finalists.",
    "grid.png": "Teacher, presets and finalists at the same prompts and seeds.",
}


def _finalists(view: SearchView) -> str:
    others = [m for m in _others(view) if m not in ("latency", "params", "macs")]
    titles = [caption_title(view) if m == "clip_score" else m for m in others]
    last = "on the front" if view.is_front else "within budget"
    head = ["#", "architecture", view.measure, *titles, "parameters", "MACs (thop)", last]
    total, teacher = view.graph.total, view.scores.get(TEACHER, {})
    lines = [["-", "teacher", "-", *(_cell(teacher.get(m)) for m in others), "100.0%", "100.0%", "-"]]
    for row, e in zip(rows(view), view.order, strict=True):
        own = view.scores.get(e.score.label, {})
        cells = [
            str(row["rank"]),
            f"`{escaped(e.score.label)}`",
            _scored(e) if e.score.value is not None else escaped(e.score.error),
        ]
        cells += [_cell(own.get(m)) for m in others]
        cost = view.cost(e)
        cells += [f"{cost.params / total.params:.1%}", f"{cost.thop / total.thop:.1%}", "yes" if in_answer(view, e) else "no"]
        lines.append(cells)
    return table(head, lines)


def _cell(score: Score | None) -> str:
    return with_interval(score.value, score.low, score.high) if score else "-"


def in_answer(view: SearchView, e: Evaluation) -> bool:
    """True for what is on the front, or where there is none for what holds the budgets."""
    return e in view.chosen if view.is_front else view.holds(e)


def _recovery(view: SearchView) -> str:
    """What a short distillation changes, and whether the order survives it."""
    pairs = [(e, after) for e in view.ranked if (after := view.after(e)) is not None]
    lines = [[f"`{escaped(e.score.label)}`", _scored(e), _scored(after)] for e, after in pairs]
    told = table(["architecture", f"{view.measure}, one-shot", f"{view.measure}, recovered"], lines)
    tau = kendall_tau([e.loss for e, _ in pairs], [after.loss for _, after in pairs])
    order = f"Kendall τ between the two orders is {tau:.2f} over {len(pairs)} architectures." if tau is not None else ""
    return (
        f"Every finalist was distilled briefly (`--recover`) on the same samples; these scores decide.\n\n{told}\n\n{order}".strip()
    )


def _frequency(view: SearchView) -> str:
    order = sorted(view.frequency().items(), key=lambda item: -item[1])
    always = [short(label) for label, share in order if share == 1]
    never = [short(label) for label, share in order if share == 0]
    some = [[short(label), f"{share:.0%}"] for label, share in order if 0 < share < 1]
    lines = [f"Always: {', '.join(always) or 'none'}.", f"Never: {', '.join(never) or 'none'}."]
    return "\n\n".join([*lines, table(["unit", "removed in"], some) if some else ""]).strip()


def caveats(view: SearchView) -> list[str]:
    """What a reader must know before leaning on the numbers."""
    lines = [
        "Scores are one-shot: nothing is retrained. What is best now need not be best after distillation.",
        "The search's own scores favour what was lucky on its samples; the choice is by fresh seeds, on other noise and timesteps.",
        f"Scores compare only under the same protocol: {MEASURES[view.measure].title}, n = {view.chosen[0].score.n}.",
    ]
    if any(q == "latency" for q, _ in view.limits.values()):
        lines.append("In the search latency is predicted from single removals; finalists are measured, in turn with the teacher.")
    return lines
