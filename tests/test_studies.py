"""Studies that can say what they would do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parent.parent / "studies"
OUT = "OUT"  # stands for an empty folder
SD = ["--out", OUT, "--reports", OUT, "--coco", "coco", "--data", "pairs", "--inception", "inception.pth"]
PLANS = {
    "ablation.py": (["--out", OUT], "5 variants x 3 seeds"),
    "absorb.py": (["--out", OUT], "29 removals, each plain, fitted and absorbed"),
    "after_training.py": (["--out", OUT, "--reports", OUT], "trainings of 600 updates are left"),
    "after_training_proof.py": (["--reports", OUT], "proof.md and proof.png from 0 rows"),
    "after_training_table.py": (["--reports", OUT], "table.md and curves.png from 0 rows"),
    "bench_distill.py": (["--out", OUT], "5 rounds of 6 updates"),
    "bench_fit.py": (["--out", OUT], "3 rounds of 6 random architectures, 256 samples"),
    "bench_runtimes.py": (["--out", OUT], "2 models x 5 runtimes, 10 rounds, teacher and bk-sdm-small in turn"),
    "bench_scan.py": (["--out", OUT], "scan, replay, pricing: 3 rounds, 64 images"),
    "bench_search.py": (["table", "--out", OUT], "6 budgets x 5 methods x 10 seeds"),
    "edit_digits.py": (["--out", OUT, "--reports", OUT], "128 scenes edited by 3 models at 3 strengths"),
    "estimates.py": ([], "distill --arch bk-sdm-small: "),
    "exhaustive_pairs.py": (["--out", OUT], "removal sets of 14 units within 71%params"),
    "personalise_tiny_digits.py": (["--out", OUT, "--reports", OUT], "blockprune personalise --model tiny-digits"),
    "predictors.py": (["--reports", OUT], "shared: 0 students are left"),
    "quality_tiny_digits.py": (["--out", OUT], "1000 scenes drawn in 10 steps"),
    "racing.py": (["--out", OUT], "10 removals, 128 images each"),
    "removals_tiny_digits.py": (["--out", OUT], "every block removed by itself, 128 images each"),
    "report_screenshots.py": (["report.html", "--out", OUT], "report.html at 1280 and 390 pixels of width, light and dark"),
    "sd_folder.py": (["sd-v1-4", OUT], "1,032,071,623 random weights"),
    "sd_v1_4.py": (SD, "in all 560 h at 100 TFLOPS, 166 GB beside the data"),
    "tiny_digits.py": (["--out", OUT, "--reports", OUT], "blockprune distill --arch bk-sdm-base --max-train-steps 600"),
    "train_tiny_digits.py": (["--out", OUT], "vae: 1000 steps, text: 800 steps, unet: 3300 steps on 24000 scenes"),
    "train_tiny_judges.py": (["--out", OUT, "--model", OUT], "detector: 3000 steps, scorer: 2800 steps"),
}
SHARED = {"candidates.py", "loop.py", "steps.py"}  # no studies, but what some of them share


def test_every_study_is_here() -> None:
    assert {p.name for p in STUDIES.glob("*.py")} == PLANS.keys() | SHARED


@pytest.mark.parametrize("name", PLANS)
def test_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args, says = PLANS[name]
    monkeypatch.syspath_prepend(STUDIES)
    monkeypatch.setattr(sys, "argv", [name, *(str(tmp_path) if a == OUT else a for a in args), "--dry-run"])
    runpy.run_path(str(STUDIES / name), run_name="__main__")
    assert says in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
