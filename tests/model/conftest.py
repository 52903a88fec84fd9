"""Graphs of tiny U-Nets of the real families' structure."""

from __future__ import annotations

import pytest
import tiny

from blockprune.model.graph import BlockGraph
from blockprune.model.trace import trace


@pytest.fixture(scope="module")
def graph() -> BlockGraph:
    return trace(tiny.config("sd1"))


@pytest.fixture(scope="module")
def graph_xl() -> BlockGraph:
    return trace(tiny.config("sdxl"))
