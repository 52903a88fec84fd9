"""What a report is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from blockprune.errors import UserError
from blockprune.reports.request import ReportRequest


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "give at least one run directory"),
        ({"runs": ("a",), "out": "page.htm"}, "--out must end with .html: got 'page.htm'"),
        ({"runs": ("a",), "macs": "flops"}, "unknown --macs 'flops'"),
        ({"runs": ("",)}, "RUNS is empty"),
    ],
)
def test_what_cannot_be_asked(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ReportRequest(**fields)


def test_a_request_is_json() -> None:
    request = ReportRequest(runs=("a", "b"), allow_mismatch=True)
    assert request.to_json() == {"runs": ["a", "b"], "out": "report.html", "macs": "thop", "allow_mismatch": True}
