"""The thop and fvcore packages as second opinions on our counts: a disagreement is an error that names the operators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import UserError
from blockprune.model.graph import Cost

# what fvcore has no rule for and holds no multiply-add of a convolution, a linear layer or an attention product
ELEMENTWISE = frozenset(("add", "sub", "mul", "div", "neg", "exp", "sin", "cos", "sigmoid", "silu", "gelu", "softmax"))
MOVING = frozenset(("embedding", "argmax", "where", "masked_fill", "triu", "pad"))
LINEAR = frozenset({"conv", "linear", "addmm", "mm"})
ATTENTION = frozenset({"scaled_dot_product_attention", "bmm", "baddbmm", "matmul"})
Count = tuple[int, int]


class _Call(nn.Module):
    """A module whose keyword arguments are bound; the probes pass arguments by position only."""

    def __init__(self, net: nn.Module, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.net = net
        self.kwargs = dict(kwargs)

    def forward(self, *args: Tensor) -> Tensor:
        out = self.net(**self.kwargs)
        return out if isinstance(out, Tensor) else out[0]


def check_thop(module: nn.Module, kwargs: Mapping[str, Any], costs: Mapping[str, Cost]) -> int:
    """thop's multiply-adds of `module(**kwargs)`, when they agree with `costs` (by module path) in every kind of layer.

    `module` is a throw-away: thop leaves buffers in it. The meta device will do. Raises UserError on a disagreement.
    """
    profile = _thop_profile()
    kinds = {name: type(m).__name__ for name, m in module.named_modules() if not any(m.children())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total, _, tree = profile(_Call(module, kwargs), inputs=(), verbose=False, ret_layer_info=True)
    theirs = dict(_leaves(tree["net"][2], ""))
    by_kind: dict[str, Count] = {}
    for name, kind in kinds.items():
        a, b = by_kind.get(kind, (0, 0))
        by_kind[kind] = a + theirs.get(name, 0), b + costs[name].thop
    _agree("thop", by_kind | {"all layers": (int(total), costs[""].thop)})
    return int(total)


def _thop_profile() -> Any:
    try:
        metadata.distribution("ultralytics-thop")
    except metadata.PackageNotFoundError:
        pass
    else:
        raise UserError(
            "the installed thop is ultralytics-thop, which counts otherwise: pip uninstall ultralytics-thop, then reinstall thop"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thop 0.1.1 imports distutils
        from thop import profile
    return profile


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, int]]:
    for name, (ops, _, inner) in tree.items():
        if inner:
            yield from _leaves(inner, f"{path}{name}.")
        else:
            yield path + name, int(ops)


def check_fvcore(module: nn.Module, kwargs: Mapping[str, Any], costs: Mapping[str, Cost]) -> int:
    """fvcore's multiply-adds of `module(**kwargs)`, norms and resampling left out, when they agree with `costs`.

    It runs the module for real on the CPU, where `hollow` stands in for weights. Raises UserError on a disagreement, and for an
    operator that neither counts nor is known to hold no multiply-add.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # fvcore rests on the deprecated torch.jit
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(_Call(module, kwargs).eval(), (torch.zeros(1),))
        analysis.set_op_handle("aten::scaled_dot_product_attention", _sdpa, "aten::baddbmm", _baddbmm)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        counted = {op: int(n) for op, n in analysis.by_operator().items()}
        missed = {op.removeprefix("aten::") for op in analysis.unsupported_ops()} - ELEMENTWISE - MOVING
    if missed:
        raise UserError(f"fvcore cannot count {', '.join(sorted(missed))}: this model cannot be verified with it")
    total = costs[""]
    linear = sum(n for op, n in counted.items() if op in LINEAR)
    attention = sum(n for op, n in counted.items() if op in ATTENTION)
    _agree(
        "fvcore",
        {
            "convolutions and linear layers": (linear, total.conv_linear),
            "attention products": (attention, total.with_attention - total.conv_linear),
        },
    )
    return linear + attention


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _sdpa(inputs: list[Any], outputs: list[Any]) -> int:
    """Scores q (..., L, E) with k (..., S, E), then their sums over v (..., S, E')."""
    q, k, v = (_shape(x) for x in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    a, b = (_shape(x) for x in inputs[1:3])
    return math.prod(a) * b[-1]


def _agree(tool: str, counts: Mapping[str, Count]) -> None:
    wrong = [f"{op} {theirs:,} against {ours:,} here" for op, (theirs, ours) in counts.items() if theirs != ours]
    if wrong:
        raise UserError(f"{tool} counts other multiply-adds: {'; '.join(wrong)}: do not use these numbers, and report the model")


def hollow(module: nn.Module) -> nn.Module:
    """The meta-device `module` itself, with zeros on the CPU that take no memory: every tensor is one number expanded."""
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), requires_grad=False)
        for name, b in list(part._buffers.items()):
            if b is not None:
                part._buffers[name] = torch.zeros((), dtype=b.dtype).expand(b.shape)
    return module
