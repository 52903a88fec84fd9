"""The run directory: what was asked, rows as they come, tensors, pictures, and who does what. The only module that writes one."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockprune import decode
from blockprune.errors import UserError
from blockprune.runs.atomic import TEMPORARY, writing
from blockprune.runs.lock import Claims, lock
from blockprune.runs.schema import RUNS, AnyRun, check_row

FORMAT = 1
MAX_ROWS_BYTES = 2**31
MAX_FILE_BYTES = 2**36
SOUND = "put back a sound copy, or run into another --out"
DELETE = "delete that line and run the same command again"
MAKE_AGAIN = "delete it and run the same command again"
LONGEST_PATH = 4096 - 512  # leaves room for what lies in a folder
_OURS = (".lock", ".turn", ".run.part.json")  # of a run that is just beginning


class Stored:
    """A run directory to read."""

    def __init__(self, path: Path, command: str = "") -> None:
        self.path, self.command = path, command or str(read_run(path)["command"])

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.path, self.command)

    @property
    def about(self) -> dict[str, Any]:
        """What `run.json` says; UserError when it is not what this command writes."""
        return read_run(self.path, RUNS.get(self.command, AnyRun))

    def read(self, name: str) -> bytes | None:
        """The contents of a file of the run; None when there is none."""
        file = self.path / name
        return decode.read_bytes(file, MAKE_AGAIN, limit=MAX_FILE_BYTES) if os.path.lexists(file) else None

    def names(self, folder: str) -> list[str]:
        """The files in a folder of the run, sorted; without those in the making."""
        there = self.path / folder
        return sorted(p.name for p in there.iterdir() if not p.name.startswith(".")) if there.is_dir() else []


class Run(Stored):
    """A run directory: `run.json` says what was asked, `rows.jsonl` holds the rows; the same request again resumes it.

    Raises UserError when the directory holds another run (naming the differences), or when another process writes to it. Processes
    that all open it as `shared` write to it together: they divide the work by `Claims`, and `alone` is for what one must do.
    """

    def __init__(self, path: Path, command: str, asked: Mapping[str, Any], note: Mapping[str, Any], shared: bool = False) -> None:
        super().__init__(path, command)
        check_run_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        self._depth = 0
        fd = lock(path / ".lock", wait=False, shared=shared)
        if fd is None:
            raise UserError(f"another process is writing to {str(path)!r}: wait for it or choose another --out")
        self._lock = fd
        try:
            with self.alone():
                self._begin({"format": FORMAT, "command": command, "asked": plain(asked), **plain(note)})
                self._trim()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._lock)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within this context no other process of a shared run is in it, too; waits for its turn."""
        if self._depth == 0:
            self._turn = lock(self.path / ".turn")
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0 and self._turn is not None:
                os.close(self._turn)

    def _begin(self, wanted: Mapping[str, Any]) -> None:
        if not (self.path / "run.json").exists():
            self.write("run.json", json.dumps(wanted, indent=2) + "\n")
            return
        run_json = read_run(self.path)
        if run_json.get("command") != wanted["command"]:
            raise UserError(f"{str(self.path)!r} holds a {run_json.get('command')} run: choose another --out")
        if changes := list(differences(run_json["asked"], wanted["asked"])):
            raise UserError(f"{str(self.path)!r} holds another run ({'; '.join(changes)}): choose another --out or ask the same")

    def _trim(self) -> None:
        """Cuts a last row that was torn when a process was killed, so that the next row starts on its own line."""
        rows = self.path / "rows.jsonl"
        if rows.exists() and not (text := decode.read_bytes(rows, DELETE, limit=MAX_ROWS_BYTES)).endswith(b"\n"):
            os.truncate(rows, text.rfind(b"\n") + 1)

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.path, self.command)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; it is on the disk when this returns. A row that did not fit on the disk leaves no part of itself."""
        line = (json.dumps(plain(row)) + "\n").encode()
        with self.alone():
            fd = os.open(self.path / "rows.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(fd).st_size
                try:
                    if os.write(fd, line) != len(line):
                        raise OSError(errno.ENOSPC, "No space left on device", str(self.path / "rows.jsonl"))
                    os.fsync(fd)
                except OSError:
                    os.ftruncate(fd, size)
                    raise
            finally:
                os.close(fd)

    def claims(self, name: str) -> Claims:
        """The claims on the items of some work of a shared run."""
        return Claims(self.path / name)

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Leaves only the rows that are wanted: those after the checkpoint from which work goes on will be made again."""
        rows = self.rows()
        wanted_rows = [row for row in rows if wanted(row)]
        if len(wanted_rows) < len(rows):
            self.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in wanted_rows))

    def write(self, name: str, content: str | bytes) -> Path:
        """Writes a whole file, atomically; folders in `name` are made."""
        with self.writing(name) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        return self.path / name

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path that becomes `name` when the context ends well, and disappears when it does not."""
        with writing(self.path / name) as temporary:
            yield temporary


def check_folder(path: Path) -> None:
    """Raises UserError where `path` is a file, OSError where no folder of that name can be made or written to."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"--out must be a directory: {str(path)!r} is a file; choose another")
    _check_place(path)


def check_run_folder(path: Path) -> None:
    """`check_folder`, and UserError for a folder that holds anything else than a run."""
    check_folder(path)
    others = [p.name for p in path.iterdir() if p.name not in _OURS] if path.is_dir() else []
    run_json = path / "run.json"  # looked at last: other processes may be beginning this run
    if others and not run_json.is_file():
        if run_json.is_dir():
            raise UserError(f"{str(run_json)!r} must be a file, not a folder: choose another --out")
        raise UserError(f"{str(path)!r} is not empty and holds no run: choose another --out")


def check_file(path: Path) -> None:
    """Raises UserError where `path` is a folder, OSError where no file of that name can be written."""
    if os.path.isdir(path):
        raise UserError(f"--out must be a file: {str(path)!r} is a directory; choose another")
    _check_place(path)


def _check_place(path: Path) -> None:
    """Raises OSError where nothing can be written at `path`, its folders made; leaves nothing behind."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder) or os.path.lexists(folder))
    longest = max(len(os.fsencode(part)) for part in (path.name, *path.absolute().parts))
    try:
        if (
            len(os.fsencode(path.absolute())) > LONGEST_PATH
            or longest > os.pathconf(there if there.is_dir() else "/", "PC_NAME_MAX") - TEMPORARY
        ):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not there.is_dir() and there != path:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if os.path.lexists(path):
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            tempfile.TemporaryDirectory(prefix=".probe-", dir=there).cleanup()
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from None


def read_run(path: Path, form: type = AnyRun) -> dict[str, Any]:
    """What `run.json` of a run directory says; UserError when there is none, or it is not of that form."""
    file = path / "run.json"
    missing = f"{str(path)!r} is not a run directory: it has no run.json"
    data = decode.read_json(file, decode.Object, SOUND, missing)
    if data.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} is a run of format {data.get('format')!r}: this version reads format {FORMAT}")
    decode.checked(data, form, repr(str(file)), SOUND)
    return data


def read_rows(path: Path, command: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run directory in the order of writing; a last row torn by a kill is left out.

    UserError for a line that is no object or, where the command that wrote the run is given, no row of that command.
    """
    file, rows = path / "rows.jsonl", []
    for what, row in decode.json_lines(file, DELETE, limit=MAX_ROWS_BYTES) if file.exists() else ():
        if command is not None:
            check_row(command, row, what, DELETE)
        rows.append(row)
    return rows


def plain(value: Any) -> Any:
    """What JSON makes of a value. Half a surrogate pair, as in a name that is no text, becomes an escape: no reader takes it."""
    return _readable(json.loads(json.dumps(value, default=str)))


def _readable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_readable(key): _readable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_readable(inner) for inner in value]
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """What was asked before and is asked otherwise now, a phrase each."""
    asked = plain(asked)
    for name in sorted({*held, *asked}):
        if held.get(name) != asked.get(name):
            yield f"{name} is {_short(held.get(name))} there, {_short(asked.get(name))} asked"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
