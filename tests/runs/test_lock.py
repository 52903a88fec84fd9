"""Locks: one holder, or several that share; free when the holder ends, and never of a file that is gone."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from blockprune.runs.lock import lock, locked


def test_one_holder_or_several_that_share(tmp_path: Path) -> None:
    for path in (tmp_path / "file", tmp_path):
        alone = lock(path)
        assert alone is not None
        assert lock(path, wait=False) is None and lock(path, wait=False, shared=True) is None
        os.close(alone)
        several = [lock(path, wait=False, shared=True) for _ in range(2)]
        assert None not in several and lock(path, wait=False) is None
        for fd in several:
            os.close(fd or 0)


def test_a_lock_goes_with_its_context(tmp_path: Path) -> None:
    with locked(tmp_path / "x") as mine, locked(tmp_path / "x", wait=False) as other:
        assert mine and not other
        assert [p.name for p in tmp_path.iterdir()] == [".x.lock"]
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_its_holder_removed_is_not_taken_for_the_lock(tmp_path: Path) -> None:
    path, lock, taken = tmp_path / "x", tmp_path / ".x.lock", threading.Event()
    fd = os.open(lock, os.O_CREAT | os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)

    def wait() -> None:
        with locked(path) as mine:
            assert mine and lock.exists()
            taken.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not taken.wait(0.2)
    lock.unlink()
    os.close(fd)
    assert taken.wait(60)
    waiter.join(60)
    assert not lock.exists()
