"""Where a command meets the system: failures, terminals and storages end in one readable line that holds no secret."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from as_user import pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from blockprune.cli import error_line
from blockprune.errors import UserError, redacted
from blockprune.stages.search.storage import open_storage, storage_name

Cli = Callable[..., tuple[int, str, str]]
OneLine = Callable[..., str]
FEW = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS_OF_ERRORS = [errno.ENAMETOOLONG, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ENOSPC]


@pytest.mark.parametrize("number", NUMBERS_OF_ERRORS)
def test_any_failure_of_the_system_is_one_line(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    for error in (OSError(number, os.strerror(number), "its/path"), RuntimeError(f"I/O error: (os error {number})")):
        with pytest.raises(SystemExit) as left, error_line.one_line_errors():
            raise error
        err = capfd.readouterr().err
        assert left.value.code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "'its/path': " in err or isinstance(error, RuntimeError)
        assert err.count(": ") >= 2  # what failed, and what to do


def test_a_command_that_the_system_fails_is_one_line(one_line: OneLine, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (OSError(errno.EROFS, "Read-only file system", "its/path"), MemoryError()):

        def failing(*args: object, error: Exception = wrong) -> None:
            raise error

        monkeypatch.setattr("blockprune.cli.options.print_json", failing)
        line = one_line("graph", "--json")
        assert "its/path" in line or "the memory does not suffice" in line


def test_a_fault_of_this_package_keeps_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("blockprune.cli.options.print_json", broken)
    with pytest.raises(KeyError, match="ours"):
        cli("graph", "--json")


AT_ONCE = """
import sys
from blockprune.cli import main
for command in {commands}:
    try:
        main(command)
    except SystemExit as left:
        assert left.code == 2
print(sorted({{"torch", "diffusers", "transformers"}} & set(sys.modules)))
"""


def test_what_can_be_known_at_once_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    (pictures(tmp_path / "broken", 3) / "002.png").write_bytes(b"x")
    learn = ["personalise", "--instance-prompt", "sks", "--out", str(tmp_path / "run"), "--instance-data-dir"]
    commands = {
        "no folder of images": [*learn, str(tmp_path / "nowhere")],
        "'002.png' in": [*learn, str(tmp_path / "broken")],
        "no precision 'int8'": ["export", "x", "--format", "openvino", "--precision", "int8", "--out", str(tmp_path / "out")],
    }
    code = AT_ONCE.format(commands=list(commands.values()))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    lines = found.stderr.splitlines()
    assert all(says in line for says, line in zip(commands, lines, strict=True)), found.stderr


SECRETS = [
    "postgresql://u:secret@127.0.0.1:1/db",
    "postgresql://u@127.0.0.1:1/db?password=secret",
    "postgresql://127.0.0.1:1/db?user=u&password=secret",
    "postgres:/u:secret@h",
    "u:secret@h/x",
    "postgresql://u:sec/secret@h/x",
    "postgresql://u:se@secret@h/x",
    "postgresql://u:secret@[::1/x",
    "postgresql+psycopg://u:secret@127.0.0.1:x/db",
    "nonsense://u:secret@h/x",
    "mysql://u:secret@127.0.0.1:1/db",
    "sqlite:///nowhere/x.db?password=secret",
    "postgresql://u:%73ecret@127.0.0.1:1/db",
]


@pytest.mark.parametrize("url", SECRETS)
def test_no_message_shows_a_password(url: str) -> None:
    with pytest.raises(UserError) as refused:
        open_storage(url, None)
    for text in (str(refused.value), storage_name(url), redacted(f"cannot use {url!r} (no {url}): mend it")):
        assert "secret" not in text
        assert "73ecret" not in text


@FEW
@given(secret=st.text("abcXYZ019!$%^*-_=+~", min_size=6, max_size=20))
@pytest.mark.parametrize("form", ["postgresql://u:{}@h.x/db", "u:{}@h/x", "postgres:/u:{}@h", "postgresql://h/db?password={}"])
def test_no_form_of_a_url_shows_its_password(form: str, secret: str) -> None:
    url = form.format(secret)
    assert secret not in storage_name(url)
    assert secret not in redacted(f"Got an unexpected argument ({url})")


def test_a_storage_that_fails_later_is_one_line() -> None:
    said = error_line.explanation(OperationalError("SELECT secret", {}, Exception("postgresql://u:secret@h/x")))
    assert said is not None
    assert "OperationalError" in said
    assert "secret" not in said


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "blockprune", *words],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.mark.slow
@pytest.mark.parametrize("words", [("search", "--help"), ("graph",)])
def test_a_terminal_without_our_characters(words: tuple[str, ...]) -> None:
    found = python(*words, **ASCII)
    assert found.returncode == 0, found.stderr.decode()
    assert rb"\u2" in found.stdout  # an arrow in the graph, an ellipsis in the help
    assert found.stdout.isascii()
    failed = python("stats", "für", "stats.npz", **ASCII)
    assert failed.returncode == 2
    assert failed.stderr.startswith(b"error: ")
    assert failed.stderr.count(b"\n") == 1


PRINTS = "from blockprune.cli.error_line import one_line_errors\nwith one_line_errors():\n    print('a line')"


@pytest.mark.parametrize("words", [("-c", PRINTS), pytest.param(("-m", "blockprune", "graph"), marks=pytest.mark.slow)])
def test_a_reader_that_stops_early_is_one_line(words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run([sys.executable, *words], stdout=write, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(write)
    assert found.returncode == 2
    assert found.stderr.startswith(b"error: Broken pipe: ")
    assert found.stderr.count(b"\n") == 1


def test_text_files_name_their_encoding() -> None:
    root = Path(__file__).parents[2]
    lacking = []
    for file in (*(root / "blockprune").rglob("*.py"), *(root / "studies").rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
            if is_of_text(call) and not any(k.arg == "encoding" for k in call.keywords):
                lacking.append(f"{file.name}:{call.lineno}")
    assert lacking == []


def is_of_text(call: ast.Call) -> bool:
    """True for a call that reads or writes a file as text."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name != "open":
        return name in ("read_text", "write_text")
    if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("os", "Image", "tarfile"):
        return False
    mode = [a for a in call.args if isinstance(a, ast.Constant)] + [k.value for k in call.keywords if k.arg == "mode"]
    return not any("b" in str(m.value) for m in mode if isinstance(m, ast.Constant))
