"""IP-Adapters made for a teacher, renumbered for its student: their weights are numbered by an attention's place in the U-Net."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import UNet2DConditionModel
from torch import Tensor

from blockprune.errors import UserError
from blockprune.export.adapters import Mapped
from blockprune.export.stock_config import BlockMap

IMAGE, ATTENTION = "image_proj.", "ip_adapter."


def is_ip_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """True for the tensors of an IP-Adapter's file."""
    return any(key.startswith((IMAGE, ATTENTION)) for key in tensors)


def map_ip_adapter(
    tensors: Mapping[str, Tensor], blocks: BlockMap, teacher: UNet2DConditionModel, student: UNet2DConditionModel
) -> Mapped:
    """The IP-Adapter of the student: the attentions that stay get their new numbers, what projects the image stays as it is.

    Both U-Nets may be without weights. Raises UserError for a key or a width that is not of an IP-Adapter of `teacher`.
    """
    numbers = _renumbered(teacher, student, blocks)
    names: dict[str, str | None] = {}
    for key, t in tensors.items():
        if key.startswith(IMAGE):
            names[key] = key
            continue
        number, _, tail = key.removeprefix(ATTENTION).partition(".")
        if not key.startswith(ATTENTION) or not (number.isascii() and number.isdigit()) or not tail:
            raise UserError(f"{key!r} is no key of an IP-Adapter like 'ip_adapter.1.to_k_ip.weight': give its .safetensors file")
        kind = tail.split(".")[0].endswith("_ip")
        if (kind, int(number)) not in numbers:
            raise UserError(
                f"the IP-Adapter has {key!r}, but its teacher no attention of that number: it was made for another model"
            )
        new, module = numbers[kind, int(number)]
        names[key] = None if new is None else f"{ATTENTION}{new}.{tail}"
        if new is not None and kind and t.shape != (width := student.get_submodule(module).to_k.weight.shape):
            shapes = f"{key!r} has the shape {tuple(t.shape)}, {module!r} takes {tuple(width)}"
            raise UserError(f"the IP-Adapter's {shapes}: it was made for another model")
    kept = {key: new for key, new in names.items() if new is not None}
    if not any(new.startswith(ATTENTION) for new in kept.values()):
        raise UserError("nothing is left of the IP-Adapter: the student has none of the attentions that it was made for")
    return Mapped(
        tensors={new: tensors[key] for key, new in kept.items()},
        renamed={key: new for key, new in kept.items() if key != new},
        dropped=tuple(key for key, new in names.items() if new is None),
    )


def _renumbered(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel, blocks: BlockMap
) -> dict[tuple[bool, int], tuple[int | None, str]]:
    """(is it image attention?, the teacher's number) => (the student's, None when it is gone; the student's module).

    diffusers counts cross-attentions 1, 3, 5… for the image's keys and values, and all attentions 0, 1, 2… for a LoRA inside.
    """
    out: dict[tuple[bool, int], tuple[int | None, str]] = {}
    for image in (True, False):
        theirs = {module: number for number, module in _numbers(student, image).items()}
        for number, module in _numbers(teacher, image).items():
            new = blocks.new_name(module)
            out[image, number] = (None, module) if new is None else (theirs[new], new)
    return out


def _numbers(unet: UNet2DConditionModel, image: bool) -> dict[int, str]:
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    if not image:
        return dict(enumerate(names))
    return {2 * i + 1: name for i, name in enumerate(n for n in names if not n.endswith("attn1"))}
