"""Where a command meets the system: what goes wrong becomes one line and exit code 2, and what is printed can be printed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import typer

from blockprune import errors
from blockprune.errors import redacted

MAX_CHARACTERS = 1500
CLICK_ERROR = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within this context a mistake of the user's or a failure of the system ends the process with one line and code 2.

    Anything else is a fault of this package and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except Exception as err:
        if (message := explanation(err)) is None:
            raise
        fail(message)


def fail(message: str) -> NoReturn:
    line = redacted(" ".join(message.split()))
    if len(line) > MAX_CHARACTERS:
        line = f"{line[: MAX_CHARACTERS // 2]} … {line[-MAX_CHARACTERS // 2 :]}"
    with suppress(OSError):
        print("error: " + line, file=sys.stderr)
    sys.exit(2)


def explanation(err: Exception) -> str | None:
    """What went wrong and what to do, where that is the user's or the system's to mend; None for a fault of this package."""
    if isinstance(err, CLICK_ERROR):
        return _of_usage(err)
    if isinstance(err, OSError) and err.errno == errno.EPIPE:
        _discard_output()
    return errors.explanation(err)


def _of_usage(err: Exception) -> str:
    """A word that the command does not know, or lacks."""
    message = str(getattr(err, "format_message", err.__str__)()).strip().rstrip(".")
    context = getattr(err, "ctx", None)
    return f"{message}: see `{context.command_path} --help`" if context is not None else message


def _discard_output() -> None:
    """Nobody reads standard output any more: what is left in its buffer must not fail once more when the process ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_printable() -> None:
    """Characters that the terminal's encoding lacks are printed as escapes, so that printing never fails."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
