"""LoRA adapters (arXiv 2106.09685) on the attentions of a network and of text encoders, by peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockprune.errors import UserError
from blockprune.model.model import Model

NETWORK = ("to_k", "to_q", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


def check_peft() -> None:
    """Raises UserError where peft is not to be had."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError("--rank needs the peft package: pip install 'blockprune[lora]', or leave --rank out") from None


def add_lora(module: Any, rank: int, alpha: float, seed: int) -> None:
    """Adds adapters that change nothing yet, and are all that is trained. UserError when there is no attention to adapt."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, _ in module.named_modules()]
    targets = [target for target in (*NETWORK, *TEXT) if any(name.endswith(f".{target}") for name in names)]
    if not targets:
        raise UserError(f"nothing for a LoRA to adapt: this {type(module).__name__} has no attention; leave --rank out")
    config: Any = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module)


def unloadable() -> str:
    """Why transformers would load no adapter of a text encoder here, in its words; "" where it would."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as err:
        return str(err)
    return ""


def save_lora(model: Model, parts: Mapping[str, nn.Module], folder: Path) -> None:
    """Writes the adapters of a pipeline's parts as `pipe.load_lora_weights(folder)` reads them."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers: dict[str, Any] = {}
    for name, module in parts.items():
        weights = get_peft_model_state_dict(module)
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers({k: t.contiguous().cpu() for k, t in weights.items()})
        config: Any = module.peft_config
        layers[f"{name}_lora_adapter_metadata"] = config["default"].to_dict()
    type(model.pipe).save_lora_weights(folder, **layers)
