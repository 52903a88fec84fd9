"""The command line: one module per command, heavy imports inside the commands so that help answers at once."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperGroup

from blockprune.cli import (
    cache,
    cost,
    distill,
    error_line,
    evaluate,
    export,
    graph,
    map_adapter,
    names,
    personalise,
    report,
    scan,
    search,
    stats,
)
from blockprune.cli.checks import CheckedCommand

app = typer.Typer(
    name="blockprune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"blockprune {version('blockprune')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Which blocks of a diffusion U-Net can go, what each one costs in quality, and how to get a good smaller model."""


app.command("graph", cls=CheckedCommand)(graph.graph)
app.command("cost", cls=CheckedCommand)(cost.cost)
app.command("cache", cls=CheckedCommand)(cache.cache)
app.command("scan", cls=CheckedCommand)(scan.scan)
app.command("search", cls=CheckedCommand)(search.search)
app.command("distill", cls=CheckedCommand)(distill.distill)
app.command("personalise", cls=CheckedCommand)(personalise.personalise)
app.command("evaluate", cls=CheckedCommand)(evaluate.evaluate)
app.command("export", cls=CheckedCommand)(export.export)
app.command("map-adapter", cls=CheckedCommand)(map_adapter.map_adapter)
app.command("names", cls=CheckedCommand)(names.names)
app.command("report", cls=CheckedCommand)(report.report)
app.command("stats", cls=CheckedCommand)(stats.stats)


@lru_cache(maxsize=1)
def _command() -> TyperGroup:
    """The command line with all its options, made once in a process."""
    return typer.main.get_group(app)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and leaves with its exit code: 2 and one line for what the user can mend, 130 on Ctrl-C."""
    _quieten()
    error_line.make_printable()
    try:
        with error_line.one_line_errors():
            code = _command()(args=argv, prog_name="blockprune", standalone_mode=False)
    except typer.Abort:
        code = 130
    sys.exit(code or 0)


def _quieten() -> None:
    """Third-party notices go; they must be told before the libraries are imported."""
    quiet = {
        "KINETO_LOG_LEVEL": "99",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # of how torchao, which diffusers imports, names its types
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
