"""The page: header, sections, notes and texts to copy, in one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from blockprune.errors import UserError
from blockprune.progress import duration
from blockprune.reports.html.overview import Overview, overview
from blockprune.reports.html.parts import Fold, Grid, Part, Section, prose
from blockprune.reports.html.sections import sections
from blockprune.reports.model_view import ModelView
from blockprune.reports.models import readings_of
from blockprune.reports.notes import caveats, missing
from blockprune.reports.recommendation import recommendations
from blockprune.reports.report_data import ReportData, View
from blockprune.reports.results import flat, result_tables, results_table, to_json, to_latex
from blockprune.reports.svg import STYLES, style
from blockprune.reports.table import count, to_csv
from blockprune.reports.unet import page_defs
from blockprune.reports.view import ScanView

HERE = Path(__file__).parent
LIMIT = 10_000_000
VERSIONS = ("blockprune", "torch", "diffusers", "transformers", "numpy", "python")
PROTOCOL = {
    "n_images": "images",
    "seed": "seed",
    "n_reference": "reference images",
    "fid": "FID",
    "detector": "detector",
    "clip": "CLIP model",
    "resize": "resize",
    "image": "image",
    "device_type": "on",
    "dtype": "in",
    "hash": "hash",
}
NO_PROTOCOL = {*VERSIONS, "processor", "teacher_model", "hash"}


def report_files(data: ReportData, convention: str) -> dict[str, str]:
    """Suffix => content: the page, and its results as CSV, JSON and LaTeX.

    Raises UserError when the page is larger than `LIMIT` bytes, naming the runs whose pictures are the largest.
    """
    tabled, taken, notes = result_tables(data), recommendations(data), {"caveats": caveats(data), "missing": missing(data)}
    texts = {
        ".csv": to_csv(flat(tabled, convention)),
        ".json": to_json(data, tabled, taken, convention, notes),
        ".tex": to_latex([results_table(table, convention) for table in tabled]),
    }
    shown = sections(data, tabled, taken, convention)
    page = _page(data, overview(data, taken, convention), shown, notes, texts)
    # a name that the file system gave may be no text: half a surrogate pair is shown as an escape
    page = page.encode(errors="backslashreplace").decode()
    if (size := len(page.encode())) > LIMIT:
        raise UserError(f"the page would have {size / 1e6:.1f} MB, the limit is {LIMIT / 1e6:g} MB: leave out {_largest(shown)}")
    return {".html": page, **texts}


def _page(
    data: ReportData, first: Overview, shown: Sequence[Section], notes: Mapping[str, Sequence[str]], texts: Mapping[str, str]
) -> str:
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters["prose"] = prose
    script = (HERE / "page.js").read_text(encoding="utf-8")
    embedded = f'{{"results": {texts[".json"]}, "picture": {json.dumps(first.views, separators=(",", ":"))}}}'
    return env.get_template("page.html").render(
        title=f"What to remove from {data.teacher or 'a diffusion U-Net'}",
        teacher=_teacher(data),
        first=first,
        sections=shown,
        asked=_asked(data, notes),
        facts=_facts(data),
        runs={name: (_kind(view), _protocol(view)) for name, view in data.runs.items()},
        caveats=notes["caveats"],
        missing=notes["missing"],
        copyables={"LaTeX": texts[".tex"], "CSV": texts[".csv"]},
        # Within a script element only "<" could end or confuse it; inside JSON strings it may be written as an escape.
        data=Markup(embedded.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")),
        css=Markup("".join([(HERE / "page.css").read_text(encoding="utf-8"), *map(style, STYLES)])),
        defs=Markup(page_defs()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _teacher(data: ReportData) -> str:
    """How large the teacher is, how long was searched, on what models were judged, and what shares on this page are shares of."""
    size, scope, done = "", "", list[str]()
    if data.graph is not None:
        size = f"Teacher: {count(data.graph.total.params + (data.outside_params or 0))} parameters. "
        whole = "the U-Net" if data.outside_params is None else "the whole pipeline"
        scope = f" Shares are of the teacher's: parameters of {whole}, MACs and latency of a U-Net step."
    if searched := list(data.searches.values()):
        n = sum(len(view.search) - view.n_taken_over for view in searched)
        searches = f"{len(searched)} search{'es' * (len(searched) != 1)}"
        done.append(f"{searches} scored {n:,} architectures in {duration(sum(view.seconds for view in searched))}")
    if readings := readings_of(data.models):
        models = f"{len(data.models)} model{'s' * (len(data.models) != 1)}"
        done.append(f"{models} compared at {readings[0].label}")
    return f"{size}{'; '.join(done)}{'.' * bool(done)}{scope}"


def _asked(data: ReportData, notes: Mapping[str, Sequence[str]]) -> str:
    """The last section in a line."""
    made = [_made_with(view) for view in data.runs.values()]
    versions = [f"{p} {' / '.join(v)}" for p in VERSIONS[:2] if (v := _distinct(made, p))]
    lacking = f", missing: {len(notes['missing'])}" if notes["missing"] else ""
    where = " / ".join(_distinct(made, "processor"))
    return (
        f"{len(data.runs)} runs, {len(notes['caveats'])} caveats{lacking}; {', '.join([*versions, *([where] if where else [])])}."
    )


def _kind(view: View) -> str:
    """The command that made a run."""
    return {"ScanView": "scan", "SearchView": "search", "TrainingView": "distill", "ModelView": "evaluate"}[type(view).__name__]


def _made_with(view: View) -> Mapping[str, object]:
    return view.made_with if isinstance(view, ModelView) else view.protocol


def _facts(data: ReportData) -> dict[str, str]:
    """Teacher, protocol, versions and hardware; several values where runs differ."""
    graph, made = data.graph, [_made_with(view) for view in data.runs.values()]
    rows = {"Teacher": " · ".join(p for p in (data.teacher or "not named", data.teacher_id) if p)}
    if graph is not None:
        outside = data.outside_params
        whole = f", {count(graph.total.params + outside)} in the whole pipeline" if outside is not None else ""
        c, h, w = graph.latent
        rows["U-Net"] = f"{count(graph.total.params)} parameters{whole}; latent {c} × {h} × {w}"
    for group in data.groups.values():
        protocol = next(iter(group.values())).protocol
        parts = [f"{title} {protocol[k]}" for k, title in PROTOCOL.items() if protocol.get(k) not in (None, "")]
        name = "Protocol" if len(data.groups) == 1 else f"Protocol of {', '.join(group)}"
        rows[name] = ", ".join([str(protocol.get("name", "not named")), *parts])
    kinds: dict[str, list[str]] = {}
    for run, view in data.runs.items():
        kinds.setdefault(_kind(view), []).append(run)
    versions = [f"{p} {' / '.join(v)}" for p in VERSIONS if (v := _distinct(made, p))]
    rows |= {"Runs": "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())}
    rows |= {"Made with": ", ".join(versions) or "not recorded"}
    rows["Hardware"] = " / ".join(_distinct(made, "processor")) or "not recorded"
    return rows


def _distinct(made: Sequence[Mapping[str, object]], name: str) -> list[str]:
    return list(dict.fromkeys(str(m[name]) for m in made if m.get(name)))


def _protocol(view: View) -> list[tuple[str, str]]:
    """What was asked, without what the header says."""
    entries = {k: v for k, v in view.protocol.items() if k not in NO_PROTOCOL and v not in (None, "")}
    if isinstance(view, ScanView):
        entries = {**entries, "removals": len(view.removals)}
    return [(k, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in entries.items()]


def _grids(parts: Sequence[Part]) -> Iterator[Grid]:
    for part in parts:
        if isinstance(part, Grid):
            yield part
        elif isinstance(part, Fold):
            yield from _grids(part.parts)


def _largest(shown: Sequence[Section]) -> str:
    """The runs with the largest pictures, in words."""
    sizes: dict[str, int] = {}
    for grid in (grid for section in shown for grid in _grids(section.parts)):
        for run in grid.runs:
            sizes[run] = sizes.get(run, 0) + grid.size // len(grid.runs)
    order = sorted(sizes, key=lambda run: -sizes[run])[:3]
    return f"one of {', '.join(f'{r!r} ({sizes[r] / 1e6:.1f} MB of pictures)' for r in order)}" if order else "some of the runs"
