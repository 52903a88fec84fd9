"""The names that other tools give the blocks of a U-Net: those of the original (LDM) checkpoints, ComfyUI, GGUF files and kohya."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from blockprune.errors import UserError
from blockprune.model.config_schema import Config

SINGLE_FILE, COMFYUI = "model.diffusion_model.", "diffusion_model."  # what single files, and ComfyUI within, put before a name
FIXED = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding": "time_embed",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "add_embedding": "label_emb",
    "mid_block": "middle_block",
}
OF_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PART = re.compile(
    r"(?P<where>down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(?P<kind>resnets|attentions|\w+samplers)\.(?P<index>\d+)(?P<rest>.*)"
)


@dataclass(frozen=True)
class OriginalNames:
    """Original names of the modules of a U-Net with a stock configuration; those of a slot-keeping student are its teacher's."""

    config: Config

    def __post_init__(self) -> None:
        types = [*self.config["down_block_types"], *self.config["up_block_types"]]
        if odd := next((kind for kind in types if kind.removeprefix("CrossAttn") not in ("DownBlock2D", "UpBlock2D")), None):
            raise UserError(
                f"the original checkpoints have no stage like {odd!r}: only U-Nets of SD v1, v2 and SDXL have such names"
            )

    def __call__(self, name: str) -> str | None:
        """The original name of a module or tensor; None for one that the original has not, such as a whole stage.

        >>> from blockprune.export.original_names import OriginalNames
        >>> from blockprune.model.pretrained import configs
        >>> OriginalNames(configs("sd-v1-5").unet)("up_blocks.1.attentions.2.proj_in.weight")
        'output_blocks.5.1.proj_in.weight'
        """
        if found := _PART.fullmatch(name):
            where, kind, index = found["where"], found["kind"], int(found["index"])
            return f"{self._place(where, kind, index)}{_inside(kind, found['rest'])}"
        outer = next((known for known in FIXED if name == known or name.startswith(f"{known}.")), None)
        return None if outer is None else FIXED[outer] + name[len(outer) :]

    def _place(self, where: str, kind: str, index: int) -> str:
        """The original module of a ResNet, attention or resampler."""
        if where == "mid_block":
            return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}"
        stage = int(where.rpartition(".")[2])
        if where.startswith("down"):
            first = 1 + sum(n + 1 for n in self._layers[:stage])
            return (
                f"input_blocks.{first + self._layers[stage]}.0"
                if kind == "downsamplers"
                else f"input_blocks.{first + index}.{_slot(kind)}"
            )
        counts = [n + 1 for n in self._layers_up]
        first = sum(counts[:stage])
        if kind == "upsamplers":
            attention = self.config["up_block_types"][stage].startswith("CrossAttn")
            return f"output_blocks.{first + counts[stage] - 1}.{1 + attention}"
        return f"output_blocks.{first + index}.{_slot(kind)}"

    @property
    def _layers(self) -> list[int]:
        """ResNets of each down stage."""
        n = self.config["layers_per_block"]
        return list(n) if isinstance(n, list | tuple) else [int(n)] * len(self.config["down_block_types"])

    @property
    def _layers_up(self) -> list[int]:
        """ResNets of each up stage but one, innermost first."""
        return list(self.config.get("reverse_layers_per_block") or self._layers[::-1])

    def table(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Block => tool => its name there: "ldm", "single_file", "comfyui", "gguf" and "kohya", the block's place in lists of
        LoRA weights. Blocks that the original has not are left out."""
        found = {name: original for name in names if (original := self(name)) is not None}
        return {
            name: {
                "ldm": original,
                "single_file": SINGLE_FILE + original,
                "comfyui": COMFYUI + original,
                "gguf": original,
                "kohya": kohya(original),
            }
            for name, original in found.items()
        }

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a U-Net under the names of a single file; UserError for one that has none."""
        if odd := next((key for key in tensors if self(key) is None), None):
            raise UserError(f"{odd!r} has no name in the original checkpoints: export another format")
        return {f"{SINGLE_FILE}{self(key)}": tensor for key, tensor in tensors.items()}


def kohya(original: str) -> str:
    """The place of a block in kohya's lists of weights by block: IN04, M00, OUT11; "" for what lies outside the blocks."""
    if found := re.match(r"(input|output)_blocks\.(\d+)", original):
        return f"{'IN' if found[1] == 'input' else 'OUT'}{int(found[2]):02}"
    return "M00" if original.startswith("middle_block") else ""


def _slot(kind: str) -> int:
    return 0 if kind == "resnets" else 1


def _inside(kind: str, rest: str) -> str:
    """The original name of what lies within a block."""
    part = rest[1:].split(".")[0] if rest else ""
    if kind == "resnets" and part in OF_RESNET:
        return f".{OF_RESNET[part]}{rest[1 + len(part) :]}"
    if kind == "downsamplers" and part == "conv":
        return f".op{rest[len('.conv') :]}"
    return rest
