"""Text of any kind through the commands: prompts, captions and names that a terminal, a file or a tokenizer cannot hold."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import report_rows
from captioned import write_folder
from common_fixtures import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from blockprune.cli import main
from blockprune.data import captions
from blockprune.model.pretrained import BUILT_IN

QUICK = ["--measures", "eps_mse", "--n-images", "2", "--steps", "1", "--eps-samples", "2", "--unit", "stage"]


@pytest.mark.parametrize("bad", ["half a \ud800 pair", "a \0 byte"])
def test_text_that_is_none_is_one_line(bad: str, one_line: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps({"prompt": bad}))
    says = f"holds the character U+{ord(next(c for c in bad if captions.flaw(c))):04X}, which is no text: mend or drop it"
    for command in (["scan", *QUICK], ["evaluate", "--n-images", "2", "--steps", "1"]):
        line = one_line(*command, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "run")
        assert "prompt 2 of" in line and says in line
    folder = write_folder(tmp_path / "data", 2, "metadata.jsonl", "text")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": bad}))
    assert says in one_line("scan", *QUICK, "--data", folder, "--out", tmp_path / "run")
    training = ["distill", "--arch", "mid-removed", "--max-train-steps", "1", "--data", folder, "--out", tmp_path / "kd"]
    assert "none of the 1 samples" in one_line(*training)
    assert not (tmp_path / "run").exists()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=30))
def test_a_tokenizer_takes_every_text_that_has_no_flaw(text: str) -> None:
    if not captions.flaw(text):
        assert tokenizer()([text], padding="max_length", truncation=True)["input_ids"]


def tokenizer(made: list[CLIPTokenizer] = []) -> CLIPTokenizer:  # noqa: B006
    if not made:
        made.append(CLIPTokenizer.from_pretrained(BUILT_IN["tiny-digits"] / "tokenizer"))
    return made[0]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_knows_few_characters_is_written_to(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as done:
        main(["graph"])
    assert not done.value.code
    assert b"\\u2192" in out.buffer.getvalue()  # the arrow of a block's shape
    with pytest.raises(SystemExit) as done:
        main(["graph", "--model", "数字 \udcff"])
    assert done.value.code == 2
    assert err.buffer.getvalue().startswith(b"error: no model")


@pytest.mark.slow
def test_a_page_is_written_where_the_locale_knows_ascii_only(tmp_path: Path) -> None:
    run = report_rows.evaluate(tmp_path / "数字 run", "数字 → \udcff")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "blockprune", "report", str(run), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert "数字 → \\udcff" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_names_that_are_no_text_are_read(cli: Cli, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / os.fsdecode(b"da\xffta"), 3)
    os.rename(folder / "0.png", folder / os.fsdecode(b"\xff.png"))
    (folder / "1.png").write_bytes(b"broken")
    code, out, err = cli("stats", folder, tmp_path / os.fsdecode(b"\xfe.npz"), "--detector", "tiny-digits")
    assert code == 0, err
    assert "2 images, 1 unreadable" in out
