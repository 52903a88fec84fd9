"""Prompts, image folders and reference statistics, whole and broken."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.fid import get_folder_features
from PIL import Image

from blockprune.data import image_folder
from blockprune.data.captions import read_prompts
from blockprune.data.image_folder import ImageFolder, read_reference, resize_centre_crop, stats_of_folder, write_stats
from blockprune.errors import UserError
from blockprune.measures import fid_kid
from blockprune.measures.fid_kid import Stats


class MeanDetector:
    """Channel means and deviations; counts the images of each call."""

    name, n_features = "mean", 6

    def __init__(self) -> None:
        self.calls: list[int] = []

    def features_and_probs(self, images: torch.Tensor) -> tuple[np.ndarray, None]:
        assert images.dtype == torch.uint8
        self.calls.append(len(images))
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1).numpy(), None

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        return self.features_and_probs(images)[0]


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(7):
        save_image(tmp_path / "images" / ("deep" if i % 2 else ".") / f"{i}.png", seed=i)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a red cat\n\n  two, dogs  \n"),
        ("p.TXT", "\ufeffa red cat\r\ntwo, dogs\r\n"),
        ("p.csv", 'file,Caption\n1.png,a red cat\n2.png,"two, dogs"\n'),
        ("p.csv", 'prompt\na red cat\n"two, dogs"\n'),
        ("p.csv", 'a red cat\n"two, dogs"\n'),
        ("p.csv", 'id,caption,prompt\n1,no,a red cat\n2,no,"two, dogs"\n'),
        ("p.jsonl", '{"prompt": "a red cat"}\n\n{"id": 1, "caption": "two, dogs"}\n'),
        ("p.jsonl", '{"text": "a red cat"}\n{"text": "two, dogs"}'),
    ],
)
def test_prompts_of_every_format(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a red cat", "two, dogs"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n  \n", "has none; write one per line"),
        ("p.csv", "", "has none"),
        ("p.csv", "prompt\n", "has none"),
        ("p.csv", "a,b\n1,2\n", "has a, b; rename the column"),
        ("p.csv", 'prompt\n"unclosed', "not valid CSV"),
        ("p.jsonl", "", "has none"),
        ("p.jsonl", '{"prompt": "x"}\nnot json\n', "line 2 is not JSON"),
        ("p.jsonl", '["x"]\n', "line 1 must be a JSON object"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1 has no text under prompt, caption, text"),
        ("p.parquet", "x", "is .txt, .csv or .jsonl"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")


def test_a_folder_is_read_in_order_as_rgb(folder: Path) -> None:
    save_image(folder / "8.jpg", mode="L")
    save_image(folder / "9.png", seed=9, mode="RGBA")
    (folder / "notes.txt").write_text("not an image")
    pictures = list(ImageFolder(folder))
    assert [p.name for p in pictures] == [
        "0.png",
        "2.png",
        "4.png",
        "6.png",
        "8.jpg",
        "9.png",
        "deep/1.png",
        "deep/3.png",
        "deep/5.png",
    ]
    assert all(p.image.shape == (3, 12, 10) and p.image.dtype == torch.uint8 for p in pictures)
    assert ImageFolder(folder).captions == {}
    with Image.open(folder / "deep" / "3.png") as image:
        np.testing.assert_array_equal(pictures[7].image.permute(1, 2, 0), np.asarray(image))
    assert len(ImageFolder(folder)) == 9


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", 'file_name,text\n0.png,nought\ndeep/1.png,"one, deep"\n'),
        ("metadata.csv", '0.png,nought\ndeep/1.png,"one, deep"\n'),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "nought"}\n{"file_name": "deep/1.png", "caption": "one, deep"}\n'),
    ],
)
def test_captions_come_from_metadata(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert ImageFolder(folder).captions == {"0.png": "nought", "deep/1.png": "one, deep"}


def test_metadata_that_fits_nothing_is_an_error(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\nother.png,x\n")
    with pytest.raises(UserError, match=r"name none of its images, but 'other.png'"):
        _ = ImageFolder(folder).captions
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text('{"file": "0.png"}\n')
    with pytest.raises(UserError, match="line 1 needs file_name"):
        _ = ImageFolder(folder).captions


def test_broken_images_are_skipped_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncate(folder / "2.png")
    (folder / "4.png").write_bytes(b"")
    (folder / "6.png").write_text("<html>not found</html>")
    save_image(folder / "deep" / "3.jpg")
    truncate(folder / "deep" / "3.jpg")
    images = ImageFolder(folder)
    for _ in range(2):
        assert [p.name for p in images] == ["0.png", "deep/1.png", "deep/3.png", "deep/5.png"]
        assert images.skipped == ["2.png", "4.png", "6.png", "deep/3.jpg"]
    with caplog.at_level(logging.WARNING, logger="blockprune"):
        assert stats_of_folder(folder, MeanDetector()).n == 4
    assert "skipped 4 of 8 images" in caplog.text
    assert "2.png" in caplog.text


def test_too_many_broken_images_are_an_error(folder: Path) -> None:
    for i in range(11):
        (folder / f"broken{i:02}.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"more than 10 images .* such as 'broken10.png'"):
        list(ImageFolder(folder))


def test_the_limit_grows_with_the_folder(tmp_path: Path) -> None:
    for i in range(1200):
        (tmp_path / f"{i:04}.png").touch()
    assert ImageFolder(tmp_path).max_skipped == 12


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of images"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(UserError, match="no images in"):
        ImageFolder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of the 1 images"):
        list(ImageFolder(tmp_path))


@pytest.mark.parametrize("shape", [(30, 20), (20, 31), (8, 8), (16, 16), (5, 40)])
def test_resize_centre_crop(shape: tuple[int, int]) -> None:
    x = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = resize_centre_crop(x, 16)
    assert out.shape == (3, 16, 16)
    assert out.dtype == torch.uint8
    if shape == (16, 16):
        assert torch.equal(out, x)


def test_the_crop_is_the_centre() -> None:
    x = torch.zeros(3, 8, 24, dtype=torch.uint8)
    x[:, :, 8:16] = 200
    assert resize_centre_crop(x, 8).eq(200).all()
    assert resize_centre_crop(x.transpose(1, 2), 8).eq(200).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_features_keep_the_order_of_a_folder_of_many_sizes(tmp_path: Path, batch_size: int) -> None:
    for i in range(17):
        save_image(tmp_path / f"{i:02}.png", seed=i, size=(8 + i % 5, 9))
    truncate(tmp_path / "03.png")
    detector = MeanDetector()
    found = image_folder.features_of_folder(ImageFolder(tmp_path), detector, batch_size)
    singly = np.concatenate([MeanDetector()(p.image[None]) for p in ImageFolder(tmp_path)])
    np.testing.assert_allclose(found, singly, rtol=1e-5)
    assert max(detector.calls) <= batch_size
    assert sum(detector.calls) == 16


def test_images_are_read_as_clean_fid_reads_them(folder: Path) -> None:
    """Through clean-fid's own loader, with its resizing switched off; its order is by file type, ours by path."""
    save_image(folder / "deep" / "palette.png", mode="P")
    save_image(folder / "deep" / "turned.png")
    with Image.open(folder / "deep" / "turned.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(folder / "deep" / "turned.png", exif=exif)
    theirs = get_folder_features(
        str(folder),
        lambda x: x.flatten(1),
        num_workers=0,
        device=torch.device("cpu"),
        verbose=False,
        custom_fn_resize=lambda x: x.astype(np.float32),
    )
    ours = np.stack([p.image.flatten() for p in ImageFolder(folder)])
    np.testing.assert_array_equal(ours, theirs)


def test_reference_round_trip(folder: Path, tmp_path: Path) -> None:
    detector, path = MeanDetector(), tmp_path / "reference.npz"
    stats = stats_of_folder(folder, detector)
    write_stats(path, stats, detector.name)
    for read in (read_reference(path, detector), read_reference(folder, detector)):
        assert read.n == 7
        np.testing.assert_allclose(read.mu, stats.mu, rtol=1e-12)
        np.testing.assert_allclose(read.sigma, stats.sigma, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(read.features, stats.features, rtol=1e-6)
        assert fid_kid.fid(stats.features, read) == pytest.approx(0, abs=1e-6)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["reference.npz"]
    with np.load(path, allow_pickle=False) as file:
        assert {name: file[name].dtype.kind for name in file} == {
            "mu": "f",
            "sigma": "f",
            "n": "i",
            "detector": "U",
            "features": "f",
        }


def test_published_statistics_with_mu_and_sigma_alone_are_taken(tmp_path: Path) -> None:
    np.savez(tmp_path / "published.npz", mu=np.zeros(6), sigma=np.eye(6))
    stats = read_reference(tmp_path / "published.npz", MeanDetector())
    assert stats.n == 0
    assert stats.features is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(6)}, "holds mu and sigma: .* has mu"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"shape \(5,\), the detector 'mean' gives 6"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "detector": "inception"}, "made by the detector 'inception', not 'mean'"),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, "no usable mu"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "features": np.ones((4, 5))}, "no usable mu"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "no usable mu"),
        ({"mu": np.array([["a"] * 6])[0], "sigma": np.eye(6)}, "no usable mu"),
        ({"mu": np.array([None] * 6), "sigma": np.eye(6)}, r"is not a readable .npz"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        read_reference(tmp_path / "wrong.npz", MeanDetector())
    assert "\n" not in str(caught.value)


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reference at"):
        read_reference(tmp_path / "absent.npz", MeanDetector())
    np.save(tmp_path / "one.npy", np.eye(6))
    write_stats(tmp_path / "cut.npz", Stats.of(np.random.default_rng(0).standard_normal((9, 6))), "mean")
    truncate(tmp_path / "cut.npz")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    for name in ("one.npy", "cut.npz", "text.npz", "empty.npz"):
        with pytest.raises(UserError, match=r"is not a readable .npz"):
            read_reference(tmp_path / name, MeanDetector())


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats, path = Stats.of(np.random.default_rng(0).standard_normal((9, 6))), tmp_path / "reference.npz"
    write_stats(path, stats, "mean")
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        write_stats(path, stats, "mean")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="File exists"):
        write_stats(path / "inside.npz", stats, "mean")
