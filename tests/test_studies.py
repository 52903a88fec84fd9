"""Studies that can say what they would do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parent.parent / "studies"
PLANS = {
    "exhaustive_pairs.py": ([], "removal sets of 14 units within 71%params"),
    "bench_search.py": (["table"], "6 budgets x 5 methods x 10 seeds"),
    "ablation.py": ([], "5 variants x 3 seeds"),
    "bench_distill.py": ([], "5 rounds of 6 updates"),
}


@pytest.mark.parametrize("name", PLANS)
def test_dry_run(name: str, tmp_path: Path) -> None:
    args, says = PLANS[name]
    command = [sys.executable, str(STUDIES / name), *args, "--out", str(tmp_path), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert says in result.stdout
    assert not list(tmp_path.iterdir())
