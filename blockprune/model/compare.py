"""Whether two networks are the same: settings and weights exactly, outputs within what rounding explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def rounding(network: nn.Module, dtype: torch.dtype) -> float:
    """The relative distance (see `distance`) that two right ways of computing `network` in `dtype` stay below.

    Kernels are chosen by processor, thread count, memory layout, shape, alignment and `requires_grad`, and each adds in another
    order. A layer's result then differs by eps(dtype), for it is stored in `dtype`, and by some eps(float32), for sums are kept in
    float32 at least; 4 are allowed. Over L layers these differences are independent and add up like a random walk:

        sqrt(L) (eps(dtype) + 4 min(eps(dtype), eps(float32))), with L the modules that have parameters of their own.

    For SD v1 (L = 391) that is 1.2e-5 in float32, 0.02 in float16 and 0.15 in bfloat16. Seen between layouts and kernels: 0.03 to
    0.2 sqrt(L) eps(dtype) in every precision; in the worst element of a float32 output of unit size 0.5e-6 to 2.7e-6.
    """
    layers = sum(next(m.parameters(recurse=False), None) is not None for m in network.modules())
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    return math.sqrt(max(layers, 1)) * (eps + 4 * min(eps, eps32))


def distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖ in float64: 0 for equal tensors, infinite for other shapes, and where a value is not finite."""
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    x, y = a.detach().double().cpu(), b.detach().double().cpu()
    apart, size = float(torch.linalg.vector_norm(x - y)), float(torch.linalg.vector_norm(y))
    return apart / size if size else math.inf if apart else 0.0


def same_outputs(a: Tensor, b: Tensor, network: nn.Module) -> bool:
    """True when two outputs of `network`, both in the precision of `a`, differ by no more than rounding."""
    return distance(a, b) <= rounding(network, a.dtype)


def difference(ours: nn.Module, theirs: nn.Module, inputs: Mapping[str, Any], new_name: Callable[[str], str | None]) -> str:
    """What makes `theirs` another network than `ours`, in words; "" when nothing does.

    `new_name` gives their name of one of our modules or tensors, None for one that is gone. Both are run on `inputs`, in eval mode.
    """
    weights = theirs.state_dict()
    names = {name: str(new_name(name)) for name in ours.state_dict()}
    if lost := sorted({*names.values()} ^ weights.keys()):
        return f"{lost[0]!r} is in one of them alone"
    for name, t in ours.state_dict().items():
        if not torch.equal(t, weights[names[name]]):
            return f"{name!r} came back with other values (or is not a number)"
    if name := other_settings(ours, theirs, new_name):
        return f"{name!r} came back with other settings (heads, norms or the like)"
    with torch.no_grad():
        a, b = (network(**inputs, return_dict=False)[0] for network in (theirs, ours))
    if not same_outputs(a, b, ours):
        apart, allowed = f"{distance(a, b):.2g}", f"{rounding(ours, a.dtype):.2g}"
        return f"it computes something else, {apart} of the output's size apart where rounding gives {allowed} at most"
    return ""


def other_settings(ours: nn.Module, theirs: nn.Module, new_name: Callable[[str], str | None]) -> str:
    """The first module of `ours` that `theirs` lacks or computes with other settings; "" when there is none.

    Stages are left out: their kind may change with what they hold. Only outputs tell about them.
    """
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        new = new_name(name)
        if new is None or isinstance(module, nn.ModuleList) or name in ("", "mid_block") or _is_stage(name):
            continue
        if new not in modules or _settings(modules[new]) != _settings(module):
            return name
    return ""


def _is_stage(name: str) -> bool:
    return name.startswith(("down_blocks", "up_blocks")) and name.count(".") < 2


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module's computation depends on besides its tensors and its children."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple)) and k != "training"}
    return {"type": type(module)} | plain
