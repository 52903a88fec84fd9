"""What a reader must know before leaning on a report, and what the report lacks: sentences, computed from its runs."""

from __future__ import annotations

from collections.abc import Iterator

from blockprune.measures.measure import MEASURES
from blockprune.reports import search_text, text
from blockprune.reports.curves import VALIDATED, trained, validated
from blockprune.reports.model_figures import checkpoints, guidance_curves, varied
from blockprune.reports.model_view import ModelView
from blockprune.reports.report_data import ReportData, View
from blockprune.reports.results import NAMES
from blockprune.reports.view import rank_correlation

ENOUGH = 10_000  # images, from which on FID's bias is small beside its differences


def caveats(data: ReportData) -> list[str]:
    """Caveats of every run, each said once."""
    lines: list[str] = []
    for scan in data.scans.values():
        lines += text.caveats(scan)
    for search in data.searches.values():
        if search.ranked:
            lines += search_text.caveats(search)
    if data.models:
        lines += _of_models(data)
    if data.trainings:
        lines.append("Losses of different students or recipes do not compare: the feature term depends on which blocks are tapped.")
    machines = {str(m) for view in data.runs.values() if (m := _machine(view))}
    if len(machines) > 1:
        lines.append(f"Runs are of different machines ({'; '.join(sorted(machines))}): compare latencies within a run only.")
    return list(dict.fromkeys(lines))


def _machine(view: View) -> object:
    made_with = view.made_with if isinstance(view, ModelView) else view.protocol
    return made_with.get("machine") or made_with.get("processor")


def _of_models(data: ReportData) -> Iterator[str]:
    for group in data.groups.values():
        protocol = next(iter(group.values())).protocol
        n = protocol.get("n_images")
        few = text.BIAS if isinstance(n, int) and n < ENOUGH else ""
        counted = f"{n:,}" if isinstance(n, int) else "an unrecorded number of"
        yield (
            f"Evaluated models were judged on {counted} images under the protocol `{protocol.get('name', 'not named')}`: their "
            f"numbers compare only with values of the same n, reference, detector and image treatment.{few}"
        )
        if protocol.get("detector"):
            yield f"Features come from the detector `{protocol['detector']}`; numbers of another detector do not compare."
    if len(data.groups) > 1:
        yield "Tables of evaluated models that stand apart were judged differently: compare within a table only."
    if any(s.quantize for m in data.models.values() for r in m.readings if (s := r.setting)):
        yield "Parameters, MACs and latency are those before quantisation: quantised settings show what it does to quality."


def missing(data: ReportData) -> list[str]:
    """What a full report has and this one has not, and why."""
    return [
        *data.unread,
        *_absent(data),
        *_of_scans(data),
        *_of_searches(data),
        *_of_trainings(data),
        *_gaps(data),
    ]


def _absent(data: ReportData) -> Iterator[str]:
    kinds = {
        "scan": (data.scans, "sensitivity of single blocks, and the rank correlation of the cheap measure with FID"),
        "search": (data.searches, "the history of a search, its finalists, and the trade-off with the budget"),
        "distill": (data.trainings, "curves of the training"),
        "evaluate": (
            data.models,
            "results under a fixed protocol, guidance curves, steps and quantisation, component costs",
        ),
    }
    for command, (runs, what) in kinds.items():
        if not runs:
            yield f"No `{command}` run was given: {what}."
    if data.graph is None:
        yield "No run holds the teacher's graph: the drawing, and costs that follow from it. A scan of the same teacher has it."
    elif data.outside_params is None:
        yield "No run says how many parameters lie outside the U-Net: parameters of the whole pipeline."


def _of_scans(data: ReportData) -> Iterator[str]:
    for name, view in data.scans.items():
        if view.main_measure is None:
            yield f"`{name}` has no quality measure: nothing colours the drawing."
        elif gaps := text.gaps(view):
            yield f"`{name}`: {gaps[0].lower()}{gaps[1:]}"
        if view.main_measure and rank_correlation(view, "eps_mse", "fid") is None:
            yield f"`{name}`: {text.correlation_text(view)}"
        if not view.images:
            yield f"`{name}` has no images."


def _of_searches(data: ReportData) -> Iterator[str]:
    for name, view in data.searches.items():
        if not view.ranked:
            yield f"`{name}` has no finalist that holds the budgets: the search has not ended, or the budget is out of reach."
        if not view.images:
            yield f"`{name}` has no images."


def _of_trainings(data: ReportData) -> Iterator[str]:
    for name, view in data.trainings.items():
        if not trained(view.rows):
            yield f"`{name}` has no training rows: its losses."
        scored = {s.measure for _, s in validated(view.rows) if s.value is not None}
        if absent := [NAMES.get(m, MEASURES[m].title) for m in VALIDATED if m not in scored]:
            yield f"`{name}` has no {', '.join(absent)} along its training."


def _gaps(data: ReportData) -> Iterator[str]:
    for name, model in data.models.items():
        for view in model.views.values():
            yield from _unscored(name, view)
        if not model.priced.components:
            yield f"`{name}` has no rows of component costs."
        if model.cost is None:
            yield f"`{name}` has neither a graph nor component rows: its parameters and MACs."
        if not any(view.images for view in model.views.values()):
            yield f"`{name}` has no images."
    if not data.models:
        return
    groups = data.groups.values()
    if all(model.arch for model in data.models.values()):
        yield "The teacher itself was not evaluated: nothing to compare the students with."
    if not any(map(guidance_curves, groups)):
        yield "No model was evaluated at several guidance scales: guidance curves."
    if not any(varied(view, "steps", "quantize") for group in groups for view in group.values()):
        yield "No model was evaluated at several step counts or quantisations: that table."
    if not any(dict(checkpoints(group)) for group in groups) and not data.trainings:
        yield "No checkpoints were evaluated: scores along the training."


def _unscored(name: str, view: ModelView) -> Iterator[str]:
    for m in VALIDATED:
        without = [s.label for s in view.settings if view.value(s, m) is None]
        if without:
            many = "any setting" if len(without) == len(view.settings) else ", ".join(f"`{label}`" for label in without)
            yield f"`{name}` has no {NAMES.get(m, MEASURES[m].title)} for {many}.{_why(view, m)}"


def _why(view: ModelView, measure: str) -> str:
    """The reason that the rows themselves give."""
    reasons = dict.fromkeys(s.error for rows in view.scores.values() if (s := rows.get(measure)) and s.error)
    return f" {'; '.join(reasons)}." if reasons else ""
