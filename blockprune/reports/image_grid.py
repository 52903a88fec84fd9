"""Images at common prompts and seeds, a row for each model or setting: which, what is said of them, and as a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from blockprune.measures.measure import MEASURES, names
from blockprune.measures.score import TEACHER, Score
from blockprune.reports.canvas import MUTED, new_figure, plain, title, write
from blockprune.reports.model_view import Images, ModelView
from blockprune.reports.search_view import SearchView
from blockprune.reports.table import number
from blockprune.reports.view import ScanView, ranked, short

ROWS, COLUMNS, TILE = 12, 8, 128
SIDE, MARGIN = 1.12, 1.75  # of an image and of the names beside them, in inches
Rows = Mapping[str, tuple[str, Images]]  # name => (its scores in words, (k, H, W, 3) images)


def scan_labels(view: ScanView) -> list[str]:
    """The teacher, then removals with images from the least to the most quality lost, spread evenly over the ranking."""
    have = [label for label in ranked(view) or view.removals if len(view.images.get(label, ()))]
    chosen = np.linspace(0, len(have) - 1, min(ROWS - 1, len(have))).round().astype(int).tolist()
    return [TEACHER] * bool(len(view.images.get(TEACHER, ()))) + [have[i] for i in dict.fromkeys(chosen)]


def scan_rows(view: ScanView) -> Rows:
    """The teacher and some removals."""
    shown = {n: n if short(n) == n else short(n) if n == TEACHER else f"without {short(n)}" for n in scan_labels(view)}
    scores = {n: {m: s for m in view.measures if (s := view.score(n, m))} for n in shown}
    return {name: (score_words(scores[n], *filter(None, [view.main_measure])), view.images[n]) for n, name in shown.items()}


def search_rows(view: SearchView) -> Rows:
    """The teacher and the finalists, those that hold the budgets first."""
    scores = {TEACHER: view.scores.get(TEACHER, {})}
    scores |= {e.score.label: {view.measure: e.score, **view.scores.get(e.score.label, {})} for e in [*view.ranked, *view.finals]}
    shown = {label: by for label, by in scores.items() if label in view.images}
    return {short(n): (score_words(by, view.measure), view.images[n]) for n, by in shown.items()}


def edit_rows(models: Mapping[str, ModelView]) -> Rows:
    """What was edited, then at each setting what the teacher and each model made of it; nothing where nothing was edited."""
    views = models.values()
    inputs = next((view.inputs for view in views if view.inputs is not None), None)
    if inputs is None:
        return {}
    rows = {"input": ("", inputs)}
    for label in dict.fromkeys(s.label for view in views for s in view.settings):
        if all(view.arch for view in views):
            rows |= {f"teacher, {label}": ("", view.teacher_images[label]) for view in views if label in view.teacher_images}
        for name, view in models.items():
            if label in view.images:
                words = score_words(view.scores.get(label, {}), "feature_distance", "input_l1")
                rows[f"{name}, {label}"] = (words, view.images[label])
    return rows


def score_words(scores: Mapping[str, Score], *first: str) -> str:
    """The scores that a reader looks for beside an image."""
    wanted = dict.fromkeys((*first, *names("denoising"), "fid", "clip_score"))
    values = {MEASURES[m]: v for m in wanted if m in scores and (v := scores[m].finite) is not None}
    return ", ".join(f"{m.title if len(m.title) < 12 else m.name} {number(v)}" for m, v in values.items())


def grid_figure(heading: str, sub: str, prompts: Sequence[str], rows: Rows) -> Figure:
    """A row for each of `rows`, a column for each prompt."""
    columns = min(COLUMNS, *(len(images) for _, images in rows.values()))
    captions = [textwrap.wrap(plain(p), 21, max_lines=4, placeholder=" …") or [""] for p in list(prompts)[:columns]]
    head = 0.13 * max(map(len, captions), default=0) + 0.12
    width, height = max(MARGIN + SIDE * columns + 0.2, 5.5), 0.75 + head + SIDE * len(rows) + 0.15
    figure = new_figure(width, height)
    title(figure, heading, sub)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    for c, lines in enumerate(captions):
        x = MARGIN + SIDE * (c + 0.48)
        write(ax, x, 0.69 + head, "\n".join(lines), ha="center", va="bottom", fontsize=6.5, linespacing=1.25)
    for r, (name, (words, images)) in enumerate(rows.items()):
        y, right = 0.75 + head + SIDE * r, MARGIN - 0.12
        write(ax, right, y + SIDE * 0.4, "\n".join(textwrap.wrap(name, 24)), ha="right", va="bottom", fontsize=8, weight="bold")
        small = words.replace(", ", "\n")
        write(ax, right, y + SIDE * 0.46, small, ha="right", va="top", fontsize=7, color=MUTED, linespacing=1.35)
        for c, image in enumerate(images[:columns]):
            x = MARGIN + SIDE * c
            ax.imshow(_tile(image), extent=(x, x + SIDE * 0.96, y + SIDE * 0.96, y), aspect="auto", interpolation="nearest")
    ax.set(xlim=(0, width), ylim=(height, 0))
    return figure


def _tile(image: Images) -> Images:  # (H, W, 3) uint8 => (TILE, TILE, 3) uint8
    how = Image.Resampling.LANCZOS if image.shape[0] > TILE else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((TILE, TILE), how))
