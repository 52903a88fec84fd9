"""From the data of a report to the sections of a page: what is shown, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from blockprune.export.model_card import in_words
from blockprune.measures.measure import MEASURES
from blockprune.model.architecture import Architecture
from blockprune.reports import figures, model_tables, search_figures, search_text, text
from blockprune.reports.captions import warning
from blockprune.reports.curves import VALIDATED, loss_figure, trained, validated, validation_figure
from blockprune.reports.html.parts import Drawing, Drawings, Grid, GridRow, Picture, Subhead, Text, is_small, picture, tile
from blockprune.reports.image_grid import Rows, edit_rows, scan_rows, score_words, search_rows
from blockprune.reports.model_figures import EDITED, checkpoints, guidance_curves, guidance_figure, size_figure, sizes
from blockprune.reports.model_view import Images, ModelView
from blockprune.reports.report_data import ReportData
from blockprune.reports.results import ResultTable, result_tables, results_table
from blockprune.reports.search_view import SearchView
from blockprune.reports.table import Table, count, number
from blockprune.reports.unet import Sensitivity, page_legend, page_svg
from blockprune.reports.view import ScanView, rank_correlation

Part = Table | Picture | Grid | Text | Drawings | Subhead
COLUMNS = 6


@dataclass(frozen=True)
class Section:
    """A heading with what is under it; `id` is its anchor."""

    id: str
    title: str
    parts: Sequence[Part]


def sections(data: ReportData, convention: str) -> list[Section]:
    """Every section for which the runs have data."""
    tabled = result_tables(data)
    all_sections = [
        Section("results", "Results", list(_results(data, tabled, convention))),
        Section("architecture", "What is removed", list(_drawn(data, convention))),
        Section("sensitivity", "What each block costs", list(_sensitivity(data, convention))),
        Section("search", "Search", list(_search(data))),
        Section("training", "Training", list(_training(data))),
        Section("settings", "Guidance, steps and quantisation", list(_settings(data))),
        Section("costs", "Costs by component", [t for t in [model_tables.components(data.models, convention)] if t]),
        Section("images", "Images", list(_images(data))),
    ]
    return [section for section in all_sections if section.parts]


def _results(data: ReportData, tabled: Sequence[ResultTable], convention: str) -> Iterator[Part]:
    scans = {f"Removals of {name}" for name in data.scans}
    for table in tabled:
        if table.title not in scans:
            yield results_table(table, convention)
    budgets = {text: limit for view in data.searches.values() for text, limit in _budgets(view)}
    for group in data.groups.values():
        if points := sizes(group):
            measure = MEASURES[next(iter(points.values()))[1].measure].title
            values = "; ".join(f"{name}: {x:.4g} M parameters, {measure} {number(s.value)}" for name, (x, s) in points.items())
            alt = f"Scatter of {measure} against parameters of the whole pipeline. {values}."
            yield picture(size_figure(points, budgets), alt, f"{measure} against size, one point a model.", list(group))


def _budgets(view: SearchView) -> Iterator[tuple[str, float]]:
    """Budgets of parameters, as millions of the whole pipeline."""
    for words, (quantity, limit) in view.limits.items():
        if quantity == "params":
            yield words, (limit + view.outside_params) / 1e6


def _drawn(data: ReportData, convention: str) -> Iterator[Part]:
    graph, (source, scored) = data.graph, _scored(data)
    if graph is None:
        for arch, names in data.students.items():
            yield Text([f"{' = '.join(names)} removes {len(arch)} blocks of its teacher:"])
            yield Text(in_words(arch), listed=True)
        return
    total = graph.total
    full = f"{count(total.params)} U-Net parameters, {count(total.macs(convention))} MACs a step ({convention})"
    name = f"teacher {data.teacher}".strip()
    drawings = [Drawing(name, full, Markup(page_svg(graph, Architecture(), scored, convention, name)))]
    for arch, names in data.students.items():
        cost = graph.cost(arch)
        macs = cost.macs(convention) / total.macs(convention)
        sub = f"{cost.params / total.params:.1%} of the U-Net's parameters, {macs:.1%} of its MACs"
        name = " = ".join(names)
        drawings.append(Drawing(name, sub, Markup(page_svg(graph, arch, scored, convention, name)), in_words(arch)))
    note = f"Colours: what the removal of each block alone costs, from {source}." if source else "No run scored single removals."
    yield Drawings(drawings, Markup(page_legend(graph, scored)), note)


def _scored(data: ReportData) -> tuple[str, Sensitivity | None]:
    """The run whose single removals give the colours: the first scan with a quality measure, else a search."""
    scored = [(name, Sensitivity.of_scan(scan)) for name, scan in data.scans.items()]
    scored += [(name, Sensitivity.of_search(search)) for name, search in data.searches.items()]
    return next(((name, s) for name, s in scored if s is not None), ("", None))


def _sensitivity(data: ReportData, convention: str) -> Iterator[Part]:
    for name, view in data.scans.items():
        if len(data.scans) > 1:
            yield Subhead(name)
        yield Text(text.summary(view))
        yield from _scan_figures(name, view)
        yield text.ranking_table(view, convention)


def _scan_figures(name: str, view: ScanView) -> Iterator[Picture]:
    main = view.main_measure
    if main is None:
        return
    title = MEASURES[main].title
    alt = f"Bars: every removal by {title}, with 95 % intervals. {text.extremes(view)} The table below has every number."
    yield picture(figures.sensitivity(view), alt.replace("`", ""), text.CAPTIONS["sensitivity.png"], [name])
    alt = f"Scatter: {title} against parameters, MACs and latency saved by each removal; the table below has every number."
    yield picture(figures.tradeoff(view, main), alt, text.CAPTIONS["tradeoff.png"], [name])
    if rank_correlation(view, "eps_mse", "fid"):
        caption = " ".join([text.correlation_text(view), text.agreement(view)]).strip().replace("`", "")
        yield picture(figures.correlation(view), f"Scatter of eps_mse against FID. {caption}", caption, [name])


def _search(data: ReportData) -> Iterator[Part]:
    for name, view in data.searches.items():
        if len(data.searches) > 1:
            yield Subhead(name)
        if view.ranked:
            yield Text([line for line in (warning(view), search_text.summary(view)) if line])
            if lines := search_text.against(view):
                yield Text(lines, listed=True)
        if any(e.score.finite is not None for e in view.search):
            best = min((e.loss for e in view.search if e.fits), default=None)
            alt = f"Best {MEASURES[view.measure].title} so far over {len(view.search)} evaluations"
            alt += f", down to {number(best)}." if best is not None else "."
            yield picture(search_figures.history_figure(view), alt, search_text.CAPTIONS["history.png"], [name])
        if view.ranked:
            budget = ", ".join(view.limits) or "none"
            alt = f"Scatter of quality against {search_figures.NAMES[view.quantity]}; presets by name; budget line {budget}."
            yield picture(search_figures.front_figure(view), alt, search_text.CAPTIONS["front.png"], [name])
        if table := search_text.frequency_table(view):
            yield table


def _training(data: ReportData) -> Iterator[Part]:
    losses = {name: rows for name, view in data.trainings.items() if (rows := trained(view.rows))}
    if losses:
        ends = "; ".join(f"{name} ends at {number(rows[-1]['losses'].get('loss'))}" for name, rows in losses.items())
        alt = f"Training losses on a logarithmic axis over updates: {ends}."
        yield picture(loss_figure(losses), alt, "Each term of the loss, unweighted.", list(losses))
    along = {name: validated(view.rows) for name, view in data.trainings.items()}
    along = {name: scores for name, scores in along.items() if any(s.measure in VALIDATED for _, s in scores)}
    if along:
        alt = f"FID, Inception Score and CLIP score at the validations of {', '.join(along)}."
        yield picture(validation_figure(along), alt, "Scores at the validations of each run.", list(along))
    for group in data.groups.values():
        if evaluated := dict(checkpoints(group)):
            alt = f"FID, Inception Score and CLIP score of checkpoints of {', '.join(evaluated)}, evaluated."
            yield picture(
                validation_figure(evaluated, "Evaluated checkpoints"),
                alt,
                "Checkpoints under the protocol of the result table.",
                list(group),
            )
    for name, view in data.trainings.items():
        if view.images:
            shown = {f"after {step:,} updates": ("", images) for step, images in view.images.items()}
            yield _grid(f"Validation images of {name}, at the same prompts and seeds.", view.prompts, shown, [name])


def _settings(data: ReportData) -> Iterator[Part]:
    for group in data.groups.values():
        if curves := guidance_curves(group):
            values = "; ".join(
                f"{name}: " + ", ".join(f"CFG {s.cfg_scale:g} FID {number(f.value)} CLIP {number(c.value)}" for s, f, c in points)
                for name, points in curves.items()
            )
            alt = f"FID against CLIP score, one curve a model, by guidance scale. {values}."
            yield picture(guidance_figure(curves), alt, "FID against CLIP score; labels are guidance scales.", list(group))
        if table := model_tables.steps_and_quantisation(group):
            yield table


def _images(data: ReportData) -> Iterator[Part]:
    for group in data.groups.values():
        yield from _model_grids(group)
    for name, view in data.scans.items():
        if rows := scan_rows(view):
            yield _grid(f"Removals of {name}, at the same prompts and seeds.", view.prompts, rows, [name])
    for name, search in data.searches.items():
        if rows := search_rows(search):
            yield _grid(f"Finalists of {name}, one-shot, at the same prompts and seeds.", search.prompts, rows, [name])


def _model_grids(group: Mapping[str, ModelView]) -> Iterator[Grid]:
    """Every model at the setting that most of them have images of, else at its own last one; a grid for each list of prompts. Edits
    are shown at every setting, under what was edited."""
    if edits := edit_rows(group):
        yield _grid(EDITED, next(iter(group.values())).prompts, edits, list(group))
        return
    labels = [s.label for view in group.values() for s in view.settings if s.label in view.images]
    if not labels:
        return
    common = max(dict.fromkeys(labels), key=labels.count)
    by_prompts: dict[tuple[str, ...], dict[str, tuple[str, Images]]] = {}
    for name, view in group.items():
        shown = [s.label for s in view.settings if s.label in view.images]
        if shown:
            setting = common if common in shown else shown[-1]
            small = [setting] * (setting != common) + [score_words(view.scores.get(setting, {}))]
            by_prompts.setdefault(tuple(view.prompts), {})[name] = (", ".join(small), view.images[setting])
    for prompts, rows in by_prompts.items():
        yield _grid(f"Evaluated models at {common}, at the same prompts and seeds.", prompts, rows, list(rows))


def _grid(caption: str, prompts: Sequence[str], rows: Rows, runs: Sequence[str]) -> Grid:
    n = min(COLUMNS, *(len(images) for _, images in rows.values()))
    named = list(prompts)[:n] or [f"image {i + 1}" for i in range(n)]
    lines = [GridRow(name, small, [tile(image) for image in images[:n]]) for name, (small, images) in rows.items()]
    return Grid(caption, named, lines, all(is_small(images[0]) for _, images in rows.values()), runs)
