"""Encoded training pairs: live and from a cache the same, and a cache that survives kills, damage and company."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned import break_folder, write_folder, write_shards

from blockprune.data.cache import AGAIN, Cached, terms, unfinished, write_cache
from blockprune.data.encoded import Encoded, Live, Provider
from blockprune.data.training_data import Reader, source_of
from blockprune.errors import UserError
from blockprune.model import pretrained
from blockprune.model.families import Condition
from blockprune.model.identity import identity

Cli = Callable[..., tuple[int, str, str]]
N = 7  # pairs of `models`
KINDS = ("tiny-digits", "sdxl")


@pytest.fixture(scope="module")
def written(models: dict[str, tuple[Any, Reader]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of both orientations in shards of 3, by kind; tests must not write to it."""
    folders = {}
    for kind, (pipe, reader) in models.items():
        folders[kind] = tmp_path_factory.mktemp(kind) / "cache"
        write_cache(pipe, reader, folders[kind], 3, teacher="teacher", flip=True)
    return folders


def flat(condition: Condition) -> Iterator[torch.Tensor]:
    for _, value in sorted(condition.items()):
        yield from flat(value) if isinstance(value, dict) else (value,)


def assert_equal(a: Encoded, b: Encoded) -> None:
    """Equal but for the rounding of encoders of unit size."""
    assert a.condition.keys() == b.condition.keys()
    for x, y in zip([a.mean, a.logvar, *flat(a.condition)], [b.mean, b.logvar, *flat(b.condition)], strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def same(folder: Path, other: Path) -> None:
    """Both caches hold the same files with the same bytes, and nothing else."""
    names = sorted(p.name for p in other.iterdir())
    assert sorted(p.name for p in folder.iterdir()) == names
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_what_live_encoding_gives(kind: str, models: dict[str, Any], written: dict[str, Path]) -> None:
    live, cached = Live(*models[kind]), Cached(written[kind])
    assert len(live) == len(cached) == N and live.identity == cached.identity
    indices, flips = [5, 0, 6, 3, 0], [False, True, True, False, False]
    assert_equal(live.encoded(indices, flips), cached.encoded(indices, flips))
    noise = torch.randn(5, *cached.encoded([0], [False]).mean.shape[1:])
    latents, condition = live.latents(indices, flips, noise)
    again, _ = cached.latents(indices, flips, noise)
    torch.testing.assert_close(latents, again, rtol=1e-5, atol=1e-5)
    assert all(len(rows) == 5 and rows.device.type == "cpu" for rows in flat(condition))
    assert ("added_cond_kwargs" in condition) == (kind == "sdxl")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_no_number_but_by_rounding(kind: str, models: dict[str, Any], written: dict[str, Path]) -> None:
    indices, flips = list(range(N)), [i % 2 == 0 for i in range(N)]
    assert_equal(Live(*models[kind], chunk=4).encoded(indices, flips), Cached(written[kind]).encoded(indices, flips))


def test_encoded_tensors_may_be_trained_on(models: dict[str, Any], written: dict[str, Path]) -> None:
    providers: list[Provider] = [Live(*models["sdxl"]), Cached(written["sdxl"])]
    for provider in providers:
        found = provider.encoded([0], [False])
        for x in [found.mean, found.logvar, *flat(found.condition)]:
            weight = torch.ones(x.shape[-1], requires_grad=True)
            (x * weight).sum().backward()
            assert not x.is_inference() and weight.grad is not None


def test_one_caption_is_encoded_once_a_shard(models: dict[str, Any], tmp_path: Path) -> None:
    pipe, _ = models["sdxl"]
    folder = write_folder(tmp_path / "data", 6)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,cat {i % 2}\n" for i in range(6)))
    reader = Reader(source_of(str(folder), 16))
    write_cache(pipe, reader, tmp_path / "cache", 6, teacher="t")
    shapes = pretrained.header(tmp_path / "cache" / "shard-00000.safetensors")
    assert shapes["condition/encoder_hidden_states"][0] == shapes["condition/added_cond_kwargs/text_embeds"][0] == 2
    assert_equal(Live(pipe, reader).encoded(range(6), [False] * 6), Cached(tmp_path / "cache").encoded(range(6), [False] * 6))


def test_broken_samples_are_replaced_alike_and_counted_at_the_end(models: dict[str, Any], tmp_path: Path) -> None:
    pipe, _ = models["sdxl"]
    reader = Reader(source_of(break_folder(tmp_path / "data"), 16))
    said = write_cache(pipe, reader, tmp_path / "cache", 4, teacher="t")
    assert said == json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert (said["n_skipped"], sorted(map(int, said["skipped"]))) == (6, [1, 2, 3, 4, 5, 6])
    cached = Cached(tmp_path / "cache")
    assert cached.skipped == reader.skipped
    assert_equal(Live(pipe, Reader(reader.source)).encoded(range(20), [False] * 20), cached.encoded(range(20), [False] * 20))
    again, known = Reader(reader.source), list[list[int]]()
    (tmp_path / "cache" / "shard-00004.safetensors").unlink()
    write_cache(pipe, again, tmp_path / "cache", 4, teacher="t", tick=lambda name, n: known.append(sorted(again.skipped)))
    assert known == [[1, 2, 3, 4, 5, 6]] * 4
    assert again.skipped == reader.skipped


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 10),
    "cut header": lambda path: os.truncate(path, 20),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "junk": lambda path: path.write_bytes(b"\xff" * 5000),
    "other": lambda path: path.write_bytes((path.parent / "shard-00002.safetensors").read_bytes()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_found_and_made_again(
    kind: str, models: dict[str, Any], written: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    ticks: list[tuple[str, int]] = []
    write_cache(*models["tiny-digits"], folder, 3, teacher="teacher", flip=True)
    (folder / ".shard-00001.part.safetensors").write_bytes(b"left by a killed process")
    (folder / ".shard-00001.safetensors.lock").write_bytes(b"")
    DAMAGE[kind](folder / "shard-00001.safetensors")
    assert unfinished(folder, N, 3) == {"shard-00001.safetensors": 3}
    with pytest.raises(UserError, match=f"1 of 3 shards of .* missing or damaged: {AGAIN}"):
        Cached(folder)
    write_cache(
        *models["tiny-digits"], folder, 3, teacher="teacher", flip=True, chunk=1, tick=lambda name, n: ticks.append((name, n))
    )
    assert ticks == [("shard-00001.safetensors", 1)] * 3
    same(folder, written["tiny-digits"])


def test_a_shard_that_breaks_while_it_is_read_is_an_error(models: dict[str, Any], tmp_path: Path) -> None:
    write_cache(*models["sdxl"], tmp_path / "cache", 4, teacher="t")
    cached = Cached(tmp_path / "cache")
    os.truncate(tmp_path / "cache" / "shard-00001.safetensors", 100)
    assert len(cached.encoded([0], [False]).mean) == 1
    with pytest.raises(UserError, match=r"cannot read .*shard-00001"):
        cached.encoded([4], [False])


def test_a_run_that_is_stopped_goes_on(models: dict[str, Any], written: dict[str, Path], tmp_path: Path) -> None:
    folder, ticks = tmp_path / "cache", []

    def stop(name: str, n: int) -> None:
        ticks.append(name)
        if len(ticks) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(*models["tiny-digits"], folder, 3, teacher="teacher", flip=True, tick=stop)
    assert sorted(p.name for p in folder.iterdir()) == ["cache.json", "shard-00000.safetensors"]
    write_cache(*models["tiny-digits"], folder, 3, teacher="teacher", flip=True, tick=stop)
    assert ticks[5:] == ["shard-00001.safetensors"] * 3 + ["shard-00002.safetensors"]
    same(folder, written["tiny-digits"])


def test_two_writers_share_the_shards(
    models: dict[str, Any], written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real, by = tmp_path / "cache", Live.moments, list[str]()
    both = threading.Barrier(2, timeout=60)

    def moments(live: Live, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if threading.current_thread().name not in by:
            both.wait()
        by.append(threading.current_thread().name)
        return real(live, images)

    def write(pipe: Any) -> None:
        write_cache(pipe, Reader(reader.source), folder, 3, teacher="teacher", flip=True)
        ended.append(unfinished(folder, N, 3))

    monkeypatch.setattr(Live, "moments", moments)
    ended: list[dict[str, int]] = []
    pipe, reader = models["tiny-digits"]
    writers = [threading.Thread(target=write, args=(one,)) for one in (pipe, pretrained.load("tiny-digits"))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert ended == [{}, {}]
    assert len(by) == 2 * N and len(set(by)) == 2
    same(folder, written["tiny-digits"])


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_a_shard_of_a_killed_process_is_taken_over(models: dict[str, Any], written: dict[str, Path], tmp_path: Path) -> None:
    folder, order = tmp_path / "cache", []
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder / ".shard-00000.safetensors.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"

        def tick(name: str, n: int) -> None:
            order.append(name)
            if name == "shard-00002.safetensors":
                os.kill(other.pid, signal.SIGKILL)

        write_cache(*models["tiny-digits"], folder, 3, teacher="teacher", flip=True, tick=tick)
    assert list(dict.fromkeys(order)) == [f"shard-0000{k}.safetensors" for k in (1, 2, 0)]
    same(folder, written["tiny-digits"])


@pytest.mark.slow
def test_two_processes_write_one_cache(tmp_path: Path) -> None:
    args = ["--n-images", "200", "--shard-size", "16", "--device", "cpu"]
    command = [sys.executable, "-m", "blockprune", "cache", *args, "--out"]
    runs = [subprocess.Popen([*command, tmp_path / "two"], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    subprocess.run([*command, tmp_path / "one"], check=True, capture_output=True)
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": "another"}, 'teacher is "teacher" there, "another" asked'),
        ({"flip": False}, "flip is true there, false asked"),
        ({"shard_size": 4}, "shard_size is 3 there, 4 asked"),
        ({"n": 5}, "n is 7 there, 5 asked"),
        ({"size": 16}, "resolution is 32 there, 16 asked"),
        ({"dtype": torch.bfloat16}, 'dtype is "float32" there, "bfloat16" asked'),
    ],
)
def test_a_cache_of_other_terms_is_refused(
    change: dict[str, Any], said: str, models: dict[str, Any], written: dict[str, Path]
) -> None:
    asked = {"teacher": "teacher", "flip": True, "shard_size": 3, "n": N, "size": 32, "dtype": torch.float32} | change
    pipe, reader = models["tiny-digits"][0], Reader(source_of("digits", asked["size"], asked["n"]))
    pipe.vae.to(asked["dtype"])
    try:
        with pytest.raises(UserError, match="cache of other terms") as error:
            write_cache(pipe, reader, written["tiny-digits"], asked["shard_size"], teacher=asked["teacher"], flip=asked["flip"])
    finally:
        pipe.vae.to(torch.float32)
    assert said in str(error.value)
    wanted = terms(reader, asked["teacher"], asked["flip"], asked["dtype"])
    if change.keys() & {"flip", "shard_size"}:
        assert len(Cached(written["tiny-digits"], wanted)) == N
    else:
        with pytest.raises(UserError) as error:
            Cached(written["tiny-digits"], wanted)
        assert said in str(error.value)


def test_a_cache_without_mirrored_images_serves_only_training_without_flips(models: dict[str, Any], tmp_path: Path) -> None:
    pipe, reader = models["sdxl"]
    write_cache(pipe, reader, tmp_path / "cache", 4, teacher="t")
    cached = Cached(tmp_path / "cache", terms(reader, "t", False, torch.float32))
    with pytest.raises(UserError, match=r"no mirrored images: .*--random-flip"):
        cached.encoded([0, 1], [False, True])
    with pytest.raises(UserError, match="flip is false there, true asked"):
        Cached(tmp_path / "cache", terms(reader, "t", True, torch.float32))
    with pytest.raises(IndexError):
        cached.encoded([N], [False])


def test_the_command_writes_a_cache_and_goes_on(cli: Cli, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 7)
    args = [
        "cache",
        "--model",
        tiny_folder("sdxl"),
        "--data",
        data,
        "--out",
        tmp_path / "cache",
        "--shard-size",
        "3",
        "--random-flip",
    ]
    code, out, err = cli(*args, "--batch-size", "2", "--device", "cpu")
    assert code == 0, err
    assert out.startswith(f"{tmp_path / 'cache'}: 7 pairs at 16 pixels, ")
    assert [line.split(",")[0] for line in err.splitlines()] == [
        f"[{k + 1}/3] shard-0000{k}.safetensors: {n} images" for k, n in enumerate((3, 3, 1))
    ]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.safetensors")}
    code, _, err = cli(*args, "--device", "cpu")
    assert (code, err) == (0, "")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.safetensors")}
    teacher = identity(str(tiny_folder("sdxl")))
    cached = Cached(tmp_path / "cache", terms(Reader(source_of(data, 16)), teacher, True, torch.float32))
    assert len(cached.encoded(range(7), [True] * 7).mean) == 7


def test_the_command_runs_on_the_built_in_model(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("cache", "--n-images", "3", "--out", tmp_path / "cache", "--device", "cpu")
    assert code == 0, err
    assert "3 pairs at 32 pixels" in out
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["source"] == "digits"


def test_a_full_disk_leaves_no_part_of_a_shard(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blockprune.data.cache.save_file", fill)
    code, _, err = cli("cache", "--n-images", "2", "--out", tmp_path / "cache", "--device", "cpu")
    assert code == 2 and "the disk is full" in err
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["cache.json"]


def test_the_command_says_what_it_skipped(cli: Cli, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    data = break_folder(tmp_path / "data")
    code, out, err = cli("cache", "--model", tiny_folder("sdxl"), "--data", data, "--out", tmp_path / "cache", "--device", "cpu")
    assert code == 0, err
    assert "20 pairs at 16 pixels, 6 unreadable samples replaced by the next" in out


def test_what_is_wrong_takes_one_line(one_line: Callable[..., str], tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    def said(*args: str | Path) -> str:
        return one_line("cache", "--model", tiny_folder("sdxl"), "--device", "cpu", *args)

    data, out = write_folder(tmp_path / "data", 30), tmp_path / "cache"
    assert "none of its own: give --data" in said("--out", out)
    assert "no data at '/nowhere'" in said("--data", "/nowhere", "--out", out)
    assert "no .tar file matches" in said("--data", f"{tmp_path}/{{000..012}}.tar", "--out", out)
    assert "square resolution: got 16x32" in said("--data", data, "--resolution", "16x32", "--out", out)
    assert "multiple of 2" in said("--data", data, "--resolution", "15", "--out", out)
    assert "--shard-size must be at least 1" in said("--data", data, "--shard-size", "0", "--out", out)
    assert "--batch-size must be at least 1" in said("--data", data, "--batch-size", "0", "--out", out)
    assert "--n-images must be at least 1: got 0" in said("--data", data, "--n-images", "0", "--out", out)
    assert "is not empty and holds no cache" in said("--data", data, "--out", data)
    assert not list(data.glob(".*"))
    assert "is a file" in said("--data", data, "--out", data / "0.png")
    assert "a file stands where a folder should be" in said("--data", data, "--out", data / "0.png" / "cache")
    for i in range(12):
        (data / f"{i}.png").write_bytes(b"")
    assert "11 of the 30 samples" in said("--data", data, "--out", out)
    (out / "cache.json").write_text("{")
    assert "cannot read" in said("--data", data, "--out", out)
    (out / "cache.json").write_text('{"format": 9}')
    assert "no cache of format 1" in said("--data", data, "--out", out)
    with pytest.raises(UserError, match="no cache in"):
        Cached(tmp_path)
