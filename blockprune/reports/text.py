"""The text of a scan's report: its ranking as a table, JSON and Markdown. Every string from outside is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from blockprune.measures.measure import MEASURES, names, quality
from blockprune.measures.score import TEACHER, Score
from blockprune.model.architecture import FITS
from blockprune.reports.table import (
    STEP_LATENCY,
    Cell,
    Column,
    Table,
    count,
    escaped,
    facts_table,
    number,
    share_of,
    step_latency,
    to_markdown,
    with_interval,
)
from blockprune.reports.view import ScanView, places_of, rank_correlation, ranked, ranking

CAPTIONS = {
    "unet.svg": "The U-Net, one cell per block, coloured by what its removal costs in quality.",
    "tradeoff.svg": "Quality lost against what each removal saves.",
    "sensitivity.svg": "Every removal, ranked, with 95 % bootstrap intervals.",
    "grid.png": "Teacher and masks at the same prompts and seeds.",
    "correlation.svg": "The cheap measure against FID.",
    "timesteps.png": "The denoising error of each removal by timestep, and the part of it that guidance by the prompt adds.",
}
BIAS = " FID is biased upwards at small n, by an amount that depends on the model."
RUINOUS = {"fid": 10.0, "is": 0.5, "clip_score": 0.5}  # times the teacher's; KID may be near zero
MANY = 8
SHOWN = 5


def to_json(view: ScanView) -> str:
    """The protocol, what each measure means, the ranking and the rank correlation of `eps_mse` and FID."""
    tau = rank_correlation(view, "eps_mse", "fid")
    data = {
        "format": 1,
        "protocol": dict(view.protocol),
        "main_measure": view.main_measure,
        "measures": {m: MEASURES[m].to_json() for m in view.measures},
        "rank_correlation": {"measures": ["eps_mse", "fid"], "kendall_tau": tau.tau, "n": tau.n} if tau else None,
        "ranking": ranking(view),
    }
    return json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n"


def scan_markdown(view: ScanView, figures: Sequence[str] = ()) -> str:
    """The report; `figures` are the file names of the figures that lie beside it."""
    model = escaped(view.protocol.get("model", "a U-Net"))
    first, rest = [f for f in figures if f == "unet.svg"], [f for f in figures if f != "unet.svg"]
    parts = [
        f"# Scan of {model}",
        *pictures(first, CAPTIONS),
        "## Summary",
        *summary(view),
        "## What was asked",
        to_markdown(facts_table(view.protocol)) if view.protocol else "The protocol was not recorded.",
        "## Ranking",
        _order(view),
        to_markdown(ranking_table(view)),
        *(["## Figures"] if rest else []),
        *pictures(rest, CAPTIONS),
        "## Caveats",
        "\n".join(f"- {line}" for line in caveats(view)),
    ]
    return "\n\n".join(parts) + "\n"


def pictures(names: Iterable[str], captions: Mapping[str, str]) -> list[str]:
    """The figures of these files, each with its caption."""
    return [f"![{captions[name]}]({name})\n\n*{captions[name]}*" for name in names]


def _order(view: ScanView) -> str:
    if (main := view.main_measure) is None:
        return "No quality measure has a value: removals are ordered by the parameters that they save."
    return f"From the least to the most quality lost, by {MEASURES[main].title} (`{main}`). In brackets: 95 % bootstrap intervals."


def ranking_table(view: ScanView, convention: str = "thop") -> Table:
    """Every architecture: the teacher, then from the least to the most quality lost, with what each saves."""
    places, total = places_of(view), view.graph.total
    labels = [label for _, label in places]
    costs = [view.graph.cost(view.archs[label]) for label in labels]
    params = [(total.params - cost.params, total.params) for cost in costs]
    macs = [(total.macs(convention) - cost.macs(convention), total.macs(convention)) for cost in costs]
    steps = [(view.value(n, "latency"), view.value(n, "latency_ratio"), view.interval(n, "latency_ratio")) for n in labels]
    columns = [
        (Column("#", "plain"), [Cell(rank) for rank, _ in places]),
        (Column("removed", "block"), [Cell(label) for label in labels]),
        *(
            (Column(MEASURES[m].heading), [Cell.of(view.score(n, m)) for n in labels])
            for m in view.measures
            if MEASURES[m].of_quality
        ),
        (Column("parameters saved", "share"), [share_of(saved, of, count(saved)) for saved, of in params]),
        (Column(f"MACs saved ({convention})", "share"), [share_of(saved, of, count(saved)) for saved, of in macs]),
        (STEP_LATENCY, [step_latency(*step) for step in steps]),
        (Column("failed", "note"), [Cell(view.error(label) or None) for label in labels]),
    ]
    return Table.of_columns("Ranking", columns)


def summary(view: ScanView) -> list[str]:
    """The findings, a paragraph each, computed from the rows."""
    scored, failed = len(ranked(view)), sum(bool(view.error(label)) for label in view.removals)
    first = f"{len(view.removals)} removals were scanned beside the teacher"
    first += f"; {scored} have a value of `{view.main_measure}`" if view.main_measure else ""
    first += f"; {failed} had a measure that failed (see the last column of the table)" if failed else ""
    return [
        p
        for p in (
            first + ".",
            gaps(view),
            *_against_teacher(view),
            extremes(view),
            *won_back(view),
            *around(view),
            correlation_text(view),
            agreement(view),
        )
        if p
    ]


def gaps(view: ScanView) -> str:
    """What was asked or begun and has no value, in a sentence; "" when nothing is missing."""
    asked = [m for m in view.protocol.get("measures") or () if m in MEASURES and MEASURES[m].kind != "cost"]
    missing: dict[int, list[str]] = {}
    for m in dict.fromkeys("latency_ratio" if m == "latency" else m for m in [*asked, *view.measures]):
        missing.setdefault(sum(view.value(label, m) is None for label in view.removals), []).append(f"`{m}`")
    of = len(view.removals)
    lines = [f"{', '.join(names)} for {n if n < of else 'all'} of {of} removals" for n, names in missing.items() if n]
    return f"Not measured: {'; '.join(lines)}." if lines else ""


def _names(labels: Sequence[str]) -> str:
    shown = ", ".join(f"`{label}`" for label in labels[:MANY])
    return shown + (f" and {len(labels) - MANY} more" if len(labels) > MANY else "")


def compared() -> list[str]:
    """The measures by which a removal can be better than its teacher: no distances to the teacher itself."""
    return [m for m in quality() if not MEASURES[m].paired]


def _against_teacher(view: ScanView) -> list[str]:
    """How the removals compare with the teacher, by every measure of which it has a value and by their paired differences."""
    by = [m for m in compared() if view.value(TEACHER, m) is not None]
    if not by:
        titles = ", ".join(MEASURES[m].title for m in compared())
        return [f"The teacher has none of {titles}: nothing here compares a removal with the teacher's own spread."]
    values = [f"{MEASURES[m].title} {_scored(view, TEACHER, m)} (n = {score.n})" for m in by if (score := view.score(TEACHER, m))]
    return [f"The teacher has {', '.join(values)}.", _paired(view, by), _ruinous(view, by)]


def _paired(view: ScanView, by: Sequence[str]) -> str:
    """How many removals are worse than the teacher beyond the interval of their paired difference, by each measure; who by none."""
    names = _listed([MEASURES[m].title for m in by])
    judged = [n for n in view.removals if all((s := view.score(n, m)) and s.delta_low is not None for m in by)]
    if not judged:
        return f"Nothing is said to be worse, or nearly free: no removal has paired differences of {names} with intervals."
    worsened = {m: [n for n in judged if _is_worse(view, n, m)] for m in by}
    counts = _listed([f"{MEASURES[m].title} for {len(worsened[m])}" for m in by])
    order = [n for n in ranked(view) if n in judged] + [n for n in judged if n not in ranked(view)]
    free = [n for n in order if not any(n in worsened[m] for m in by)]
    last = (
        f"Nearly free, worse beyond noise in none of {names}: {_names(free)}."
        if free
        else f"None is nearly free: worse in none of {names}."
    )
    distances = [f"`{m}`" for m in view.measures if MEASURES[m].paired]
    if distances:
        last += f" Left out: {_listed(distances)} (a distance to the teacher is above zero for whatever changes the output)."
    return (
        "Paired with the teacher on the same seeds and prompts, with the 95 % interval of the difference clear of zero, "
        f"a removal worsens {counts}, and at least one of these for {len(judged) - len(free)} of {len(judged)}. {last}"
    )


def _ruinous(view: ScanView, by: Sequence[str]) -> str:
    """Who multiplies a measure of the teacher's, or divides it, beyond repair."""
    teacher = {m: value for m in RUINOUS if m in by and (value := view.value(TEACHER, m) or 0.0) > 0}
    if not teacher:
        return ""
    ruined = [
        n
        for n in reversed(ranked(view))
        if any(
            (v := view.value(n, m)) is not None and MEASURES[m].loss(v) >= MEASURES[m].loss(RUINOUS[m] * teacher[m])
            for m in teacher
        )
    ]
    rules = [f"{MEASURES[m].title} at {'least ten times' if m == 'fid' else 'most half of'} the teacher's" for m in teacher]
    return f"Ruinous, {' or '.join(rules)}: {_names(ruined)}." if ruined else f"None is ruinous ({' or '.join(rules)})."


def _scored(view: ScanView, label: str, measure: str) -> str:
    return with_interval(view.value(label, measure), *(view.interval(label, measure) or (None, None)))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _is_worse(view: ScanView, label: str, measure: str) -> bool:
    score = view.score(label, measure)
    if score is None or score.delta_low is None or score.delta_high is None:
        return False
    return min(map(MEASURES[measure].loss, (score.delta_low, score.delta_high))) > 0


def extremes(view: ScanView) -> str:
    """The removals that cost least and most by the main measure, in a sentence; "" without one."""
    main = view.main_measure
    if main is None:
        return ""
    order = ranked(view)
    few = min(3, max(1, len(order) // 2))
    least, most = ([f"`{n}` ({number(view.value(n, main))})" for n in part] for part in (order[:few], order[::-1][:few]))
    return f"Cheapest to remove, by `{main}`: {', '.join(least)}; dearest: {', '.join(most)}."


def correlation_text(view: ScanView) -> str:
    """Whether the cheap measure ranks removals as FID does, or why that cannot be said."""
    tau = rank_correlation(view, "eps_mse", "fid")
    if tau is None:
        absent = [m for m in ("eps_mse", "fid") if not ranked(view, m)]
        why = f"no removal has {' or '.join(absent)}" if absent else "too few removals have both, or all are equal in one"
        return f"Rank correlation between `eps_mse` and FID: not available, {why}."
    sure = "ranks like FID" if tau.tau >= 0.7 else "agrees with FID only in part" if tau.tau >= 0.4 else "does not rank like FID"
    return f"Rank correlation between `eps_mse` and FID: Kendall τ = {tau.tau:.2f} over {tau.n} removals; here `eps_mse` {sure}."


def won_back(view: ScanView) -> Iterator[str]:
    """What fits in place of removed blocks make of the main measure, a sentence for each kind."""
    if (main := view.main_measure) is None:
        return
    plain = {arch: label for label, arch in view.archs.items() if not arch.fits}
    for kind in FITS:
        fitted = {label: plain[a.plain] for label, a in view.archs.items() if {k for _, k in a.fits} == {kind} and a.plain in plain}
        values = [(view.value(label, main), view.value(without, main)) for label, without in fitted.items()]
        both = [(fit, nothing) for fit, nothing in values if fit is not None and nothing is not None]
        if both:
            better = sum(MEASURES[main].loss(fit) < MEASURES[main].loss(nothing) for fit, nothing in both)
            before, after = (number(median(pair[i] for pair in both)) for i in (1, 0))
            yield (
                f"With a `{kind}` fit in its place `{main}` is better in {better} of {len(both)} removals; "
                f"the median goes from {before} to {after}."
            )


def around(view: ScanView) -> Iterator[str]:
    """Around a base: the next best removals, and what is worth most to put back, by the paired difference to the base."""
    name = str(view.protocol.get("base") or "")
    measure = next((m for m in ("guided_mse", "eps_mse") if ranked(view, m)), None)
    if not name or measure is None:
        return
    differences = {n: s for n in view.removals if (s := view.score(n, measure)) and s.delta is not None and n[:1] in ("-", "+")}
    order = sorted(differences, key=lambda n: differences[n].delta or 0.0)
    base = next(label for label in view.removals if label[:1] not in ("-", "+"))
    for sign, intro in (("-", "The next to go from"), ("+", "Worth most to put back into")):
        told = [_change(view, base, differences[n]) for n in order if n.startswith(sign)][:SHOWN]
        if told:
            yield f"{intro} `{base}`, by `{measure}` sample by sample: {'; '.join(told)}."


def _change(view: ScanView, base: str, score: Score) -> str:
    params = view.graph.cost(view.archs[score.label]).params - view.graph.cost(view.archs[base]).params
    spread = f" [{score.delta_low:.3g}, {score.delta_high:.3g}]" if score.delta_low is not None else ""
    return f"`{score.label}` {score.delta:+.3g}{spread} for {'-' if params < 0 else '+'}{count(abs(params))} parameters"


def agreement(view: ScanView) -> str:
    """How each cheap measure ranks the removals beside each dear one; "" unless there are two cheap ones."""
    cheap = [m for m in names("denoising") if ranked(view, m)]
    rows = [
        (m, [f"{tau.tau:.2f} with {MEASURES[d].title}" for d in ("fid", "clip_score") if (tau := rank_correlation(view, m, d))])
        for m in cheap
    ]
    if len(cheap) < 2 or not all(taus for _, taus in rows):
        return ""
    return "Kendall τ of the cheap measures: " + "; ".join(f"`{m}` {' and '.join(taus)}" for m, taus in rows) + "."


def caveats(view: ScanView) -> list[str]:
    """What a reader must know before leaning on the numbers."""
    lines = [
        "Scores are one-shot: blocks are removed and nothing is retrained. What is best now need not be best after training.",
        "Quality does not add up over blocks: two removals together must be measured. Parameters and MACs do add up.",
    ]
    seen = [m for m in quality() if "detector" in MEASURES[m].needs and view.score(TEACHER, m)]
    for m in seen:
        if (score := view.score(TEACHER, m)) and score.n and not MEASURES[m].paired:
            same = "compares only with values of the same n, reference and detector"
            lines.append(f"{MEASURES[m].title} is over n = {score.n} images and {same}.{BIAS if m == 'fid' else ''}")
    detector = view.protocol.get("detector")
    if detector and seen:
        lines.append(f"Features come from the detector {escaped(detector)}; numbers of another detector do not compare.")
    if racing := view.protocol.get("racing"):
        lines.append(f"Removals got images as long as their rank by {escaped(racing)} was open: n differs, and is in `scan.csv`.")
    if {"latency", "latency_ratio"} & set(view.measures):
        machine = view.protocol.get("machine") or view.protocol.get("processor")
        where = escaped(machine) if machine else "a machine that the protocol does not name"
        lines.append(f"Latency was measured on {where}, and holds there; block latencies do not add up exactly.")
    lines.append("MACs count one U-Net step at batch 1, without guidance doubling, as thop does (one multiply-add = 1 MAC).")
    return lines
