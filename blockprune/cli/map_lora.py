"""`blockprune map-lora`: a LoRA made for a teacher, renamed for an exported student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.errors import UserError


def map_lora(
    lora: Annotated[Path, typer.Argument(help="The LoRA's .safetensors file, made for the teacher.")],
    model: Annotated[Path, typer.Option(help="The folder that `blockprune export` wrote.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
) -> None:
    """Rename a teacher's LoRA for its student: what adapts a removed block goes, the rest follows its block."""
    from safetensors import safe_open
    from safetensors.torch import save

    from blockprune import adapters
    from blockprune.checkpoints import header
    from blockprune.export import exported_skeleton, read_block_map

    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"--out must be a .safetensors file: got {str(out)!r}")
    if out.exists() and lora.exists() and out.samefile(lora):
        raise UserError(f"--out must be another file than the LoRA itself: got {str(out)!r}")
    blocks = read_block_map(model)
    header(lora)
    with safe_open(lora, framework="pt") as file:
        metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    mapped = adapters.map_lora(tensors, blocks, metadata)
    adapters.check_fits(mapped, exported_skeleton(model))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UserError(f"cannot write to {str(out)!r} ({err.strerror}): choose another --out") from None
    part = out.with_name(f".{out.name}.part")
    try:
        kept = {key: t.contiguous() for key, t in mapped.tensors.items()}
        part.write_bytes(save(kept, {"format": "pt", **mapped.metadata}))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    n = len(mapped.tensors), len(mapped.renamed), len(mapped.dropped)
    print(f"{out}: {n[0]} tensors, {n[1]} of them renamed; {n[2]} of removed blocks dropped")
