"""What this package reads of the configuration files of a diffusers pipeline. Needs no torch.

Each schema is checked and the file's whole contents go on to diffusers, which reads more of them than is named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from blockprune.decode import Finite

Channels = Annotated[int, Meta(ge=1, le=2**16)]
Side = Annotated[int, Meta(ge=1, le=2**14)]
Layers = Annotated[int, Meta(ge=1, le=128)]
Depth = Annotated[int, Meta(ge=0, le=256)]
Size = Annotated[int, Meta(ge=1, le=2**24)]
Stages = Annotated[list[Channels], Meta(min_length=1, max_length=16)]
Names = Annotated[list[str], Meta(min_length=1, max_length=16)]
Config = Mapping[str, Any]  # of one component, as its file or its loaded module holds it
Source = tuple[str | None, str | None]  # the library and the class of a component; neither where it is left out


class ModelIndex(msgspec.Struct):
    """model_index.json: which class each component is of."""

    class_name: str = field(name="_class_name")
    unet: tuple[str, str]
    vae: tuple[str, str]
    text_encoder: tuple[str, str]
    text_encoder_2: Source = (None, None)


class UNetConfig(msgspec.Struct):
    """unet/config.json. What may be given for each down stage is one value, or as many as there are stages."""

    sample_size: Side | Annotated[list[Side], Meta(min_length=2, max_length=2)]
    block_out_channels: Stages
    down_block_types: Names
    up_block_types: Names
    cross_attention_dim: Channels
    in_channels: Channels
    out_channels: Channels = 4
    layers_per_block: Layers | list[Layers] = 2
    attention_head_dim: Channels | list[Channels] = 8
    num_attention_heads: Channels | list[Channels] | None = None
    transformer_layers_per_block: Depth | list[Depth | list[Depth]] = 1
    only_cross_attention: bool | list[bool] = False
    norm_num_groups: Channels | None = 32
    addition_embed_type: str | None = None
    addition_time_embed_dim: Channels | None = None
    projection_class_embeddings_input_dim: Channels | None = None

    def __post_init__(self) -> None:
        n = len(self.down_block_types)
        per_stage = ("block_out_channels", "up_block_types", "layers_per_block", "attention_head_dim", "num_attention_heads")
        for name in (*per_stage, "transformer_layers_per_block", "only_cross_attention"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != n:
                raise ValueError(f"Expected {name} of {n} values, one for each of down_block_types, got {len(value)}")
        if self.addition_embed_type == "text_time":
            if self.addition_time_embed_dim is None or self.projection_class_embeddings_input_dim is None:
                raise ValueError("Expected addition_time_embed_dim and projection_class_embeddings_input_dim beside text_time")
            if self.projection_class_embeddings_input_dim <= 6 * self.addition_time_embed_dim:
                raise ValueError("Expected projection_class_embeddings_input_dim above 6 times addition_time_embed_dim")


class VaeConfig(msgspec.Struct):
    """vae/config.json."""

    block_out_channels: Stages
    latent_channels: Channels = 4
    layers_per_block: Layers = 1
    norm_num_groups: Channels = 32
    in_channels: Channels = 3
    out_channels: Channels = 3
    scaling_factor: Finite = 0.18215
    shift_factor: Finite | None = None

    def __post_init__(self) -> None:
        if not self.scaling_factor > 0:
            raise ValueError("Expected a scaling_factor above 0")


class TextConfig(msgspec.Struct):
    """config.json of a text encoder."""

    architectures: list[str] | None = None
    vocab_size: Size = 49408
    hidden_size: Channels = 512
    intermediate_size: Size = 2048
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 8
    max_position_embeddings: Channels = 77
    projection_dim: Channels = 512


class SchedulerConfig(msgspec.Struct):
    """scheduler_config.json."""

    num_train_timesteps: Annotated[int, Meta(ge=1, le=10**6)] = 1000
    beta_start: Finite = 0.0001
    beta_end: Finite = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[Finite] | None = None
    prediction_type: str = "epsilon"
    steps_offset: Annotated[int, Meta(ge=0, le=10**6)] = 0


SCHEMAS: dict[str, Any] = {
    "model_index.json": ModelIndex,
    "unet/config.json": UNetConfig,
    "vae/config.json": VaeConfig,
    "text_encoder/config.json": TextConfig,
    "text_encoder_2/config.json": TextConfig,
    "scheduler/scheduler_config.json": SchedulerConfig,
}
