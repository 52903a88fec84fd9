"""`blockprune graph`: the blocks of a U-Net, and the units in which they can be removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from blockprune.cli import options
from blockprune.model.graph import KINDS, Block, BlockGraph

if TYPE_CHECKING:
    from rich.table import Table

ROOMY = 140  # columns
HOW = {
    "Pass": "passes on its input",
    "PassAttention": "passes on its input",
    "DropSkip": "passes on its input, drops its skip",
    "Shortcut": "keeps its 1x1 shortcut alone",
    "Zero": "gives zeros beside the residual",
    "PassDown": "passes on its input",
    "PassUp": "passes on its input, drops its skips",
}


def graph(
    model: options.Model = "tiny-digits",
    resolution: options.Resolution = None,
    unit: Annotated[
        str | None,
        typer.Option(help="list the units of removal instead: stage, pair, block or layer", rich_help_panel="What to remove"),
    ] = None,
    macs: options.Macs = "thop",
    as_json: options.AsJson = False,
) -> None:
    """Show the U-Net block by block: shapes, parameters, multiply-adds, how each can be removed, its skip.

    Examples:

    $ blockprune graph --model sd-v1-5

    $ blockprune graph --unit pair --json
    """
    from blockprune import api
    from blockprune.reports.table import quantity

    convention = options.convention(macs)
    found = api.graph(model, resolution=resolution)
    if as_json:
        extra = {"model": model, "skip_edges": [list(edge) for edge in found.skip_edges]}
        options.print_json(found.to_json() | extra | ({"units": _units(found, unit)} if unit else {}))
        return
    console = options.console()
    console.print(_unit_table(found, unit, convention) if unit else _block_table(found, convention, console.width < ROOMY))
    c, h, w = found.latent
    macs = f"{quantity(found.total.macs(convention))} MACs ({convention})"
    total = f"{quantity(found.total.params)} parameters, {found.total.keys} keys, {macs}"
    console.print(f"{model}: {total} for one {c}x{h}x{w} latent; 1 MAC = one multiply-add")


def _units(found: BlockGraph, unit: str) -> dict[str, dict[str, object]]:
    return {
        label: {"removed": arch.terms, "saves": (found.total - found.cost(arch)).to_json()}
        for label, arch in found.units(unit).items()
    }


def _table(title: str, left: list[str], right: list[str], last: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in [*left, *right, *last]:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _block_table(found: BlockGraph, convention: str, narrow: bool) -> Table:
    """Every block in a row; a `narrow` table has short names, which say the kind as well."""
    from blockprune.reports.table import quantity
    from blockprune.reports.view import short

    table = _table(
        "U-Net blocks in forward order",
        ["block"] if narrow else ["block", "kind"],
        ["resolution", "channels", "params", "MACs" if narrow else f"MACs ({convention})"],
        ["removed", "skip from"],
    )
    named = short if narrow else str
    stage = ""
    for block in found:
        if block.kind == "C":  # three for each layer: shown when they are asked for as units
            continue
        if block.kind != "F" and block.stage != stage:
            table.add_section()
        stage = "" if block.kind == "F" else block.stage
        table.add_row(
            *([named(block.name)] if narrow else [block.name, KINDS[block.kind]]),
            _resolution(block),
            _arrow(block.shape_in[0], block.shape_out[0]),
            quantity(block.cost.params),
            quantity(block.cost.macs(convention)),
            _how(block),
            ", ".join(map(named, block.skips)),
        )
    return table


def _arrow(before: object, after: object) -> str:
    return str(before) if before == after else f"{before} → {after}"


def _resolution(block: Block) -> str:
    if block.kind in "TC":
        return f"{block.shape_in[1]} tokens"
    return _arrow(*(f"{h}x{w}" for _, h, w in (block.shape_in, block.shape_out)))


def _how(block: Block) -> str:
    if not block.removable:
        return f"no: {block.why_fixed}"
    how = HOW.get(block.stand_in, block.stand_in)
    return f"{how}; with {', '.join(block.requires)}" if block.requires else how


def _unit_table(found: BlockGraph, unit: str, convention: str) -> Table:
    from blockprune.reports.table import quantity

    table = _table(f"units of removal: {unit}", ["unit"], ["params saved", f"MACs saved ({convention})"], ["removed blocks"])
    for label, arch in found.units(unit).items():
        saved = found.total - found.cost(arch)
        table.add_row(label, quantity(saved.params), quantity(saved.macs(convention)), ", ".join(arch))
    return table
