"""The cost of a pipeline part by part: text encoders, denoising network, VAE decoder, whole. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from blockprune.decode import AGAIN, Natural, checked
from blockprune.model.graph import CONVENTIONS, Cost, sum_costs


class Timed(Protocol):
    """A measured latency."""

    @property
    def median_s(self) -> float: ...

    @property
    def over(self) -> tuple[float, float, float] | None: ...


@dataclass(frozen=True)
class Component:
    """What one part of the pipeline costs; `who` is teacher or student, `macs` are by convention, `latency_s` None if not timed.

    `ratio` is the latency over that of the teacher's same part, paired by rounds in which both took turns, with its 95 % interval.
    """

    name: str
    who: str
    params: Natural
    macs: Mapping[str, Natural]
    latency_s: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """That of the ratio."""
        return None if self.ratio_low is None or self.ratio_high is None else (self.ratio_low, self.ratio_high)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Component:
        """The component of `to_json`, or of a row that holds more; UserError on any other shape."""
        return checked(data, cls, "a component", AGAIN)


def component_costs(others: Mapping[str, Cost], unet: Cost, steps: int) -> dict[str, Cost]:
    """The lines of a component table, for one image without doubling for guidance: text encoders, U-Net once and `steps` times,
    VAE decoder, whole pipeline. `others` are `pipeline_costs`."""
    repeated = Cost(unet.params, unet.keys, *(steps * unet.macs(c) for c in CONVENTIONS))
    text = {name: c for name, c in others.items() if name != "vae_decoder"}
    whole = sum_costs([*others.values(), repeated])
    return text | {"unet": unet, "unet_steps": repeated, "vae_decoder": others["vae_decoder"], "pipeline": whole}


def component_title(name: str, steps: int) -> str:
    """What tables call a line of `component_costs`."""
    titles = {"unet": "U-Net x 1", "unet_steps": f"U-Net x {steps}", "vae_decoder": "VAE decoder", "pipeline": "whole"}
    return titles.get(name, name.replace("_", " "))


def components(
    others: Mapping[str, Cost], unets: Mapping[str, Cost], steps: int, timings: Mapping[str, Mapping[str, Timed]] | None = None
) -> Iterator[Component]:
    """The table of several models side by side: each part and the whole, timed where `timings` are by line and by who."""
    for who, unet in unets.items():
        for name, cost in component_costs(others, unet, steps).items():
            if steps > 1 or name != "unet_steps":
                macs = {c: cost.macs(c) for c in CONVENTIONS}
                timed = timings[name][who] if timings else None
                seconds, ratio = (timed.median_s, timed.over) if timed else (None, None)
                yield Component(component_title(name, steps), who, cost.params, macs, seconds, *(ratio or ()))


def reductions(full: Mapping[str, Cost], kept: Mapping[str, Cost]) -> dict[str, Any]:
    """What share of the teacher's cost is gone, 0 to 1, of the denoising network and of the whole."""
    return {
        name: {
            "params": 1 - kept[name].params / full[name].params,
            "macs": {c: 1 - kept[name].macs(c) / full[name].macs(c) for c in CONVENTIONS},
        }
        for name in ("unet", "pipeline")
    }
