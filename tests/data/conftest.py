"""Pipelines and pairs that tests of encoding share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockprune.data.training_data import Reader, source_of
from blockprune.model import pretrained


@pytest.fixture(scope="module")
def models(tiny_folder: Callable[[str], Path]) -> dict[str, tuple[Any, Reader]]:
    """A loaded pipeline and a reader of 7 digits at its size, by kind."""
    made = {}
    for kind, size in {"tiny-digits": 32, "sdxl": 16}.items():
        pipe = pretrained.load(kind if kind in pretrained.BUILT_IN else str(tiny_folder(kind)))
        made[kind] = (pipe, Reader(source_of("digits", size, 7)))
    return made
