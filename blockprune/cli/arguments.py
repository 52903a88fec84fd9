"""What may stand on a command line: texts, numbers and places to write, checked before a command begins and loads anything."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from blockprune.cli.edge import one_line_errors
from blockprune.errors import UserError
from blockprune.runs.directory import check_file, check_folder, check_run_folder

SHOWN = 60
WHOLE = re.compile(r"[+-]?[0-9]{1,400}")
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Bounds:
    """The numbers that an option takes, from `least` to `most`; without `least` itself where that is `excluded`."""

    least: float
    most: float
    whole: bool = True
    excluded: bool = False

    def check(self, option: str, text: str) -> None:
        """Raises UserError for anything but a number within these bounds, written in ASCII digits."""
        kind = "whole numbers" if self.whole else "numbers"
        some = f"give one from {self.least} to {self.most}"
        if not (WHOLE if self.whole else DECIMAL).fullmatch(text):
            raise UserError(f"{option} takes {kind}, such as {max(self.least, 1)}: got {shown(text)}; {some}")
        value = int(text) if self.whole else float(text)
        if value < self.least or (self.excluded and value == self.least):
            raise UserError(
                f"{option} must be {'above' if self.excluded else 'at least'} {self.least}: got {shown(text, '')}; {some}"
            )
        if value > self.most or not math.isfinite(value):
            raise UserError(f"{option} must be at most {self.most}: got {shown(text, '')}; {some}")


# by parameter, or by command and parameter where a command differs
BOUNDS: Mapping[str, Bounds] = {
    "batch_size": Bounds(1, 10**5),
    "cache n_images": Bounds(1, 10**9),
    "cfg_scale": Bounds(0, 1000, whole=False),
    "checkpointing_steps": Bounds(1, 10**9),
    "checkpoints_total_limit": Bounds(1, 10**6),
    "eps_samples": Bounds(1, 10**5),
    "final_factor": Bounds(1, 1000),
    "finalists": Bounds(1, 1000),
    "gradient_accumulation_steps": Bounds(1, 10**5),
    "learning_rate": Bounds(0, 10, whole=False, excluded=True),
    "max_train_steps": Bounds(1, 10**9),
    "n_images": Bounds(1, 10**6),
    "random": Bounds(0, 10**5),
    "recover": Bounds(0, 10**6),
    "recover_batch_size": Bounds(1, 10**5),
    "rounds": Bounds(1, 10**5),
    "seed": Bounds(0, 2**62),  # what is added to a seed (an image's number, a worker's, 2**32 …) stays below 2**63
    "shard_size": Bounds(1, 10**6),
    "steps": Bounds(1, 10**4),
    "train_batch_size": Bounds(1, 10**5),
    "trials": Bounds(1, 10**5),
    "validation_steps": Bounds(1, 10**9),
    "workers": Bounds(1, max(16, 2 * (os.cpu_count() or 1))),
}
LISTS = ("steps", "cfg_scale", "scheduler", "quantize", "measures", "unit")  # take several values with commas between
NAMES = ("label", "study_name")  # become names of files or of a database's entries
LONGEST_NAME = 200
OUT_IS_FILE = ("report", "map-adapter", "stats")
OUT_IS_RUN = ("scan", "search", "distill", "evaluate")


class Command(TyperCommand):
    """A command that begins only when nothing on its command line is wrong by itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[0]
        if not given.get("help"):
            for param in self.params:
                for text in _texts(given.get(str(param.name))):
                    check_argument(str(self.name), str(param.name), _spelt(param), text)
        rest = super().parse_args(ctx, args)
        if isinstance(out := ctx.params.get("out"), Path):
            _check_out(str(self.name), out)
        elif "out" in ctx.params:
            check_folder(Path("runs"))
        return rest

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


def check_argument(command: str, name: str, option: str, text: str) -> None:
    """Raises UserError where a word cannot be meant: nothing at all, no number of the option's bounds, no file or folder."""
    if not text.strip():
        raise UserError(f"{option} is empty: leave it out, or give it a value")
    if "\0" in text:
        raise UserError(f"{option} holds a zero byte, which no name does: got {shown(text)}; leave it out")
    if name in NAMES and len(text) > LONGEST_NAME:
        raise UserError(f"{option} must be at most {LONGEST_NAME} characters: got {len(text)}; shorten it")
    parts = [part.strip() for part in text.split(",")] if name in LISTS else [text]
    if not all(parts):
        raise UserError(f"{option} has an empty entry: got {shown(text)}; write single commas between its values")
    if bounds := BOUNDS.get(f"{command} {name}", BOUNDS.get(name)):
        for part in parts:
            bounds.check(option, part)
    elif _is_special(text):
        raise UserError(f"{option} takes files and folders: {shown(text)} is a pipe or a device; copy what it holds to a file")


def _is_special(text: str) -> bool:
    """True for the path of something that is neither a file nor a folder, and may never end."""
    try:
        mode = os.stat(text).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _check_out(command: str, out: Path) -> None:
    """Raises UserError or OSError where a command's result could not be written in the end."""
    if command in OUT_IS_FILE:
        check_file(out)
    elif command in OUT_IS_RUN:
        check_run_folder(out)
    else:
        check_folder(out)


def shown(text: str, quote: str = "'") -> str:
    """The text for a message, cut where it is long."""
    return f"{quote}{text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'}{quote}"
