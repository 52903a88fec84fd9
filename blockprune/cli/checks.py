"""What may stand on a command line: texts, numbers and places to write, checked before a command begins and loads anything."""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from blockprune.cli.error_line import one_line_errors
from blockprune.errors import UserError
from blockprune.request import Bounds, bounds, check_text, shown
from blockprune.runs.directory import check_file, check_folder, check_run_folder
from blockprune.stages.fields import Drawing

WHOLE = re.compile(r"[+-]?[0-9]{1,400}")
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
# of commands that no request makes
BOUNDS: Mapping[str, Bounds | None] = {"batch_size": bounds(Drawing, "batch_size")}
OUT_IS_FILE = ("report", "map-adapter", "stats")
OUT_IS_RUN = ("scan", "search", "distill", "evaluate")


class CheckedCommand(TyperCommand):
    """A command that begins only when nothing on its command line is wrong by itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[0]
        if not given.get("help"):
            for param in self.params:
                for text in _texts(given.get(str(param.name))):
                    check_argument(_spelt(param), text, *self._takes(str(param.name)))
        rest = super().parse_args(ctx, args)
        if (out := ctx.params.get("out")) is not None:
            is_file = self.name in OUT_IS_FILE or ctx.params.get("format") == "ldm"
            _check_out(str(self.name), Path(out), is_file)
        elif "out" in ctx.params and self.name not in OUT_IS_FILE:
            check_folder(Path("runs"))
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Leaves out the --no-… of a flag that is off by default, so that long names stand whole in 80 columns."""
        shown = copy.copy(self)
        shown.params = [self._as_shown(param) for param in self.params]
        super(CheckedCommand, shown).format_help(ctx, formatter)

    def _as_shown(self, param: Any) -> Any:
        request = getattr(self.callback, "request", None)
        if not param.secondary_opts or request is None or request.__dataclass_fields__[param.name].default:
            return param
        shown = copy.copy(param)
        shown.secondary_opts = []
        return shown

    def _takes(self, name: str) -> tuple[Bounds | None, bool]:
        """The numbers that a parameter takes, and whether it takes several values with commas between."""
        request = getattr(self.callback, "request", None)
        if request is None or name not in request.options():
            return BOUNDS.get(name), False
        return bounds(request, name), request.options()[name].commas

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


def _texts(given: Any) -> Iterator[str]:
    """The words given for one parameter; flags have none."""
    for text in given if isinstance(given, list | tuple) else [given]:
        if isinstance(text, str | os.PathLike):
            yield os.fspath(text)


def _spelt(param: Any) -> str:
    """The parameter as a user writes it: --n-images, FOLDER."""
    return max(param.opts, key=len) if param.param_type_name == "option" else str(param.name).upper()


def check_argument(option: str, text: str, within: Bounds | None = None, commas: bool = False) -> None:
    """Raises UserError where a word cannot be meant: nothing at all, no number within its bounds, no file or folder."""
    check_text(option, text)
    parts = [part.strip() for part in text.split(",")] if commas else [text]
    if not all(parts):
        raise UserError(f"{option} has an empty entry: got {shown(text)}; write single commas between its values")
    if within is not None:
        for part in parts:
            number(option, part, within)
    elif _is_special(text):
        raise UserError(f"{option} takes files and folders: {text!r} is a pipe or a device; copy what it holds to a file")


def number(option: str, text: str, within: Bounds) -> float:
    """The number that the text is. Raises UserError unless it is one within these bounds, written in ASCII digits."""
    if not (WHOLE if within.whole else DECIMAL).fullmatch(text):
        numbers = "whole numbers" if within.whole else "numbers"
        raise UserError(f"{option} takes {numbers}, such as {max(within.least, 1)}: got {shown(text)}; {within}")
    value = int(text) if within.whole else float(text)
    within.check(option, value, text)
    return value


def _is_special(text: str) -> bool:
    """True for the path of something that is neither a file nor a folder, and may never end."""
    try:
        mode = os.stat(text).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _check_out(command: str, out: Path, is_file: bool) -> None:
    """Raises UserError or OSError where a command's result could not be written in the end."""
    if is_file:
        check_file(out)
    elif command in OUT_IS_RUN:
        check_run_folder(out)
    else:
        check_folder(out)
