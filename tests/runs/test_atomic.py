"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blockprune.errors import UserError
from blockprune.runs.atomic import writing, writing_folder


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "table.csv"
    with writing(target) as part:
        part.write_text("old")
        assert part.suffix == ".csv" and not target.exists()
    with pytest.raises(OSError, match="full"), writing(target) as part:
        part.write_text("ne")
        raise OSError("disk full")
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_process_left_is_no_part_of_the_next(tmp_path: Path, umask: None) -> None:
    (tmp_path / ".w.part.safetensors").write_text("left")
    (tmp_path / ".w.part.safetensors").chmod(0o600)
    with writing(tmp_path / "w.safetensors") as part:
        assert not part.read_text()
        save_file({"a": torch.zeros(1)}, part)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640
    (tmp_path / ".f.part" / "sub").mkdir(parents=True)
    (tmp_path / ".f.part" / "left").touch()
    with writing_folder(tmp_path / "f") as part:
        (part / "a").touch()
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "w.safetensors"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), writing_folder(tmp_path / "f") as part:
        (part / "a").touch()
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="not empty"), writing_folder(tmp_path / "f") as part:
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "of another").touch()
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["of another"]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with (
        writing_folder(tmp_path / "f") as part,
        pytest.raises(UserError, match="another process is writing"),
        writing_folder(tmp_path / "f"),
    ):
        pass
    assert not part.exists() and (tmp_path / "f").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*choose another --out"), writing_folder(tmp_path / "file" / "f"):
        pass
