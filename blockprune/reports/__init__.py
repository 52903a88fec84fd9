"""Reports of a scan: one value read back (`ScanView`), and pure functions from it to text and figures. Needs no torch."""

from blockprune.reports.text import to_csv, to_json, to_markdown
from blockprune.reports.view import Correlation, ScanView, rank_correlation, ranking, short

__all__ = ["Correlation", "ScanView", "rank_correlation", "ranking", "short", "to_csv", "to_json", "to_markdown"]
