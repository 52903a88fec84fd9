"""`blockprune map-adapter`: a LoRA or an IP-Adapter made for a teacher, renamed for an exported student."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockprune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from blockprune.export.adapters import Mapped

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names


def map_adapter(
    adapter: Annotated[
        Path,
        typer.Argument(help="The .safetensors file of the teacher's LoRA or IP-Adapter, or a folder that peft saved."),
    ],
    model: Annotated[Path, typer.Option(help="The folder that `blockprune export` wrote.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write; peft's adapter_config.json goes beside it.")],
) -> None:
    """Rename a teacher's LoRA or IP-Adapter for its student: what adapts a removed block goes, the rest follows its block.

    Examples:

    $ blockprune map-adapter style.safetensors --model my-student --out style-small.safetensors

    $ blockprune map-adapter adapters/ip-adapter.safetensors --model runs/distill/pipeline --out ip-adapter-small.safetensors
    """
    from safetensors import safe_open

    from blockprune.decode import Object, read_json
    from blockprune.model.pretrained import header

    source = adapter / WEIGHTS if adapter.is_dir() else adapter
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"--out must be a .safetensors file: got {str(out)!r}")
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"--out must be another file than the adapter itself: got {str(out)!r}")
    config = source.with_name(CONFIG) if source.with_name(CONFIG).is_file() else None
    beside = out.with_name(CONFIG)
    if config and beside.exists() and beside.samefile(config):
        raise UserError(f"--out must be in another folder than the adapter, whose {CONFIG} would be replaced: got {str(out)!r}")
    header(source)
    with safe_open(source, framework="pt") as file:
        metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    mapped = _map(tensors, model, metadata, read_json(config, Object, "save it again") if config else None)
    _write(mapped, out)
    n = len(mapped.tensors), len(mapped.renamed), len(mapped.dropped)
    print(f"{out}: {n[0]} tensors, {n[1]} of them renamed; {n[2]} of removed blocks dropped")


def _map(tensors: Mapping[str, Tensor], model: Path, metadata: Mapping[str, str], config: Mapping[str, object] | None) -> Mapped:
    from blockprune.export import adapters, ip_adapter
    from blockprune.export.pipeline import exported_skeleton, read_block_map, read_teacher
    from blockprune.model import surgery
    from blockprune.model.architecture import Architecture

    blocks = read_block_map(model)
    if not ip_adapter.is_ip_adapter(tensors):
        mapped = adapters.map_lora(tensors, blocks, metadata, config)
        adapters.check_fits(mapped, exported_skeleton(model))
        return mapped
    teacher = read_teacher(model)
    if teacher is None:
        raise UserError(f"{str(model)!r} does not say what its teacher was: export the student again")
    return ip_adapter.map_ip_adapter(tensors, blocks, surgery.skeleton(teacher["unet"], Architecture()), exported_skeleton(model))


def _write(mapped: Mapped, out: Path) -> None:
    """The tensors, and peft's configuration beside them where there is one; nothing half-written."""
    from safetensors.torch import save

    from blockprune.runs.atomic import writing

    tensors = {key: t.contiguous() for key, t in mapped.tensors.items()}
    contents = {out: save(tensors, {"format": "pt", **mapped.metadata})}
    if mapped.config is not None:
        contents[out.with_name(CONFIG)] = (json.dumps(mapped.config, indent=2, sort_keys=True) + "\n").encode()
    try:
        with ExitStack() as stack:
            for path, content in contents.items():
                stack.enter_context(writing(path)).write_bytes(content)
    except OSError as err:
        raise UserError(f"cannot write to {str(out)!r} ({err.strerror}): choose another --out") from None
