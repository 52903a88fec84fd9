"""The figures of evaluated models: guidance against quality, and checkpoints. Nothing is shown or written here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure

from blockprune.measures.score import Score
from blockprune.reports.canvas import axis_title
from blockprune.reports.image_grid import edit_rows, grid_figure, score_words
from blockprune.reports.model_view import ModelView, Setting
from blockprune.reports.plot import SHAPES, Axis, Line, Mark, Plot, Sheet, series
from blockprune.reports.svg import Svg
from blockprune.reports.table import with_interval

EDITED = "The images in the first row, edited by the captions above them, at common seeds."


def varied(view: ModelView, *names: str) -> list[list[Setting]]:
    """Settings of one model that differ in `names` alone, at least two together."""
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for s in view.settings:
        kept = {
            n: getattr(s, n) for n in ("steps", "cfg_scale", "scheduler", "quantize", "checkpoint", "strength") if n not in names
        }
        groups.setdefault(tuple(kept.items()), []).append(s)
    return [group for group in groups.values() if len({tuple(getattr(s, n) for n in names) for s in group}) > 1]


def guidance_curves(models: Mapping[str, ModelView]) -> dict[str, list[tuple[Setting, Score, Score]]]:
    """Curve name => (setting, FID, CLIP score) by rising guidance scale, for settings that differ in it alone."""
    curves = {}
    for name, view in models.items():
        groups = varied(view, "cfg_scale")
        for group in groups:
            points = [
                (s, view.scores[s.label]["fid"], view.scores[s.label]["clip_score"])
                for s in sorted(group, key=lambda s: s.cfg_scale)
                if view.value(s, "fid") is not None and view.value(s, "clip_score") is not None
            ]
            if len(points) > 1:
                curves[name if len(groups) == 1 else f"{name}, {_rest(group[0])}"] = points
    return curves


def _rest(s: Setting) -> str:
    parts = [f"{s.steps} steps", s.scheduler, s.quantize, f"step {s.checkpoint}" if s.checkpoint is not None else ""]
    parts.append(f"strength {s.strength:g}" if s.strength is not None else "")
    return ", ".join(part for part in parts if part)


def guidance(curves: Mapping[str, list[tuple[Setting, Score, Score]]]) -> Sheet:
    """FID against CLIP score, one curve a model, a mark for each guidance scale; down and to the right is better."""
    marks, lines = list[Mark](), list[Line]()
    for i, (name, points) in enumerate(curves.items()):
        lines.append(Line([(clip.value or 0.0, fid.value or 0.0) for _, fid, clip in points], series(i)))
        for s, fid, clip in points:
            said = f"{name}, CFG {s.cfg_scale:g}\nFID {_said(fid)}\nCLIP score {_said(clip)}"
            label = f"{s.cfg_scale:g}" if s in (points[0][0], points[-1][0]) else ""
            place = clip.value or 0.0, fid.value or 0.0
            marks.append(Mark(*place, series(i), said, SHAPES[i % len(SHAPES)], label, fid.interval, clip.interval))
    heights = [m.y for m in marks]
    axes = (
        Axis.over(axis_title("clip_score"), [m.x for m in marks]),
        Axis.over(axis_title("fid"), heights, max(heights) > 5 * min(heights) > 0),
    )
    keys = {f"{series(i)} {SHAPES[i % len(SHAPES)]}": name for i, name in enumerate(curves)}
    alt = f"One curve a model: {', '.join(curves)}."
    plot = Plot("FID against CLIP score, by guidance scale", *axes, marks, lines, keys=keys, alt=alt, width=720, height=460)
    return Sheet("Guidance: FID against CLIP score", "Labels: guidance scale. Down and to the right is better.", [plot])


def finding(curves: Mapping[str, list[tuple[Setting, Score, Score]]]) -> str:
    """Between which guidance scales the best FIDs and the best CLIP scores of the curves lie, in a line; "" without curves."""
    if not curves:
        return ""
    best = (
        [min(points, key=lambda p: p[1].loss)[0].cfg_scale for points in curves.values()],
        [min(points, key=lambda p: p[2].loss)[0].cfg_scale for points in curves.values()],
    )
    fid, clip = (" to ".join(f"{scale:g}" for scale in dict.fromkeys((min(scales), max(scales)))) for scales in best)
    differs = ", depending on the model: the order at one scale need not hold at another" if len(set(best[0])) > 1 else ""
    return f"FID is best at CFG {fid}, CLIP score at CFG {clip}{differs}."


def _said(score: Score) -> str:
    return f"{with_interval(score.value, *(score.interval or (None, None)))} (n = {score.n})"


def evaluation_figures(view: ModelView) -> Iterator[tuple[str, Figure | Svg]]:
    """(name, figure) of one evaluated model: images.png, and guidance.svg where guidance scales differ."""
    if rows := edit_rows({view.label: view}):
        yield "images.png", grid_figure(view.label, EDITED, view.prompts, rows)
    elif view.images:
        rows = {
            s.label: (score_words(view.scores.get(s.label, {})), view.images[s.label])
            for s in view.settings
            if s.label in view.images
        }
        yield "images.png", grid_figure(view.label, "Images at common prompts and seeds.", view.prompts, rows)
    if curves := guidance_curves({view.label: view}):
        yield "guidance.svg", guidance(curves).file()


def checkpoints(models: Mapping[str, ModelView]) -> Iterator[tuple[str, list[tuple[int, Score]]]]:
    """Curve name => (update, score) of settings that differ in the checkpoint alone."""
    for name, view in models.items():
        groups = [[s for s in group if s.checkpoint is not None] for group in varied(view, "checkpoint")]
        for group in groups:
            points = [(s.checkpoint or 0, score) for s in group for score in view.scores.get(s.label, {}).values()]
            if len({step for step, _ in points}) > 1:
                yield name if len(groups) == 1 else f"{name}, CFG {group[0].cfg_scale:g}", sorted(points, key=lambda p: p[0])
