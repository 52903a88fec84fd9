"""From the data of a report to the sections of a page: one for each question, with what the runs answer in a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from blockprune.export.model_card import in_words
from blockprune.model.architecture import Architecture
from blockprune.reports import curves, figures, model_figures, model_tables, search_figures, search_text, text
from blockprune.reports.captions import warning
from blockprune.reports.html.parts import Charts, Drawing, Drawings, Fold, Grid, GridRow, Part, Section, Text, is_small, tile
from blockprune.reports.image_grid import Rows, edit_rows, scan_rows, score_words, search_rows
from blockprune.reports.model_view import Images, ModelView
from blockprune.reports.recommendation import Recommendation
from blockprune.reports.report_data import ReportData
from blockprune.reports.results import DISTILLED, EVALUATED, ResultTable, results_table
from blockprune.reports.search_view import SearchView
from blockprune.reports.table import count
from blockprune.reports.unet import Sensitivity, page_legend, page_svg
from blockprune.reports.view import ScanView, rank_correlation

COLUMNS = 6


def sections(data: ReportData, tabled: Sequence[ResultTable], taken: Sequence[Recommendation], convention: str) -> list[Section]:
    """Every section for which the runs have data."""
    by_run = {table.run: results_table(table, convention) for table in tabled}
    evaluated = [results_table(table, convention) for table in tabled if table.title == EVALUATED]
    scans = [text.extremes(view) or text.summary(view)[0] for view in data.scans.values()]
    costs = model_tables.components({name: model.priced for name, model in data.models.items()}, convention)
    settings = [curve for group in data.groups.values() for curve in model_figures.guidance_curves(group).items()]
    shown = [
        Section("blocks", "Blocks", "What each block costs", "".join(scans[:1]), list(_blocks(data, convention))),
        Section("remove", "Removed", "What to remove", _removal(data, taken), list(_drawn(data, convention))),
        Section("search", "Search", "How the search went", search_text.finding(data.searches), list(_search(data, by_run))),
        Section(
            "training", "Training", "How training went", curves.finding(_along(data)), list(_training(data, tabled, convention))
        ),
        Section(
            "settings",
            "Settings",
            "Guidance, steps, quantisation",
            model_figures.finding(dict(settings)) or f"{len(data.models)} models, every number.",
            [*_settings(data), *(Fold(f"Every number: {t.note}", "", [t]) for t in evaluated)],
        ),
        Section("costs", "Costs", "Costs by component", model_tables.finding(data.models), [costs] if costs else []),
        Section("images", "Images", "Images", "The same prompts and seeds for all.", list(_images(data))),
    ]
    return [section for section in shown if section.parts]


def _blocks(data: ReportData, convention: str) -> Iterator[Part]:
    for name, view in data.scans.items():
        parts: list[Part] = [Text(text.summary(view)), *_scan_charts(view), text.ranking_table(view, convention)]
        yield from parts if len(data.scans) == 1 else [Fold(name, text.extremes(view), parts)]


def _scan_charts(view: ScanView) -> Iterator[Charts]:
    main = view.main_measure
    if main is None:
        return
    for sheet in (figures.sensitivity(view), figures.tradeoff(view, main)):
        yield Charts.of(*sheet.plots, note=f"{sheet.heading}. {sheet.note}")
    if rank_correlation(view, "eps_mse", "fid"):
        said = " ".join(filter(None, (text.correlation_text(view), text.agreement(view))))
        yield Charts.of(*figures.correlation(view).plots, note=said)


def _removal(data: ReportData, taken: Sequence[Recommendation]) -> str:
    """How many blocks and parameters each recommended model lacks."""
    models = {r.take.name: r.take for r in taken if r.take}
    if not models or data.graph is None:
        return f"{len(data.students)} architectures, drawn; what each lacks is hatched."
    graph, outside = data.graph, data.outside_params or 0
    gone = {n: 100 - 100 * (graph.cost(m.arch).params + outside) / (graph.total.params + outside) for n, m in models.items()}
    said = [f"`{n}` lacks {len(m.arch)} blocks with {gone[n]:.0f} % of the parameters" for n, m in models.items()]
    return f"{'; '.join(said)}. Removed blocks are hatched in the drawings."


def _drawn(data: ReportData, convention: str) -> Iterator[Part]:
    graph, (source, scored) = data.graph, _scored(data)
    if graph is None:
        for arch, names in data.students.items():
            yield Text([f"{' = '.join(names)} removes {len(arch)} blocks of its teacher:"])
            yield Text(in_words(arch), listed=True)
        return
    total = graph.total
    full = f"{count(total.params)} U-Net parameters, {count(total.macs(convention))} MACs a step ({convention})"
    teachers = [name for name, model in data.models.items() if not model.arch] or [data.teacher]
    drawings = [
        Drawing(
            teachers, f"teacher {data.teacher}", full, Markup(page_svg(graph, Architecture(), scored, convention, "the teacher"))
        )
    ]
    for arch, names in data.students.items():
        cost = graph.cost(arch)
        macs = cost.macs(convention) / total.macs(convention)
        sub = f"{cost.params / total.params:.1%} of the U-Net's parameters, {macs:.1%} of its MACs"
        also = f"; the same: {', '.join(names[1:])}" if names[1:] else ""
        drawn = Markup(page_svg(graph, arch, scored, convention, names[0]))
        drawings.append(Drawing(names, names[0], sub + also, drawn, in_words(arch)))
    note = f"Colours: what the removal of each block alone costs, from {source}." if source else "No run scored single removals."
    yield Drawings(drawings, Markup(page_legend(graph, scored)), note)


def _scored(data: ReportData) -> tuple[str, Sensitivity | None]:
    """The run whose single removals give the colours: the first scan with a quality measure, else a search."""
    scored = [(name, Sensitivity.of_scan(scan)) for name, scan in data.scans.items()]
    scored += [(name, Sensitivity.of_search(search)) for name, search in data.searches.items()]
    return next(((name, s) for name, s in scored if s is not None), ("", None))


def _search(data: ReportData, tables: Mapping[str, Part]) -> Iterator[Part]:
    for name, view in data.searches.items():
        parts = [*_searched(view), *([tables[name]] if name in tables else [])]
        if table := search_text.frequency_table(view):
            parts.append(Fold(table.title, "", [table]))
        said = search_text.against(view)[:1] if view.ranked else []
        yield Fold(name, f"{', '.join(view.limits) or 'a front'}. {''.join(said)}", parts)


def _searched(view: SearchView) -> Iterator[Part]:
    if view.ranked:
        yield Text([line for line in (warning(view), search_text.summary(view)) if line])
        if lines := search_text.against(view):
            yield Text(lines, listed=True)
    if any(e.score.finite is not None for e in view.search):
        plots = [search_figures.history_plot(view), *([search_figures.front_plot(view)] if view.ranked else [])]
        yield Charts.of(*plots, note=f"{search_text.CAPTIONS['history.svg']} {search_text.CAPTIONS['front.svg']}")


def _along(data: ReportData) -> dict[str, curves.Along]:
    """Student => its validations, of those that have any."""
    along = {data.students_of[name]: curves.validated(view.rows) for name, view in data.trainings.items()}
    return {name: scores for name, scores in along.items() if any(s.measure in curves.VALIDATED for _, s in scores)}


def _training(data: ReportData, tabled: Sequence[ResultTable], convention: str) -> Iterator[Part]:
    if along := _along(data):
        sheet = curves.validations(along)
        yield Charts.of(*sheet.plots, note=f"{sheet.heading}. {sheet.note}")
    for group in data.groups.values():
        if evaluated := dict(model_figures.checkpoints(group)):
            yield Charts.of(*curves.validations(evaluated).plots, note="Checkpoints, evaluated under a protocol.")
    trained = {data.students_of[name]: curves.trained(view.rows) for name, view in data.trainings.items()}
    if losses := {name: rows for name, rows in trained.items() if rows}:
        sheet = curves.losses(losses)
        yield Fold(sheet.heading, sheet.note, [Charts.of(*sheet.plots)])
    for table in tabled:
        if table.title == DISTILLED:
            yield Fold("The last validation of each run", table.note, [results_table(table, convention)])
    for name, view in data.trainings.items():
        if view.images:
            shown = {f"after {step:,} updates": ("", images) for step, images in view.images.items()}
            yield Fold(
                f"Validation images of {data.students_of[name]}",
                "",
                [_grid("The same prompts and seeds.", view.prompts, shown, [name])],
            )


def _settings(data: ReportData) -> Iterator[Part]:
    for group in data.groups.values():
        if guided := model_figures.guidance_curves(group):
            sheet = model_figures.guidance(guided)
            yield Charts.of(*sheet.plots, note=sheet.note)
        if table := model_tables.steps_and_quantisation(group):
            yield table


def _images(data: ReportData) -> Iterator[Part]:
    for group in data.groups.values():
        yield from _model_grids(group)
    for name, view in data.scans.items():
        if rows := scan_rows(view):
            yield Fold(f"Removals of {name}", "", [_grid("The same prompts and seeds.", view.prompts, rows, [name])])
    for name, search in data.searches.items():
        if rows := search_rows(search):
            yield Fold(f"Finalists of {name}", "One-shot.", [_grid("The same prompts and seeds.", search.prompts, rows, [name])])


def _model_grids(group: Mapping[str, ModelView]) -> Iterator[Grid]:
    """Every model at the setting that most of them have images of, else at its own last one; a grid for each list of prompts. Edits
    are shown at every setting, under what was edited."""
    if edits := edit_rows(group):
        yield _grid(model_figures.EDITED, next(iter(group.values())).prompts, edits, list(group))
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
