"""Laws of the digit scenes, and that tiny-digits lies in its folder as diffusers and transformers expect."""

from pathlib import Path

import numpy as np
import pytest
import torch

from blockprune.data.digits import EMPTY, SCENE_PX, VOCABULARY, DigitScenes, Labels, caption, exchanged, source_digits
from blockprune.measures.detectors import BUILT_IN

SPLITS = ("train", "held-out")


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_on_split_seed_and_index_only(split: str) -> None:
    few, many = DigitScenes(split, 3, 5), DigitScenes(split, 3, 50)
    assert len(few) == 5
    for index in (4, 0, 2):
        image, text, labels = few[index]
        again, same_text, same_labels = many[index]
        np.testing.assert_array_equal(image, again)
        assert (text, labels) == (same_text, same_labels)
    assert not np.array_equal(few[0][0], DigitScenes(split, 4, 5)[0][0])


def test_splits_and_parts_share_no_source_digit() -> None:
    pools = [np.concatenate(DigitScenes(split, 0, 1).pools()) for split in SPLITS]
    assert [len(pool) for pool in pools] == [1297, 500]
    assert sorted(np.concatenate(pools)) == list(range(1797))
    halves = [np.concatenate(DigitScenes("held-out", 0, 1, (k, 2)).pools()) for k in range(2)]
    assert sorted(np.concatenate(halves)) == sorted(pools[1])


def test_pools_hold_their_digit() -> None:
    _, target, _ = source_digits()
    for digit, pool in enumerate(DigitScenes("train", 0, 1).pools()):
        assert set(target[pool]) == {digit}


def test_captions_say_what_the_labels_say() -> None:
    for _, text, labels in DigitScenes("held-out", 0, 100):
        assert caption(labels) == text
        assert set(text.replace(":", " :").replace(",", " ,").split()) <= set(VOCABULARY)


def test_caption_in_words() -> None:
    labels = Labels((3, EMPTY, EMPTY, 7), slant=0, weight=2)
    assert caption(labels) == "bold leaning left: three top left, seven bottom right"


def test_one_digit_is_exchanged_for_another() -> None:
    cells = set()
    for i, (_, _, labels) in enumerate(DigitScenes("held-out", 0, 100)):
        other, cell = exchanged(labels, i)
        assert exchanged(labels, i) == (other, cell)
        changed = [k for k in range(4) if labels.digits[k] != other.digits[k]]
        assert changed == [cell]
        assert EMPTY not in (labels.digits[cell], other.digits[cell])
        assert (other.slant, other.weight) == (labels.slant, labels.weight)
        cells.add(cell)
    assert cells == {0, 1, 2, 3}


def test_ink_is_where_the_labels_say() -> None:
    for image, _, labels in DigitScenes("train", 1, 100):
        assert image.shape == (SCENE_PX, SCENE_PX, 3) and image.dtype == np.uint8
        ink = (255 - image[:, :, 0].astype(int)).reshape(2, 16, 2, 16).max(axis=(1, 3)).ravel()
        assert [value > 0 for value in ink] == [digit != EMPTY for digit in labels.digits]


def test_weight_and_slant_show() -> None:
    ink: dict[tuple[str, int], list[float]] = {}
    for image, _, labels in DigitScenes("train", 2, 300):
        dark = 255 - image[:, :, 0].astype(float)
        n_digits = 4 - labels.digits.count(EMPTY)
        ink.setdefault(("weight", labels.weight), []).append(dark.sum() / n_digits)
        cells = dark.reshape(2, 16, 2, 16).transpose(0, 2, 1, 3).reshape(4, 16, 16)
        y, x = np.mgrid[-7.5:8, -7.5:8]
        lean = [np.cov(x.ravel(), y.ravel(), aweights=cell.ravel())[0, 1] for cell in cells if cell.any()]
        ink.setdefault(("slant", labels.slant), []).append(float(np.mean(lean)))
    weights = [np.mean(ink["weight", k]) for k in range(3)]
    slants = [np.mean(ink["slant", k]) for k in range(3)]
    assert weights == sorted(weights)
    assert slants == sorted(slants, reverse=True)


def test_bad_labels_and_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one digit"):
        Labels((EMPTY,) * 4, 0, 0)
    with pytest.raises(ValueError, match="train"):
        DigitScenes("test", 0, 1)
    with pytest.raises(IndexError):
        DigitScenes("train", 0, 1)[1]


def test_the_folder_is_small_and_complete() -> None:
    assert sum(path.stat().st_size for path in BUILT_IN.rglob("*") if path.is_file()) <= 8e6
    reference = np.load(BUILT_IN / "reference.npz")
    n, width = reference["features"].shape
    assert reference["mu"].shape == (width,) and reference["sigma"].shape == (width, width) and reference["n"] == n
    np.testing.assert_allclose(reference["mu"], reference["features"].astype(float).mean(axis=0), atol=1e-3)
    prompts = (BUILT_IN / "prompts.txt").read_text().splitlines()
    assert prompts == [text for _, text, _ in DigitScenes("held-out", 13, 512)]


@pytest.mark.filterwarnings("ignore")
def test_stock_diffusers_draws_with_it() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(BUILT_IN)
    pipeline.set_progress_bar_config(disable=True)
    for word in VOCABULARY:
        assert len(pipeline.tokenizer(word).input_ids) == 3
    assert {value.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for value in part.parameters()} == {
        torch.float32
    }
    text = "bold upright: three top left"
    images = pipeline([text] * 2, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (2, SCENE_PX, SCENE_PX, 3)
    assert Path(pipeline.config._name_or_path) == BUILT_IN
