"""The figures of evaluated models: guidance against quality, and quality against size. Nothing is shown or written here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure

from blockprune.measures.measure import MEASURES
from blockprune.measures.score import Score
from blockprune.reports.canvas import INK, MARKERS, SERIES, axis_title, legend, named, new_figure, plain, tidy, title
from blockprune.reports.image_grid import edit_rows, grid_figure, score_words
from blockprune.reports.model_view import ModelView, Setting

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


def guidance_figure(curves: Mapping[str, list[tuple[Setting, Score, Score]]]) -> Figure:
    """FID against CLIP score, one curve a model, each point labelled with its guidance scale; down and to the right is better."""
    figure = new_figure(7.4, 5.2)
    title(figure, "Guidance: FID against CLIP score", "Labels: guidance scale. Down and to the right is better.")
    ax = figure.add_axes((0.1, 0.2, 0.87, 0.66))
    tidy(ax)
    for i, (name, points) in enumerate(curves.items()):
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        xs, ys = [clip.value or 0.0 for _, _, clip in points], [fid.value or 0.0 for _, fid, _ in points]
        ax.plot(xs, ys, color=colour, marker=marker, ms=5, lw=1.4, label=named(name), mec="white", mew=0.5)
        for (s, fid, _), x, y in zip(points, xs, ys, strict=True):
            if fid.low is not None and fid.high is not None:
                ax.vlines(x, fid.low, fid.high, color=colour, lw=0.8, alpha=0.35)
            style: dict[str, Any] = {"xytext": (4, -10), "textcoords": "offset points", "fontsize": 7, "color": INK}
            ax.annotate(f"{s.cfg_scale:g}", (x, y), parse_math=False, **style)
    ax.set_xlabel(axis_title("clip_score"), fontsize=8.5, color=INK)
    ax.set_ylabel(axis_title("fid"), fontsize=8.5, color=INK)
    legend(figure, *ax.get_legend_handles_labels(), loc="lower left", ncols=3, bbox_to_anchor=(0.02, 0.0))
    return figure


def evaluation_figures(view: ModelView) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of one evaluated model: images.png, and guidance.png where guidance scales differ."""
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
        yield "guidance.png", guidance_figure(curves)


def sizes(models: Mapping[str, ModelView]) -> dict[str, tuple[float, Score]]:
    """Model => (parameters of the whole pipeline in millions, its first score) at the first setting that all models share."""
    shared = [s for s in next(iter(models.values())).settings if all(s in view.settings for view in models.values())]
    measures = ("fid", "clip_score", "is")
    for setting in shared:
        for m in measures:
            sized = {n: v for n, v in models.items() if v.value(setting, m) is not None and v.whole_params is not None}
            if len({v.whole_params for v in sized.values()}) > 1:
                return {n: ((v.whole_params or 0) / 1e6, v.scores[setting.label][m]) for n, v in sized.items()}
    return {}


def size_figure(points: Mapping[str, tuple[float, Score]], budgets: Mapping[str, float]) -> Figure:
    """Quality against the parameters of the whole pipeline in millions; `budgets` are drawn as lines, by what they are called."""
    measure = next(iter(points.values()))[1].measure
    figure = new_figure(7.4, 4.6)
    title(figure, f"{MEASURES[measure].title} against size", "Evaluated models at the same setting, with 95 % intervals.")
    ax = figure.add_axes((0.1, 0.14, 0.87, 0.7))
    tidy(ax)
    ax.margins(x=0.12)
    for i, (name, (x, score)) in enumerate(points.items()):
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        if score.low is not None and score.high is not None:
            ax.vlines(x, score.low, score.high, color=colour, lw=1)
        ax.plot([x], [score.value or 0.0], ls="", marker=marker, ms=7, color=colour, mec="white", mew=0.6)
        style: dict[str, Any] = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": 8, "color": INK}
        ax.annotate(plain(name), (x, score.value or 0.0), parse_math=False, **style)
    for text, limit in budgets.items():
        ax.axvline(limit, color=INK, lw=1, ls=":")
        style = {"xycoords": ax.get_xaxis_transform(), "xytext": (3, -8), "textcoords": "offset points", "fontsize": 7.5}
        ax.annotate(plain(f"budget {text}"), (limit, 1.0), parse_math=False, color=INK, **style)
    ax.set_xlabel("parameters of the whole pipeline (millions)", fontsize=8.5, color=INK)
    ax.set_ylabel(axis_title(measure), fontsize=8.5, color=INK)
    return figure


def checkpoints(models: Mapping[str, ModelView]) -> Iterator[tuple[str, list[tuple[int, Score]]]]:
    """Curve name => (update, score) of settings that differ in the checkpoint alone."""
    for name, view in models.items():
        groups = [[s for s in group if s.checkpoint is not None] for group in varied(view, "checkpoint")]
        for group in groups:
            points = [(s.checkpoint or 0, score) for s in group for score in view.scores.get(s.label, {}).values()]
            if len({step for step, _ in points}) > 1:
                yield name if len(groups) == 1 else f"{name}, CFG {group[0].cfg_scale:g}", sorted(points, key=lambda p: p[0])
