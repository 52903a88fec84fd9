"""The command line: one module per command, heavy imports inside the commands so that help answers at once."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence

import typer

from blockprune.cli import cache, cost, distill, evaluate, export, graph, map_adapter, report, scan, search, stats
from blockprune.errors import UserError

app = typer.Typer(
    name="blockprune",
    help="Which blocks of a diffusion U-Net can go, what each one costs in quality, and how to get a good smaller model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("graph")(graph.graph)
app.command("cost")(cost.cost)
app.command("cache")(cache.cache)
app.command("scan")(scan.scan)
app.command("search")(search.search)
app.command("distill")(distill.distill)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("map-adapter")(map_adapter.map_adapter)
app.command("report")(report.report)
app.command("stats")(stats.stats)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and leaves with its exit code: 2 and one line for what the user can mend, 130 on Ctrl-C."""
    _quieten()
    try:
        app(args=argv, prog_name="blockprune")
    except UserError as err:
        _fail(str(err))
    except Exception as err:
        if not _disk_full(err):
            raise
        _fail("the disk is full: free some space and run the same command again")


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _disk_full(err: Exception) -> bool:
    """True also for errors of compiled writers, which have a message only."""
    return getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(err)


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
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao registers what torch knows by now
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # of how torchao, which diffusers imports, names its types
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than a name or prompt has
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
