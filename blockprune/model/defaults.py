"""How a model is scored where nothing else is asked: its folder's own `blockprune.json`, over general defaults. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from blockprune.assets import ASSETS
from blockprune.decode import Object, checked, read_json

BUILT_IN = {"tiny-digits": ASSETS / "models" / "tiny-digits"}
GENERIC_PROMPTS = ASSETS / "prompts.txt"
DEFAULTS = {"n_images": 64, "steps": 25, "cfg_scale": 7.5, "batch_size": 4, "eps_samples": 64}
OWN = "blockprune.json"
PATHS = ("detector", "clip", "dino", "reference", "prompts", "data")
# the most that may be asked for, here and in a request
MOST_IMAGES = 10**6
MOST_STEPS = 10**4
MOST_GUIDANCE = 1000
MOST_BATCH = 10**5
MOST_SAMPLES = 10**5


class Defaults(msgspec.Struct, forbid_unknown_fields=True):
    """The `blockprune.json` of a model folder."""

    n_images: Annotated[int, Meta(ge=1, le=MOST_IMAGES)] = 1
    steps: Annotated[int, Meta(ge=1, le=MOST_STEPS)] = 1
    cfg_scale: Annotated[float, Meta(ge=0, le=MOST_GUIDANCE)] = 1.0
    batch_size: Annotated[int, Meta(ge=1, le=MOST_BATCH)] = 1
    eps_samples: Annotated[int, Meta(ge=1, le=MOST_SAMPLES)] = 1
    detector: str = ""
    clip: str = ""
    dino: str = ""
    reference: str = ""
    prompts: str = ""
    data: str = ""


def defaults_of(model: str) -> dict[str, Any]:
    """What a model folder's own `blockprune.json` says about scoring it, over the general defaults; its paths made absolute."""
    folder = BUILT_IN.get(model, Path(model))
    file = folder / OWN
    if not os.path.exists(file):
        return dict(DEFAULTS)
    remedy = "mend it or delete it"
    own = read_json(file, Object, remedy)
    checked(own, Defaults, repr(str(file)), f"it may have {', '.join(Defaults.__struct_fields__)}; {remedy}")
    inside = {key: str(folder / own[key]) for key in PATHS if key in own and os.path.exists(folder / own[key])}
    return {**DEFAULTS, **own, **inside}


def judge_names(
    defaults: Mapping[str, Any], detector: str | None, weights: str | None, clip: str | None, reference: str | None
) -> tuple[str | None, str | None]:
    """The detector and the CLIP scorer asked for, else the model's own; None for none."""
    name = detector or ("inception" if weights else defaults.get("detector")) or ("inception" if reference else None)
    return name, clip or defaults.get("clip")
