"""Captions and prompts from files: one reader for scan and training, and any text, file or pattern that a user may have."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned import picture, sample, write_folder, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blockprune.data import training_data
from blockprune.data.captions import flaw, read_prompts
from blockprune.data.image_files import read_image
from blockprune.data.image_folder import ImageFolder
from blockprune.data.training_data import Pair, Reader, Source, Unreadable, source_of
from blockprune.errors import UserError
from blockprune.model import presets

SIZE = 16
quick = settings(max_examples=40, deadline=None, derandomize=True)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
ANY_NAME = st.one_of(
    ANY_TEXT, st.sampled_from(["../0.png", "/dev/zero", "a/../../0.png", "\0.png", "x" * 5000 + ".png", "\ud800.png"])
)


def folder_with(folder: Path, text: str | bytes, name: str = "metadata.csv", n: int = 2) -> Path:
    """A folder of `n` images and that metadata."""
    write_folder(folder, n)
    (folder / "metadata.csv").unlink()
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def trained(folder: Path) -> dict[str, str]:
    """File => caption as training sees them."""
    source = source_of(str(folder), SIZE)
    assert isinstance(source, training_data.CaptionedFolder)
    return {name: source[i].caption for i, (name, _) in enumerate(source.rows)}


METADATA = {
    "header": ("metadata.csv", "file_name,text\n0.png,a cat\n1.png,a dog\n"),
    "id first": ("metadata.csv", "id,file_name,text\n7,0.png,a cat\n8,1.png,a dog\n"),
    "caption first": ("metadata.csv", "Caption,width,File\na cat,3,0.png\na dog,3,1.png\n"),
    "no header": ("metadata.csv", "0.png,a cat\n1.png,a dog\n"),
    "no header, more columns": ("metadata.csv", "0.png,a cat,512\n1.png,a dog,512\n"),
    "no header, BOM": ("metadata.csv", "\ufeff0.png,a cat\r\n1.png,a dog\r\n"),
    "BOM": ("metadata.csv", "\ufefffile_name,text\r\n0.png,a cat\r\n1.png,a dog\r\n"),
    "quotes": ("metadata.csv", '"file_name","text"\n"0.png","a cat"\n"1.png", a dog \n'),
    "blank lines": ("metadata.csv", "\n \nfile_name,text\n\n0.png,a cat\n , \n1.png,a dog\n\n"),
    "jsonl": ("metadata.jsonl", '{"file_name": "0.png", "text": "a cat"}\n\n{"file_name": "./1.png", "caption": "a dog"}\n'),
    "jsonl, other names": (
        "metadata.jsonl",
        '\ufeff{"id": 1, "image": "0.png", "prompt": "a cat"}\n{"file": "1.png", "text": "a dog"}',
    ),
}


@pytest.mark.parametrize("kind", METADATA)
def test_scan_and_training_read_the_same_captions(kind: str, tmp_path: Path) -> None:
    name, text = METADATA[kind]
    folder = folder_with(tmp_path / "data", text, name)
    wanted = {"0.png": "a cat", "1.png": "a dog"}
    assert ImageFolder(folder).captions == wanted
    assert {name.removeprefix("./"): caption for name, caption in trained(folder).items()} == wanted


@pytest.mark.parametrize(
    "caption",
    ["a cat, sitting", "two\nlines", "one\u2028caption", "next\x85line", "form\x0cfeed", "three\x1cfiles", 'a "cat"', "猫"],
)
@pytest.mark.parametrize("header", ["file_name,text\n", ""])
def test_captions_of_any_characters_stay_whole(caption: str, header: str, tmp_path: Path) -> None:
    quoted = caption.replace('"', '""')
    folder = folder_with(tmp_path / "data", f'{header}0.png,"{quoted}"\n1.png,x\n')
    assert ImageFolder(folder).captions["0.png"] == trained(folder)["0.png"] == caption
    (tmp_path / "prompts.csv").write_text(f'prompt\n"{quoted}"\n', encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.csv") == [caption]
    if "\n" not in caption:
        (tmp_path / "prompts.txt").write_text(f"{caption}\nx\n", encoding="utf-8", newline="")
        assert read_prompts(tmp_path / "prompts.txt") == [caption, "x"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metadata.csv", "picture,words\n0.png,a cat\n", "names the columns file_name and text, .* it is 'picture, words'"),
        ("metadata.csv", "7,0.png,a cat\n", "it is '7, 0.png, a cat'"),
        ("metadata.csv", "file_name,words\n0.png,a cat\n", "it is 'file_name, words'"),
        ("metadata.csv", "file_name\n0.png\n", "it is 'file_name'"),
        ("metadata.csv", 'file_name,text\n0.png,"a cat\n', "is not valid CSV"),
        ("metadata.csv", b"file_name,text\n0.png,caf\xe9\n", "not UTF-8"),
        ("metadata.jsonl", '{"file_name": "0.png"}\n', "line 1 needs file_name and text or caption"),
        ("metadata.jsonl", '{"text": "a"}\n', "line 1 needs file_name"),
        ("metadata.jsonl", '{"file_name": 3, "text": "a"}\n', "line 1 needs file_name"),
        ("metadata.jsonl", "[" * 100_000 + "\n", "line 1 is not JSON"),
    ],
)
def test_metadata_of_any_other_form_are_refused_by_both(name: str, text: str | bytes, says: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", text, name)
    for read in (lambda: ImageFolder(folder).captions, lambda: source_of(str(folder), SIZE)):
        with pytest.raises(UserError, match=says) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_table_whose_first_file_is_lost_still_has_no_header(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", "lost.png,a bird\n0.png,a cat\n1.png,a dog\n")
    assert ImageFolder(folder).captions == {"0.png": "a cat", "1.png": "a dog"}
    assert Reader(source_of(str(folder), SIZE)).pair(0).caption == "a cat"


def test_a_file_that_is_called_like_a_column_is_data(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", "image,text\n0.png,a cat\n")
    (folder / "image").write_bytes(picture(5))
    assert trained(folder) == {"image": "text", "0.png": "a cat"}


def test_prompts_come_from_tables_of_images(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('0.png,a cat\n1.png,"a dog, asleep"\n')
    assert read_prompts(tmp_path / "p.csv") == ["a cat", "a dog, asleep"]
    (tmp_path / "p.csv").write_text("a cat\na dog, asleep\n")
    with pytest.raises(UserError, match="single column at first, and then the row 'a dog, asleep': quote"):
        read_prompts(tmp_path / "p.csv")


def test_metadata_of_a_folder_of_real_images_need_not_be_captions(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", "id,class\n0,cat\n")
    assert [picture.name for picture in ImageFolder(folder)] == ["0.png", "1.png"]


def jsonl(rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in rows)


def sound(source: Source) -> list[str]:
    """The captions of the samples that can be used; every other one is Unreadable in one line."""
    found, reasons = [], []
    for i in range(len(source)):
        try:
            pair = source[i]
        except Unreadable as err:
            reasons.append(err.reason)
            continue
        assert isinstance(pair, Pair) and pair.caption.strip() and not flaw(pair.caption)
        found.append(pair.caption)
    assert all(reason and "\n" not in reason for reason in reasons)
    return found


@quick
@given(captions=st.lists(ANY_TEXT, min_size=2, max_size=2))
def test_any_caption_is_read_whole_or_skipped(captions: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = folder_with(
        tmp_path_factory.mktemp("text") / "data", jsonl([(f"{i}.png", c) for i, c in enumerate(captions)]), "metadata.jsonl"
    )
    usable = [c.strip() for c in captions if c.strip() and not flaw(c)]
    if any(c.strip() for c in captions):
        assert sound(source_of(str(folder), SIZE)) == usable
    if any(flaw(c.strip()) for c in captions):
        with pytest.raises(UserError, match="which is no text: mend or drop it") as caught:
            _ = ImageFolder(folder).captions
        assert "\n" not in str(caught.value)
    else:
        assert list(ImageFolder(folder).captions.values()) == usable
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("0.png", captions[0]), ("1.png", captions[1])])
        assert list(ImageFolder(folder).captions.values()) == usable


@quick
@given(prompts=st.lists(ANY_TEXT, max_size=3), key=st.sampled_from(["prompt", "text"]))
def test_any_prompt_is_read_whole_or_refused(prompts: list[str], key: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text("".join(json.dumps({key: prompt}) + "\n" for prompt in prompts))
    usable = [p.strip() for p in prompts if p.strip()]
    if usable and not any(map(flaw, usable)):
        assert read_prompts(file) == usable
        "".join(usable).encode()
        return
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@quick
@given(names=st.lists(ANY_NAME, min_size=1, max_size=3))
def test_any_file_name_is_read_inside_the_folder_or_skipped(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("names")
    (root / "0.png").write_bytes(picture(0))
    folder = folder_with(root / "data", jsonl([("1.png", "ours"), *((name, "theirs") for name in names)]), "metadata.jsonl")
    found = sound(source_of(str(folder), SIZE))
    assert found == ["ours"] + ["theirs"] * sum(name.strip() in ("0.png", "1.png") for name in names)
    assert ImageFolder(folder).captions["1.png"] in ("ours", "theirs")


@pytest.mark.parametrize("name", ["../outside.png", "{root}/outside.png", "deep/../../outside.png"])
def test_metadata_lead_to_no_file_outside_their_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(picture(9))
    folder = folder_with(tmp_path / "data", jsonl([("0.png", "ours"), (name.format(root=tmp_path), "theirs")]), "metadata.jsonl")
    (folder / "deep").mkdir()
    source = source_of(str(folder), SIZE)
    with pytest.raises(Unreadable, match="lies outside the folder"):
        source[1]
    assert Reader(source).pair(1).caption == "ours"
    (folder / "metadata.jsonl").write_text(jsonl([(name.format(root=tmp_path), "theirs")]))
    with pytest.raises(UserError, match="list no file that is there"):
        source_of(str(folder), SIZE)


def test_metadata_may_name_their_files_in_full(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", jsonl([(f"{tmp_path}/data/0.png", "a cat")]), "metadata.jsonl")
    assert source_of(str(folder), SIZE)[0].caption == "a cat"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is at most 108 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "fifo": fifo,
    "socket": bound_socket,
    "folder": Path.mkdir,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", "file_name,text\n" + "".join(f"{i}.png,cat {i}\n" for i in range(3)))
    SPECIAL[kind](folder / "2.png")
    with pytest.raises(Unreadable, match=r"2.png cannot be read: no regular file"):
        source_of(str(folder), SIZE)[2]
    assert Reader(source_of(str(folder), SIZE)).pair(2).caption == "cat 0"
    assert [p.name for p in ImageFolder(folder)] == ["0.png", "1.png"]
    SPECIAL[kind](tmp_path / "shard.tar")
    with pytest.raises(UserError, match=r"no \.tar file matches|no metadata\.csv"):
        source_of(str(tmp_path / "shard.tar"), SIZE)
    SPECIAL[kind](tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="is no regular file"):
        read_prompts(tmp_path / "prompts.txt")
    (folder / "metadata.csv").unlink()
    SPECIAL[kind](folder / "metadata.csv")
    with pytest.raises(UserError, match=r"no metadata\.csv or metadata\.jsonl in"):
        source_of(str(folder), SIZE)


def test_links_and_devices_in_a_shard_are_no_samples(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in sample(0):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE), start=1):
            for suffix in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.type, info.linkname = kind, str(tmp_path / "secret.txt")
                tar.addfile(info)
    source = source_of(str(tmp_path / "a.tar"), SIZE)
    assert [source[i].caption for i in range(len(source))] == ["cat 0"]


def test_members_that_point_outside_are_read_from_the_shard_and_written_nowhere(tmp_path: Path) -> None:
    members = [(f"{before}{name}", content) for before in ("../", str(tmp_path) + "/") for name, content in sample(0, text="x")]
    shard = write_tar(tmp_path / "shards" / "a.tar", members)
    source = source_of(str(shard), SIZE)
    assert [source[i].caption for i in range(len(source))] == ["x", "x"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "shards"]


@quick
@given(at=st.integers(0, 10_239), value=st.binary(min_size=1, max_size=40))
def test_a_damaged_shard_is_refused_or_gives_what_can_be_read(
    at: int, value: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shard = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", [m for i in range(2) for m in sample(i)])
    data = bytearray(shard.read_bytes())
    data[at : at + len(value)] = value
    shard.write_bytes(data)
    refusal = ""
    try:
        sound(source_of(str(shard), SIZE))
    except UserError as err:
        refusal = str(err)
    assert "\n" not in refusal


@pytest.mark.parametrize("caption", ["half a \ud800 pair", "a \0 byte"])
def test_captions_of_a_shard_that_are_no_text_are_skipped(caption: str, tmp_path: Path) -> None:
    meta = json.dumps({"caption": caption})
    shard = write_tar(tmp_path / "a.tar", [*sample(0), *sample(1, text=None, meta=meta), *sample(2, text=None, meta="[" * 100_000)])
    source = source_of(str(shard), SIZE)
    with pytest.raises(Unreadable, match=r"the caption of a.tar:00001 holds the character U\+.* which is no text"):
        source[1]
    with pytest.raises(Unreadable, match="broken caption"):
        source[2]
    assert [Reader(source).pair(i).caption for i in range(3)] == ["cat 0"] * 3


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{0..99999999}.tar", "stands for 100,000,000 names: at most 1,000,000"),
        ("{0..999}/{0..999}/{0..999}.tar", "stands for 1,000,000,000 names: at most 1,000,000"),
        ("{0..999}{a,b}{0..999}.tar", "stands for 2,000,000 names: at most 1,000,000"),
        ("{" + "0" * 5000 + "..1}.tar", "has no end: its numbers have at most 12 digits"),
        ("{0.." + "9" * 5000 + "}.tar", "has no end: its numbers have at most 12 digits"),
        ("{5..2}.tar", "the range '{5..2}' counts down: write {2..5}"),
        ("{00012..00000}.tar", "counts down: write {00000..00012}"),
        ("{٣..٥}.tar", "no .tar file matches"),
    ],
)
def test_shard_patterns_end(pattern: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        source_of(f"{tmp_path}/{pattern}", SIZE)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600


@quick
@given(pattern=st.text("{}.,0129ab[]!", max_size=24))
def test_any_shard_pattern_is_found_or_refused(pattern: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data, "MAX_NAMES", 1000)
        patch.setattr(presets, "MAX_NAMES", 1000)
        with pytest.raises(UserError) as caught:
            source_of(f"{tmp_path_factory.getbasetemp()}/none/{pattern}.tar", SIZE)
        assert "\n" not in str(caught.value)


@quick
@given(at=st.integers(0, 2000), value=st.binary(max_size=8), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_any_damaged_image_is_read_or_unreadable(at: int, value: bytes, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    data[at % len(data) : at % len(data) + len(value)] = value
    image, reason = None, ""
    try:
        image = read_image(io.BytesIO(data))
    except Unreadable as err:
        reason = err.reason
    assert "\n" not in reason
    assert reason or (image is not None and image.dtype == torch.uint8 and image.shape[0] == 3)


def test_images_that_are_bombs_are_skipped(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", "".join(f"{i}.png,cat {i}\n" for i in range(4)))
    Image.new("1", (20_000, 20_000)).save(folder / "2.png")
    Image.new("1", (1, 60_000)).save(folder / "3.png")
    source = source_of(str(folder), SIZE)
    for i, says in ((2, "2.png cannot be read: .*decompression bomb"), (3, "too long a strip")):
        with pytest.raises(Unreadable, match=says):
            source[i]
    images = ImageFolder(folder, max_aspect=64)
    assert [p.name for p in images] == ["0.png", "1.png"]
    assert images.skipped == ["2.png", "3.png"]
