"""Where trials are kept: what a kill tore is cut off, and messages name a database without its password."""

from __future__ import annotations

from pathlib import Path

import optuna

from blockprune.stages.search.storage import open_storage, storage_name


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    optuna.create_study(storage=open_storage(None, path), study_name="a")
    with path.open("a") as out:
        out.write('{"op_code":4,"wor')
    optuna.create_study(storage=open_storage(None, path), study_name="b")
    assert optuna.get_all_study_names(open_storage(None, path)) == ["a", "b"]


def test_a_storage_is_called_by_its_host_and_database() -> None:
    assert storage_name("postgresql://u:pw@db.example.org:5432/studies?sslmode=require") == (
        "the storage postgresql://db.example.org:5432/studies"
    )
    assert storage_name("sqlite:////tmp/x.db") == "the storage sqlite:////tmp/x.db"
