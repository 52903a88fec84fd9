"""What every drawing is made with: SVG elements, text that XML can hold, and the file that a drawing is."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

STYLES = {"u": "unet.css", "p": "plot.css"}  # class of a drawing => its style sheet
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Svg(str):
    """A drawing: a notebook shows it, `savefig` writes it to a file."""

    def _repr_svg_(self) -> str:
        return self

    def savefig(self, path: str | Path) -> None:
        Path(path).write_text(self, encoding="utf-8")


def sound(text: str) -> str:
    """`text` with a question mark for what XML cannot hold."""
    return NO_XML.sub("?", text)


def add(parent: Element, tag: str, text: str = "", /, **attributes: object) -> Element:
    """A new element in `parent`; `class_` is its class, other underscores are hyphens."""
    node = SubElement(parent, tag, {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()})
    node.text = sound(text) or None
    return node


def write(parent: Element, x: float, y: float, text: str, class_: str = "", anchor: str = "") -> Element:
    """Text whose middle is at the height `y`."""
    style = {name: value for name, value in (("class_", class_), ("text_anchor", anchor)) if value}
    return add(parent, "text", text, x=round(x, 1), y=round(y, 1), dy=".35em", **style)


@cache
def style(kind: str) -> str:
    """The style sheet of drawings of that class, whose colours are variables of a page."""
    return (Path(__file__).parent / STYLES[kind]).read_text(encoding="utf-8")


def file(kind: str, heading: str, width: float, height: float, *content: Element) -> Svg:
    """A drawing of the class `kind` that stands alone on white, in the colours that its style sheet names for that."""
    size = {"width": f"{width:g}", "height": f"{height:g}"}
    named = {"xmlns": "http://www.w3.org/2000/svg", "class": kind, "viewBox": f"0 0 {width:g} {height:g}"}
    root = Element("svg", named | size)
    add(root, "title", heading)
    add(root, "style", re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", style(kind)))
    add(root, "rect", fill="#ffffff", **size)
    root.extend(content)
    return Svg(tostring(root, encoding="unicode"))
