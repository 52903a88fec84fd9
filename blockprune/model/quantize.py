"""A U-Net's linear layers in 8 bits, by the torchao package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from blockprune.errors import UserError


def _weight_only(torchao: Any) -> Any:
    return torchao.Int8WeightOnlyConfig()


def _dynamic(torchao: Any) -> Any:
    return torchao.Int8DynamicActivationInt8WeightConfig()


# name => the torchao configuration: 8-bit weights alone, or with activations that are rounded to 8 bits as they come
QUANTIZERS: dict[str, Callable[[Any], Any]] = {"int8": _weight_only, "int8-dynamic": _dynamic}


def check_quantizer(name: str) -> None:
    """Raises UserError for a name that is none of QUANTIZERS, or without the package."""
    if name not in QUANTIZERS:
        raise UserError(f"unknown --quantize {name!r}: choose from none, {', '.join(QUANTIZERS)}")
    _torchao()


def quantized(unet: nn.Module, name: str) -> nn.Module:
    """A copy of `unet` whose linear layers are quantised; convolutions and norms stay as they are. Raises as `check_quantizer`."""
    check_quantizer(name)
    torchao = _torchao()
    small = copy.deepcopy(unet)
    torchao.quantize_(small, QUANTIZERS[name](torchao))
    return small


def _torchao() -> Any:
    try:
        from torchao import quantization
    except ImportError:
        raise UserError("--quantize needs the torchao package: pip install 'blockprune[quantization]'") from None
    return quantization
