"""How tests run: offline, on one thread, with `common_fixtures.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # what is printed does not depend on the terminal that tests are started in


def pytest_configure(config: pytest.Config) -> None:
    """Fixtures take ten seconds to import: a process that only hands out tests to others goes without."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("common_fixtures")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[Any]:
    """A report that workers can send: names that are no text, which some tests are about, are spelled out."""
    return encodable((yield))


def encodable(value: Any) -> Any:
    if isinstance(value, dict):
        return {encodable(k): encodable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(encodable, value))
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
