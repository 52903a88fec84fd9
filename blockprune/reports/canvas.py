"""What the figures share: text that cannot be misread as markup, one colour scale for quality loss, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from blockprune.measures.measure import MEASURES
from blockprune.reports.svg import Svg

INK, MUTED, FAINT = "#1c2733", "#5f6b76", "#c9d0d6"
# Light to dark with hue from yellow to violet: luminance falls steadily, so it reads in grey and with any colour vision.
LOSS = ["#fdf3c7", "#fcd67f", "#f7a55b", "#e66c5c", "#b93d74", "#782281", "#2e1161"]
WIDE = 20
DPI = 150
LONG = 30  # letters of a title


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches with its own canvas, independent of pyplot's state."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def encoded(figure: Figure | Svg) -> bytes:
    """What the file of a figure holds: PNG, or SVG."""
    return figure.encode() if isinstance(figure, Svg) else png(figure)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))).get_charmap())


def plain(text: object) -> str:
    """`text` on one line, with a question mark for what the figures' font has no glyph for."""
    return "".join(c if ord(c) in _glyphs() else "?" for c in " ".join(str(text).split()))


def write(ax: Axes, x: float, y: float, text: object, **style: Any) -> None:
    """Text at a point of `ax`, taken literally: a dollar sign starts no formula. Line breaks stay."""
    lines = "\n".join(plain(line) for line in str(text).split("\n"))
    ax.text(x, y, lines, parse_math=False, **{"color": INK, "fontsize": 8, "family": "DejaVu Sans", **style})


def title(figure: Figure, text: object, sub: object = "") -> None:
    """A left-aligned heading with a line of explanation under it, in a band of 0.65 inch at the top."""
    x, height = 0.25 / figure.get_figwidth(), figure.get_figheight()
    style: dict[str, Any] = {"va": "top", "parse_math": False}
    figure.text(x, 1 - 0.18 / height, plain(text), fontsize=12.5, weight="bold", color=INK, **style)
    figure.text(x, 1 - 0.45 / height, plain(sub), fontsize=8.5, color=MUTED, **style)


def is_wide(values: Iterable[float]) -> bool:
    """True when positive values span so much that a logarithmic axis reads better."""
    finite = list(values)
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > WIDE


def loss_scale(values: Iterable[float], measure: str) -> ScalarMappable:
    """The colour of a measured value, from light (good) to dark (bad) in the measure's own direction."""
    finite = list(values)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low == high:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    colours = LOSS if MEASURES[measure].direction == "down" else LOSS[::-1]
    cmap: Colormap = LinearSegmentedColormap.from_list("loss", colours)
    return ScalarMappable(LogNorm(low, high) if is_wide(finite) else Normalize(low, high), cmap)


def ink_on(colour: tuple[float, ...]) -> str:
    """Dark or white text, whichever reads better on `colour`."""
    red, green, blue = colour[:3]
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.52 else "white"


def axis_title(measure: str) -> str:
    """What a measure's axis says: its title, its name where that is long, and which way is better."""
    kind = MEASURES[measure]
    name = kind.title if len(kind.title) < LONG else kind.name
    return f"{plain(name)} ({'lower' if kind.direction == 'down' else 'higher'} is better)"


def colour_of(scale: ScalarMappable, value: float) -> tuple[float, float, float, float]:
    red, green, blue, alpha = (float(c) for c in scale.to_rgba(np.array([value]))[0])
    return red, green, blue, alpha


def tidy(ax: Axes) -> None:
    """Light axes: no frame at the top and right, muted ticks."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(FAINT)
    ax.tick_params(colors=MUTED, labelsize=7.5, length=3, which="both")
    ax.set_axisbelow(True)
