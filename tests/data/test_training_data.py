"""Sources of images with captions, whole and broken, and the reader that goes round what is broken."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioned import SIZE, break_folder, picture, sample, write_folder, write_shards, write_tar
from PIL import Image

from blockprune.data.digits import DigitScenes
from blockprune.data.image_folder import resize_centre_crop
from blockprune.data.training_data import CaptionedDataset, CaptionedFolder, Pair, Reader, Shards, Source, Unreadable, source_of
from blockprune.errors import UserError

SOURCES: dict[str, Callable[[Path], str]] = {
    "csv": lambda folder: str(write_folder(folder, 7)),
    "jsonl": lambda folder: str(write_folder(folder, 7, "metadata.jsonl", "text")),
    "caption": lambda folder: str(write_folder(folder, 7, "metadata.jsonl", "caption")),
    "braces": lambda folder: write_shards(folder, 7),
    "tar": lambda folder: str(write_tar(folder / "all.tar", [m for i in range(7) for m in sample(i)])),
    "star": lambda folder: str(Path(write_shards(folder, 7)).parent / "*.tar"),
    "tar folder": lambda folder: str(Path(write_shards(folder, 7)).parent),
    "digits": lambda folder: "digits",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_square_images_with_captions(kind: str, tmp_path: Path) -> None:
    text = SOURCES[kind](tmp_path / "data")
    source = source_of(text, SIZE, 7)
    assert len(source) == 7 and source.size == SIZE
    for i in range(7):
        image, caption = source[i]
        assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.uint8
        assert caption == (f"cat {i}" if kind != "digits" else DigitScenes("train", 0, 7)[i][1])
        assert torch.equal(image, source[i].image)
    other_size, fewer = source_of(text, 8, 7), source_of(text, SIZE, 5)
    assert (len(fewer), fewer[4].caption) == (5, source[4].caption)
    assert source.identity == other_size.identity != fewer.identity
    assert len(source.identity) == 12


def test_all_pairs_count_when_no_number_is_given(tmp_path: Path) -> None:
    assert len(source_of(str(write_folder(tmp_path / "f", 5)), SIZE)) == 5
    assert len(source_of(write_shards(tmp_path / "t", 5), SIZE)) == 5
    assert len(source_of("digits", 32)) == 24_000


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    source = source_of(str(write_folder(tmp_path / "f", 2)), SIZE)
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "f" / "1.png"))).permute(2, 0, 1)
    assert torch.equal(source[1].image, resize_centre_crop(pixels, SIZE))
    digits = torch.from_numpy(DigitScenes("train", 0, 3)[2][0]).permute(2, 0, 1)
    assert torch.equal(source_of("digits", 32, 3)[2].image, digits)


def test_identity_follows_files_and_captions(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", 3)
    before = source_of(str(folder), SIZE).identity
    (folder / "metadata.csv").write_text("file_name,text\n0.png,cat 0\n1.png,dog 1\n2.png,cat 2\n")
    caption = source_of(str(folder), SIZE).identity
    (folder / "2.png").write_bytes(picture(2, (30, 30)))
    assert len({before, caption, source_of(str(folder), SIZE).identity}) == 3


def test_metadata_of_bk_sdm_and_of_odd_captions(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", 4)
    rows = ["\ufefffile_name,text", '0.png,"a cat, sitting"', '1.png,"two\nlines"', "2.png,one\u2028caption", "3.png, spaced "]
    (folder / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    source = source_of(str(folder), SIZE)
    assert [source[i].caption for i in range(4)] == ["a cat, sitting", "two\nlines", "one\u2028caption", "spaced"]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_shards_hold_any_of_the_usual_image_kinds(kind: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [m for i in range(2) for m in sample(i, kind)])
    assert source_of(str(path), SIZE)[1].caption == "cat 1"


def test_a_caption_comes_from_the_text_else_from_the_json(tmp_path: Path) -> None:
    said = json.dumps({"caption": "json"})
    members = [*sample(0, text="text", meta=said), *sample(1, text=" ", meta=said), *sample(2, text=None, meta=said)]
    source = source_of(str(write_tar(tmp_path / "a.tar", members)), SIZE)
    assert [source[i].caption for i in range(3)] == ["text", "json", "json"]


def test_names_in_folders_and_hidden_files_of_a_tar(tmp_path: Path) -> None:
    members = [("x/1.jpg", picture(0, kind="JPEG")), ("x/1.txt", b"a"), ("y/1.jpg", picture(1, kind="JPEG")), ("y/1.txt", b"b")]
    source = source_of(str(write_tar(tmp_path / "a.tar", [("._1.jpg", b"junk"), *members])), SIZE)
    assert [source[i].caption for i in range(len(source))] == ["a", "b"]


def break_shards(folder: Path) -> str:
    members = [m for i in range(20) for m in sample(i)]
    jpg = dict(members)["00001.jpg"]
    broken = {
        "00001.jpg": jpg[: len(jpg) // 2],
        "00002.jpg": None,
        "00003.jpg": b"",
        "00004.txt": b"\xff\xfe\xfa",
        "00005.txt": b"",
    }
    broken |= {"00005.json": b'{"caption": null}', "00006.txt": b"", "00006.json": b"{"}
    kept = [(name, broken.get(name, content)) for name, content in members]
    return str(write_tar(folder / "a.tar", [(name, content) for name, content in kept if content is not None]))


@pytest.mark.parametrize("broken", [break_folder, break_shards])
def test_broken_samples_are_replaced_by_the_next_and_counted(broken: Callable[[Path], str], tmp_path: Path) -> None:
    source = source_of(broken(tmp_path / "data"), SIZE)
    for i in range(1, 7):
        with pytest.raises(Unreadable):
            source[i]
    reader, backwards = Reader(source), Reader(source)
    found = [reader.pair(i).caption for i in range(20)]
    assert found == [f"cat {i if i in (0, *range(7, 20)) else 7}" for i in range(20)]
    assert list(reversed([backwards.pair(i).caption for i in reversed(range(20))])) == found
    assert sorted(reader.skipped) == [1, 2, 3, 4, 5, 6] == sorted(backwards.skipped)
    assert all(reader.skipped.values())


class Fake:
    """A source of `n` samples of which those in `broken` cannot be read; counts how often it is asked."""

    name, size, identity = "fake", 1, "0" * 12

    def __init__(self, n: int, broken: Sequence[int]) -> None:
        self.n, self.broken, self.asked = n, broken, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Pair:
        self.asked += 1
        if index in self.broken:
            raise Unreadable(f"sample {index} is torn")
        return Pair(torch.zeros(3, 1, 1, dtype=torch.uint8), str(index))


def test_the_last_sample_is_replaced_by_the_first_and_no_broken_one_is_read_twice() -> None:
    source = Fake(5, [4])
    reader = Reader(source)
    assert [reader.pair(4).caption, reader.pair(4).caption] == ["0", "0"]
    assert source.asked == 3
    with pytest.raises(IndexError):
        reader.pair(5)


@pytest.mark.parametrize(("n", "n_broken", "share", "stops"), [(50, 10, 0.1, False), (50, 11, 0.1, True), (200, 20, 0.1, False)])
@pytest.mark.parametrize("order", [1, -1])
def test_too_many_broken_samples_stop_the_reader(n: int, n_broken: int, share: float, stops: bool, order: int) -> None:
    source: Source = Fake(n, range(n_broken))
    reader = Reader(source, share)
    if not stops:
        assert len({reader.pair(i).caption for i in range(n)[::order]}) == n - n_broken
        return
    with pytest.raises(
        UserError, match=r"11 of the 50 samples of 'fake' cannot be used \(sample .*; .*; sample \d+ is torn\), .* 10"
    ):
        [reader.pair(i) for i in range(n)[::order]]


def test_a_source_without_one_good_sample_is_an_error() -> None:
    with pytest.raises(UserError, match="none of the 3 samples"):
        Reader(Fake(3, range(3))).pair(1)


def test_a_shard_that_is_cut_short_gives_what_is_before_the_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", [m for i in range(6) for m in sample(i)])
    with caplog.at_level(logging.WARNING):
        whole = Shards(str(path), SIZE)
    assert not caplog.records
    cut = whole.samples[3].members["jpg"][0] + 100
    path.write_bytes(path.read_bytes()[:cut])
    source = source_of(str(path), SIZE)
    assert "cut short" in caplog.text
    assert [source[i].caption for i in range(3)] == ["cat 0", "cat 1", "cat 2"]
    with pytest.raises(Unreadable, match="no caption"):
        source[3]
    assert Reader(source).pair(3).caption == "cat 0"


def test_a_shard_with_a_damaged_header_gives_what_is_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", [m for i in range(6) for m in sample(i)])
    data = bytearray(path.read_bytes())
    start = Shards(str(path), SIZE).samples[3].members["jpg"][0] - tarfile.BLOCKSIZE
    data[start : start + tarfile.BLOCKSIZE] = b"\x07" * tarfile.BLOCKSIZE
    path.write_bytes(data)
    assert len(source_of(str(path), SIZE)) == 3
    assert "damaged" in caplog.text


def test_a_shard_that_shrinks_later_gives_unreadable_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(i)])
    source = source_of(str(path), SIZE)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Unreadable, match="cut short"):
        source[2]
    path.unlink()
    with pytest.raises(Unreadable, match="No such file"):
        source[2]


def wrong(folder: Path, kind: str) -> str:
    data = folder / "data"
    if kind == "no metadata":
        write_folder(data, 2)
        (data / "metadata.csv").unlink()
    elif kind == "empty":
        data.mkdir()
    elif kind == "wrong columns":
        write_folder(data, 2, header="picture,words")
    elif kind == "no rows":
        write_folder(data, 0)
    elif kind == "other files":
        write_folder(data, 2)
        (data / "metadata.csv").write_text("file_name,text\nx.png,a\n")
    elif kind == "no captions":
        write_folder(data, 2)
        (data / "metadata.csv").write_text("file_name,text\n0.png,\n1.png,\n")
    elif kind == "not text":
        write_folder(data, 2)
        (data / "metadata.csv").write_bytes(b"file_name,text\n0.png,\xff\xfe\n")
    elif kind == "unclosed quote":
        write_folder(data, 2)
        (data / "metadata.csv").write_text('file_name,text\n0.png,"a\n1.png,b\n')
    elif kind == "json keys":
        write_folder(data, 2, "metadata.jsonl", "words")
    elif kind == "not json":
        write_folder(data, 2, "metadata.jsonl", "text")
        (data / "metadata.jsonl").write_text("{\n")
    elif kind == "no shards":
        return f"{data}/{{00000..00012}}.tar"
    elif kind == "one missing":
        return write_shards(data, 6).replace("00001}", "00002}")
    elif kind == "no tar":
        data.mkdir()
        (data / "a.tar").write_bytes(b"x" * 2000)
        return f"{data}/a.tar"
    elif kind == "tar of text":
        return str(write_tar(data / "a.tar", [("1.txt", b"a")]))
    elif kind == "tar of images":
        return str(write_tar(data / "a.tar", sample(0, text=None, meta=None)))
    return str(data)


WRONG = {
    "no folder": r"no data at '.*data': give a folder",
    "no metadata": r"no metadata\.csv or metadata\.jsonl in",
    "empty": r"no metadata\.csv or metadata\.jsonl in",
    "wrong columns": r"metadata\.csv' needs .* file_name and text, .* it is 'picture, words'",
    "no rows": r"list no file that is there: ",
    "other files": r"list no file that is there, such as 'x\.png'",
    "no captions": r"hold no captions",
    "not text": r"not UTF-8",
    "unclosed quote": r"not valid CSV",
    "json keys": r"line 1 needs file_name and text",
    "not json": r"line 1 is not JSON",
    "no shards": r"no \.tar file matches",
    "one missing": r"1 of the 3 shards of .* are missing, such as '.*00002\.tar'",
    "no tar": r"is not a readable \.tar",
    "tar of text": r"no images in",
    "tar of images": r"no captions in",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=WRONG[kind]):
        source_of(wrong(tmp_path, kind), SIZE)


def test_a_number_of_images_is_positive() -> None:
    with pytest.raises(UserError, match="at least 1: got 0"):
        source_of("digits", SIZE, 0)


def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "{0..3}", 2)
    assert isinstance(source_of(str(folder), SIZE), CaptionedFolder)


def in_memory(kind: str, n: int = 5) -> list[tuple[Any, str]]:
    """The pictures of `write_folder` in one of the forms that a dataset may have."""
    images = [Image.open(io.BytesIO(picture(i))) for i in range(n)]
    forms: dict[str, Callable[[Image.Image], Any]] = {
        "PIL": lambda image: image,
        "array": np.asarray,
        "tensor": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    }
    return [(forms[kind](image), f"cat {i}") for i, image in enumerate(images)]


@pytest.mark.parametrize("kind", ["PIL", "array", "tensor"])
def test_a_dataset_gives_the_pairs_of_a_folder(kind: str, tmp_path: Path) -> None:
    folder = source_of(str(write_folder(tmp_path / "f", 5)), SIZE)
    source: Source = CaptionedDataset(in_memory(kind), SIZE)
    assert len(source) == 5
    for i in range(5):
        assert torch.equal(source[i].image, folder[i].image) and source[i].caption == folder[i].caption
    assert source.identity == CaptionedDataset(in_memory("PIL"), 8).identity
    changed = [*in_memory(kind)[:4], (in_memory(kind)[0][0], "cat 4")]
    assert (
        len({source.identity, CaptionedDataset(in_memory(kind, 4), SIZE).identity, CaptionedDataset(changed, SIZE).identity}) == 3
    )


def test_a_dataset_with_a_blank_caption_is_skipped_there() -> None:
    pairs = in_memory("PIL")
    reader = Reader(CaptionedDataset([pairs[0], (pairs[1][0], " "), *pairs[2:]], SIZE))
    assert [reader.pair(i).caption for i in range(3)] == ["cat 0", "cat 2", "cat 2"]
    assert list(reader.skipped) == [1]


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ([], "no data in a list"),
        (iter([]), "no data in a list_iterator"),
        ([{"image": 1}], "item 0 of the list is no pair"),
        ([(np.zeros((4, 4, 3)), "a")], r"image of item 0 of the list is torch.float64 \(3, 4, 4\): give a PIL image"),
        ([(np.zeros((4, 4), np.uint8), "a")], r"is torch.uint8 \(4, 4\)"),
        ([("a.png", "a")], "is a str: give a PIL image"),
    ],
)
def test_what_is_no_dataset_is_said(dataset: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        CaptionedDataset(dataset, SIZE)
