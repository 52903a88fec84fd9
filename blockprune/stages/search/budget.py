"""Values: how large a student may be. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from blockprune.errors import UserError
from blockprune.model.graph import BlockGraph, Cost
from blockprune.model.presets import PRESETS, near_presets, parse

QUANTITIES = ("params", "macs", "latency")
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_FORM = re.compile(r"(?P<number>[0-9]+(\.[0-9]*)?|\.[0-9]+)\s*(?P<scale>[KMGBT]?)(?P<unit>ms|s|MACs|%(params|macs|latency))?")
LARGEST = 1e15
_EXAMPLES = "0.66B or 480M (parameters), 220GMACs, 70ms, 65%params, 65%macs, 65%latency"


@dataclass(frozen=True)
class Budget:
    """An upper bound on one quantity of the U-Net: parameters, MACs of a step, or seconds of a step.

    `text` is what the user said; `limit` is for the U-Net alone, whatever the scope was in which it was said; `outside` is what the
    rest of the pipeline has of the quantity where that was counted in.

    >>> import blockprune as bp
    >>> bp.Budget("480M", "params", 480e6).said(450e6)
    '450M parameters of the U-Net'
    """

    text: str
    quantity: str
    limit: float
    outside: float = 0

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise UserError(f"a budget bounds {', '.join(QUANTITIES)}: got {self.quantity!r}")

    def of(self, cost: Cost, latency_s: float, convention: str) -> float:
        """What a U-Net of that cost and latency takes of this budget's quantity."""
        return {"params": cost.params, "macs": cost.macs(convention), "latency": latency_s}[self.quantity]

    def said(self, value: float) -> str:
        """A value of the U-Net in the words and the scope of this budget: "495.9M parameters of the whole pipeline"."""
        if self.quantity == "latency":
            return f"{1000 * value:.3g} ms for a U-Net step"
        if self.quantity == "macs":
            return f"{value / 1e9:.4g} GMACs for a U-Net step"
        where = "of the whole pipeline" if self.outside else "of the U-Net"
        return f"{(value + self.outside) / 1e6:.4g}M parameters {where}"


def bounds_latency(text: str) -> bool:
    """True for the text of a budget on the latency of a step."""
    return text not in PRESETS and amount(text)[2] in ("ms", "s", "%latency")


def check_budget(text: str) -> None:
    """Raises UserError for a text that is neither an amount nor a design."""
    if text not in PRESETS:
        amount(text)


def amount(text: str) -> tuple[float, str, str]:
    """(number, scale, unit) of a budget such as 220GMACs; UserError for anything else."""
    found = _FORM.fullmatch(text.strip())
    if not found:
        near = near_presets(text.strip())
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"cannot read the budget {text!r}: {hint}write {_EXAMPLES}, or a design's name, such as bk-sdm-small")
    number, scale, unit = float(found["number"]), found["scale"], found["unit"] or ""
    scaled = {"": scale != "", "MACs": scale not in ("", "B")}
    if not scaled.get(unit, scale == ""):
        raise UserError(f"cannot read the budget {text!r}: write {_EXAMPLES}")
    if not 0 < number <= LARGEST:
        raise UserError(f"a budget is above 0 and at most {LARGEST:.0e} of its unit: got {text!r}; write {_EXAMPLES}")
    return number, scale, unit


def parse_budgets(
    text: str, graph: BlockGraph, outside_params: int, latency_s: float | None, convention: str = "thop", scope: str = "pipeline"
) -> list[Budget]:
    """The budgets that `text` says: of a design's name its parameters and its MACs, else one. Errors as those of `parse_budget`,
    and for a design of another U-Net."""
    if text not in PRESETS:
        return [parse_budget(text, graph, outside_params, latency_s, convention, scope)]
    design = graph.cost(parse(text, graph))
    outside = outside_params if scope == "pipeline" else 0
    return [
        Budget(f"parameters of {text}", "params", design.params, outside),
        Budget(f"MACs of {text}", "macs", design.macs(convention)),
    ]


def parse_budget(
    text: str, graph: BlockGraph, outside_params: int, latency_s: float | None, convention: str = "thop", scope: str = "pipeline"
) -> Budget:
    """The budget that `text` says, such as 0.66B, 480M, 220GMACs, 70ms or 65%params.

    Parameters are of the whole pipeline, as the papers print them, `outside_params` of them outside the U-Net; with scope "unet" of
    the U-Net alone. Percentages are of the teacher, parameters again in that scope. `latency_s` is the teacher's step latency, None
    when it was not measured. Raises UserError for anything else.
    """
    if scope not in ("pipeline", "unet"):
        raise UserError(f"unknown scope {scope!r}: choose pipeline or unet")
    number, scale, unit = amount(text)
    outside = outside_params if scope == "pipeline" else 0
    whole: Mapping[str, float | None] = {
        "params": graph.total.params + outside,
        "macs": graph.total.macs(convention),
        "latency": latency_s,
    }
    if unit in ("ms", "s"):
        quantity, value = "latency", number / (1000 if unit == "ms" else 1)
    elif unit.startswith("%"):
        quantity = unit[1:]
        teacher = whole[quantity]
        if teacher is None:
            raise UserError(f"the budget {text!r} needs the teacher's latency: scan with the measure 'latency' first")
        value = number / 100 * teacher
    else:
        quantity, value = ("macs" if unit else "params"), number * _SCALE[scale]
    outside = outside if quantity == "params" else 0
    return Budget(text, quantity, value - outside, outside)
