"""Where along the denoising a removal hurts: its errors by timestep, and what of them is the prompt's part. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blockprune.reports.view import ScanView, ranked, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_BINS = 10
PROMPT = "prompt"  # guided_mse less eps_mse: what guidance adds to the error


def binned(view: ScanView) -> tuple[list[tuple[int, int]], dict[str, dict[str, NDArray[np.float64]]]]:
    """The (first, last) timestep of each bin of as many samples, and measure => label => (bins,) mean errors.

    Where both errors are known, "prompt" is the guided one less the plain one.
    """
    if view.timesteps is None:
        return [], {}
    order = np.array_split(np.argsort(view.timesteps, kind="stable"), min(N_BINS, len(view.timesteps)))
    ranges = [(int(view.timesteps[bin[0]]), int(view.timesteps[bin[-1]])) for bin in order]
    sound = {m: {n: e for n, e in of.items() if len(e) == len(view.timesteps)} for m, of in view.errors.items()}
    means = {m: {n: np.array([e[bin].mean() for bin in order]) for n, e in of.items()} for m, of in sound.items() if of}
    if {"eps_mse", "guided_mse"} <= means.keys():
        means[PROMPT] = {n: means["guided_mse"][n] - e for n, e in means["eps_mse"].items() if n in means["guided_mse"]}
    return ranges, means


def timestep_rows(view: ScanView) -> list[dict[str, Any]]:
    """One flat row for each removal, measure and bin of timesteps."""
    ranges, means = binned(view)
    return [
        {"label": label, "measure": measure, "from_timestep": first, "to_timestep": last, "mean": float(value)}
        for measure, of in means.items()
        for label in of
        for (first, last), value in zip(ranges, of[label], strict=True)
    ]


def timestep_figure(view: ScanView) -> Figure:
    """Two heat maps, removal by timestep: the plain denoising error and the prompt's part, or the one error that was measured."""
    from blockprune.reports.canvas import new_figure, plain, title

    ranges, means = binned(view)
    shown = {m: means[m] for m in ("eps_mse", PROMPT) if m in means} or means
    order = [n for n in ranked(view) if all(n in of for of in shown.values())]
    height = 1.7 + 0.17 * max(len(order), 5)
    figure = new_figure(2.3 + 3.4 * len(shown), height)
    title(figure, "When each removal hurts", "Mean squared error by timestep, on a logarithmic scale; noise grows to the right.")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, (measure, of) in zip(axes, shown.items(), strict=True):
        _heat_map(ax, measure, of, order, ranges)
    axes[0].set_yticks(range(len(order)), [plain(short(label)) for label in order], fontsize=7)
    figure.subplots_adjust(left=0.24 if len(shown) > 1 else 0.34, right=0.94, top=1 - 0.95 / height, bottom=0.55 / height)
    return figure


def _heat_map(
    ax: Any, measure: str, of: Mapping[str, NDArray[np.float64]], order: list[str], ranges: list[tuple[int, int]]
) -> None:
    from matplotlib.colors import LogNorm

    values = np.stack([of[label] for label in order]) if order else np.ones((1, len(ranges)))
    above = values[values > 0]
    low, high = (above.min(), above.max()) if above.size else (0.1, 1.0)
    image = ax.imshow(np.clip(values, low, None), aspect="auto", cmap="viridis", norm=LogNorm(low, max(high, 1.001 * low)))
    ax.set_xticks(range(len(ranges)), [str(last) for _, last in ranges], fontsize=6.5)
    ax.set_xlabel("timesteps up to", fontsize=8)
    ax.set_title({PROMPT: "the prompt's part: guided_mse - eps_mse"}.get(measure, measure), fontsize=8.5)
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.02).ax.tick_params(labelsize=6.5)
