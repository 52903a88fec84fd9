"""`blockprune names`: every block under the names that other tools give it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from blockprune.cli import options
from blockprune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockprune.model.architecture import Architecture
    from blockprune.model.config_schema import Config
    from blockprune.model.graph import BlockGraph


def names(
    model: options.Model = "tiny-digits",
    arch: Annotated[
        str, typer.Option(help="a student: a preset, block names, or a JSON file", rich_help_panel="What to remove")
    ] = "full",
    as_json: options.AsJson = False,
) -> None:
    """Show each block under the names of diffusers, the original checkpoints, kohya's lists, ComfyUI and GGUF files.

    With --arch, or an exported student or its distill run as the model: whether the block is removed, and the name that it has in a
    student that stock diffusers loads.

    Examples:

    $ blockprune names --model sd-v1-5

    $ blockprune names --model sdxl --arch ssd-1b --json

    $ blockprune names --model runs/distill
    """
    from blockprune.export.original_names import COMFYUI, SINGLE_FILE, OriginalNames
    from blockprune.export.stock_config import Stock, expressible

    config, graph, removed = _teacher_and_removed(model, arch)
    stock = expressible(config, removed) if removed else None
    rows: dict[str, dict[str, object]] = {}
    for name, row in OriginalNames(config).table(_shown(graph)).items():
        rows[name] = dict(row)
        if removed:
            rows[name] |= {"removed": name in removed}
            rows[name] |= {"student": stock.blocks.new_name(name)} if isinstance(stock, Stock) else {}
    if as_json:
        options.print_json({"model": model, "removed": removed.terms, "blocks": rows})
        return
    _print(rows, student=isinstance(stock, Stock))
    print(f"{model}: a single file puts {SINGLE_FILE!r} before an LDM name, ComfyUI {COMFYUI!r}, a GGUF file nothing")
    if isinstance(stock, str):
        print(f"the student keeps its teacher's names, with gaps: no stock configuration ({stock})")


def _teacher_and_removed(model: str, arch: str) -> tuple[Config, BlockGraph, Architecture]:
    """The teacher's U-Net and what a student lacks of it: as `arch` says, or as an exported folder says of itself."""
    from blockprune.export.pipeline import PRUNING, is_exported, read_architecture, read_teacher
    from blockprune.model import presets, pretrained
    from blockprune.model.trace import trace
    from blockprune.stages.loading import pipeline_folder

    folder = pipeline_folder(model)
    teacher = read_teacher(folder) if is_exported(folder) else None
    if teacher and arch != "full":
        raise UserError(f"{str(folder)!r} is pruned already: leave out --arch, or give its teacher as the model")
    configs = pretrained.configs(str(folder))
    config = teacher["unet"] if teacher else configs.unet
    graph = trace(config, configs.latent(None), configs.n_tokens)
    return config, graph, read_architecture(folder / PRUNING) if teacher else presets.parse(arch, graph)


def _shown(graph: BlockGraph) -> Iterator[str]:
    """The blocks that have a row: layers only where an attention has several."""
    every = {block.name for block in graph}
    for block in graph:
        if block.kind in "RAMDU" or (block.kind == "T" and f"{block.name.rpartition('.')[0]}.1" in every):
            yield block.name


def _print(rows: dict[str, dict[str, object]], student: bool) -> None:
    from rich.table import Table

    gone = any("removed" in row for row in rows.values())
    table = Table()
    for head in ["diffusers", "LDM", "kohya", *(["removed"] if gone else []), *(["in the student"] if student else [])]:
        table.add_column(head, overflow="fold")
    for name, row in rows.items():
        cells = [name, str(row["ldm"]), str(row["kohya"])]
        cells += ["yes" if row["removed"] else ""] if gone else []
        cells += [str(row["student"] or "")] if student else []
        table.add_row(*cells)
    options.console().print(table)
