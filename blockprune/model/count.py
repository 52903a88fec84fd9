"""Parameters and multiply-adds of any module, counted on the meta device: no weights, no arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from blockprune.errors import UserError
from blockprune.model.graph import Cost

CONV_AND_LINEAR = frozenset({"aten.convolution", "aten.addmm", "aten.mm"})
ATTENTION = frozenset({"aten.bmm", "aten.baddbmm"})


def count(module: nn.Module, run: Callable[[], Any]) -> dict[str, Cost]:
    """The cost of every submodule of a meta-device `module` in one call of `run`, by module path ("" is the whole).

    FLOPs are torch's FlopCounterMode (attention decomposes into bmm on the meta device), two FLOPs to a multiply-add. thop counts
    convolutions, linear layers and 4 per element of an affine LayerNorm, and nothing else that these models use.
    """
    norms: dict[str, int] = {}
    hooks = [
        m.register_forward_hook(_norm_counter(norms, name)) for name, m in module.named_modules() if isinstance(m, nn.LayerNorm)
    ]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _ByShapes(counter):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    flops = {path.partition(".")[2]: ops for path, ops in counter.get_flop_counts().items() if path != "Global"}
    return {name: _cost(name, m, flops.get(name, {}), norms) for name, m in module.named_modules()}


class _ByShapes(TorchFunctionMode):
    """Answers from shapes what costs a `counter` most time: linear layers, attention and norms, counted as it counts them."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            return self._linear(*args[:2])
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args[:3])
        if func is functional.layer_norm:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        self._add("aten.addmm", 2 * x.numel() * len(weight))
        return x.new_empty(*x.shape[:-1], len(weight))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._add("aten.bmm", 2 * query.numel() * key.shape[-2])
        self._add("aten.bmm", 2 * query[..., 0].numel() * key.shape[-2] * value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def _add(self, op: str, flops: int) -> None:
        for module in self.counter.mod_tracker.parents:
            self.counter.flop_counts[module][op] += flops


def _norm_counter(norms: dict[str, int], name: str) -> Callable[..., None]:
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        norms[name] = norms.get(name, 0) + output.numel() * (4 if module.elementwise_affine else 2)

    return add


def _cost(name: str, module: nn.Module, flops: Mapping[Any, int], norms: Mapping[str, int]) -> Cost:
    by_op: Counter[str] = Counter()
    for op, n in flops.items():
        by_op[str(op)] += n
    if unknown := by_op.keys() - CONV_AND_LINEAR - ATTENTION:
        raise UserError(f"cannot count multiply-adds of {', '.join(sorted(unknown))}: this model uses an operator not met before")
    conv_linear = sum(by_op[op] for op in CONV_AND_LINEAR) // 2
    attention = sum(by_op[op] for op in ATTENTION) // 2
    inside = sum(n for norm, n in norms.items() if not name or norm == name or norm.startswith(name + "."))
    return Cost(
        params=sum(p.numel() for p in module.parameters()),
        keys=len(module.state_dict()),
        thop=conv_linear + inside,
        conv_linear=conv_linear,
        with_attention=conv_linear + attention,
    )
