"""What a page is made of, as values: the template shows them and knows nothing of runs. All text is plain; the template escapes."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from blockprune.reports.plot import Plot
from blockprune.reports.table import Table

TILE = 160


@dataclass(frozen=True)
class Charts:
    """Charts side by side, with what is said about them."""

    note: str
    svgs: Sequence[Markup]
    kind: str = field(default="charts", init=False)

    @classmethod
    def of(cls, *plots: Plot, note: str = "") -> Charts:
        return cls(note, [Markup(plot.page_svg()) for plot in plots])


@dataclass(frozen=True)
class GridRow:
    name: str
    small: str
    images: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """Images at common prompts and seeds: a row per model, a column per prompt; `pixelated` where single pixels are to be seen."""

    caption: str
    prompts: Sequence[str]
    rows: Sequence[GridRow]
    pixelated: bool
    runs: Sequence[str] = ()
    kind: str = field(default="grid", init=False)

    @property
    def size(self) -> int:
        return sum(len(src) for row in self.rows for src in row.images)


@dataclass(frozen=True)
class Drawing:
    """A U-Net drawn as a U, of the models of these `names`; `words` say what is removed."""

    names: Sequence[str]
    heading: str
    sub: str
    svg: Markup
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Drawings:
    """Us side by side under one colour scale."""

    items: Sequence[Drawing]
    legend: Markup
    note: str
    kind: str = field(default="drawings", init=False)


@dataclass(frozen=True)
class Text:
    """Paragraphs, or with `listed` a list; backticks mark code."""

    lines: Sequence[str]
    listed: bool = False
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when they are asked for, under a title and what they say in a line."""

    title: str
    finding: str
    parts: Sequence[Part]
    kind: str = field(default="fold", init=False)


Part = Table | Charts | Grid | Drawings | Text | Fold


@dataclass(frozen=True)
class Section:
    """A question, what the runs answer in a line, and what shows it; `id` is its anchor, `short` its name in the contents."""

    id: str
    short: str
    title: str
    finding: str
    parts: Sequence[Part]


def prose(text: str) -> Markup:
    """`text` with backticks as code; what was escaped for Markdown is plain again, and everything is escaped for HTML."""
    plain = html.unescape(re.sub(r"\\([\\`*_{}\[\]#|!~$])", r"\1", text))
    parts = re.split(r"`([^`]*)`", plain)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def tile(image: NDArray[np.uint8]) -> str:  # (H, W, 3) uint8 => data URI
    """Small images pixel by pixel as PNG; larger ones made small, as JPEG where that is smaller."""
    shown = Image.fromarray(np.ascontiguousarray(image))
    if is_small(image):
        return _uri("image/png", _encoded(shown, "PNG"))
    shown.thumbnail((2 * TILE, 2 * TILE), Image.Resampling.LANCZOS)
    kinds = {"image/jpeg": _encoded(shown, "JPEG", quality=88), "image/png": _encoded(shown, "PNG")}
    mime = min(kinds, key=lambda m: len(kinds[m]))
    return _uri(mime, kinds[mime])


def is_small(image: NDArray[np.uint8]) -> bool:
    """True for images that would blur when enlarged to a tile."""
    return max(image.shape[:2]) <= TILE // 2


def _encoded(image: Image.Image, form: str, quality: int | None = None) -> bytes:
    out = io.BytesIO()
    image.save(out, form, optimize=True, **({"quality": quality} if quality else {}))
    return out.getvalue()


def _uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
