"""The evaluation stage: protocols as files, image files as their users wrote them, images that depend on their number alone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import Eye

from blockprune.cost.latency import weight_bytes
from blockprune.data import image_folder
from blockprune.data.image_files import as_stored, file_bytes, pixels
from blockprune.errors import UserError
from blockprune.measures.images import Judges
from blockprune.measures.score import Score
from blockprune.model import quantize, sampling
from blockprune.model.model import Model, load_model
from blockprune.model.sampling import Protocol
from blockprune.runs.directory import Claims, Run
from blockprune.runs.series import in_order
from blockprune.stages.evaluate.evaluator import Drawn, Evaluator, Seen
from blockprune.stages.evaluate.protocol import FREE, PROTOCOLS, Rules, Setting, grid, protocol_hash, read_protocol

JPEG = Rules(image="jpeg", resize=8)
TURNED = 0.1  # of the mean in grey levels: one pixel in ten turned by rounding
PROMPTS = ["a cat", "two dogs", "a kite", "one", "o"]


def test_protocols_of_the_package() -> None:
    assert {p.stem for p in PROTOCOLS.glob("*.toml")} == {"clean", "bksdm-coco30k"}
    paper = read_protocol("bksdm-coco30k")
    assert (paper.image, paper.jpeg_quality, paper.resize, paper.fid, paper.is_splits) == ("jpeg", 75, 256, "legacy_pytorch", 10)
    assert (paper.n_images, paper.steps, paper.cfg_scale, paper.scheduler, paper.resolution) == (30_000, 25, 7.5, "", "512")
    assert (paper.reference_folder, paper.n_reference, paper.cycle_prompts) == ("val2014", 40_504, False)
    clean = read_protocol("clean")
    assert (clean.image, clean.resize, clean.fid) == ("png", 0, "clean")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("imgae = 'png'", "unknown key 'imgae'"),
        ("image = 'gif'", "image must be png or jpeg: got 'gif'"),
        ("fid = 'tensorflow'", "fid must be clean or legacy_pytorch"),
        ("n_images = 0", "n_images must be at least 1"),
        ("n_images = 2.5", "n_images: expected int"),
        ("cycle_prompts = 1", "cycle_prompts: expected bool, got int"),
        ("steps = true", "steps: expected int"),
        ("measures = 'fid'", "measures: expected array, got str"),
        ("measures = ['fidd']", "unknown measure 'fidd'"),
        ("jpeg_quality = 0", "jpeg_quality is between"),
        ("image = ", "cannot read the protocol"),
    ],
)
def test_a_protocol_with_a_mistake_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_protocol(str(tmp_path / "mine.toml"))


def test_the_hash_is_over_what_changes_a_number() -> None:
    terms = {"n_images": 8, "seed": 0, **Rules().judged(), "detector": "d", "prompts": "p", "latent": [8, 8]}
    whole = protocol_hash(terms)
    assert all(protocol_hash(terms | {name: "other"}) != whole for name in terms)
    assert all(protocol_hash(terms | {name: "other"}) == whole for name in FREE)
    assert set(FREE) >= {"steps", "cfg_scale", "scheduler", "quantize", "checkpoint"}
    other = {"image": "jpeg", "resize": 8, "fid": "legacy_pytorch", "is_splits": 2}
    assert all(Rules(**{name: value}).judged() != Rules().judged() for name, value in other.items())
    assert Rules(jpeg_quality=20).judged() == Rules().judged()  # no JPEG, no quality
    assert replace(JPEG, jpeg_quality=20).judged() != JPEG.judged()


def test_a_grid_has_every_combination_once() -> None:
    settings = grid([5, 10, 5], [2.0, 2.5], ["", "ddim"], ["", "int8"], [None])
    assert len(settings) == len({s.slug for s in settings}) == 2 * 2 * 2 * 2
    assert settings[0] == Setting(5, 2.0)
    assert settings[-1].label == "CFG 2.5, 10 steps, ddim, int8"
    assert Setting(25, 7.5, checkpoint=500).slug == "step-500-cfg-7.5-25-steps"


def picture(width: int, height: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic")[0]
    return (smooth * 255).clamp(0, 255).to(torch.uint8)


def test_png_files_lose_nothing() -> None:
    image = picture(20, 12)
    assert torch.equal(pixels(file_bytes(image, Rules())), image)
    assert as_stored(image, Rules()) is image


def test_jpeg_files_are_those_of_the_published_script(tmp_path: Path) -> None:
    """Saved at full size, opened, resized without regard to aspect, saved again: with Pillow's own defaults, on disk."""
    image = picture(20, 12)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "512.jpg")
    Image.open(tmp_path / "512.jpg").resize((8, 8)).save(tmp_path / "256.jpg")
    assert file_bytes(image, JPEG) == (tmp_path / "256.jpg").read_bytes()
    real = image_folder.read_image(tmp_path / "512.jpg")
    assert torch.equal(as_stored(real, JPEG), image_folder.read_image(tmp_path / "256.jpg"))
    assert pixels(file_bytes(image, JPEG)).shape == (3, 8, 8)
    assert not torch.equal(pixels(file_bytes(image, replace(JPEG, resize=0))), image)


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Model:
    return load_model(str(tiny_folder("sd1")))


def looked(model: Model, batches: list[list[int]], files: dict[int, bytes], rules: Rules = JPEG) -> tuple[list[int], Any]:
    """The numbers of the images that were drawn, and what was seen of all."""
    evaluator = Evaluator(model, rules, PROMPTS, 3, Judges(Eye(), None, Eye()))
    drawn, seen = [], []
    for record in evaluator.look(Setting(2, 3.0), batches, files.get):
        if isinstance(record, Drawn):
            files[record.index] = record.file
            drawn.append(record.index)
        else:
            assert isinstance(record, Seen)
            seen.append(record.arrays)
    return drawn, in_order(seen)


def assert_same_images(files: dict[int, bytes], others: dict[int, bytes]) -> None:
    """Images drawn in other batches: rounding may turn a pixel by one grey level."""
    assert files.keys() == others.keys()
    for i, file in files.items():
        assert (pixels(file).int() - pixels(others[i]).int()).abs().max() <= 1, i


def test_an_image_depends_on_its_number_alone(model: Model) -> None:
    ways = [[[0], [1], [2], [3], [4]], [[0, 1, 2, 3], [4]], [[4, 1], [3], [0, 2]]]
    found = []
    for batches in ways:
        files: dict[int, bytes] = {}
        drawn, seen = looked(model, batches, files, Rules())
        assert drawn == [i for batch in batches for i in batch]
        found.append((files, seen))
    for files, seen in found[1:]:
        assert_same_images(files, found[0][0])
        for name in ("features", "probs", "image", "text"):
            np.testing.assert_allclose(seen[name], found[0][1][name], atol=TURNED, rtol=0)
    first = pixels(found[0][0][0]).int()
    assert all((first - pixels(file).int()).abs().max() > 1 for i, file in found[0][0].items() if i), "images differ by number"


def test_images_are_those_of_sampling_draw(model: Model) -> None:
    files: dict[int, bytes] = {}
    looked(model, [[0, 1, 2], [3, 4]], files, Rules())
    conditions = model.encode(PROMPTS)
    _, images = model.draw(Protocol(5, 2, 3.0, 3, (8, 8)), *conditions, range(5))
    assert all((pixels(files[i]).int() - images[i].int()).abs().max() <= 1 for i in range(5))


def test_what_is_on_disk_is_read_and_not_drawn(model: Model) -> None:
    files: dict[int, bytes] = {}
    _, whole = looked(model, [[0, 1, 2, 3, 4]], files, Rules())
    kept = {i: files[i] for i in (0, 3, 4)}
    kept[4] = kept[4][:40]  # a machine went down while this one was written
    drawn, seen = looked(model, [[0, 1], [2, 3, 4]], kept, Rules())
    assert drawn == [1, 2, 4]
    for name in whole:
        np.testing.assert_allclose(seen[name], whole[name], atol=TURNED, rtol=0)
    other = {0: file_bytes(picture(16, 16), Rules())}
    drawn, seen = looked(model, [[0]], other, Rules())
    assert drawn == []
    assert abs(seen["features"][0] - whole["features"][0]).max() > TURNED


def test_nothing_is_computed_for_what_is_there(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[int, bytes] = {}
    looked(model, [[0, 1], [2, 3]], files)
    sizes: list[int] = []
    real = sampling.denoise
    monkeypatch.setattr(sampling, "denoise", lambda *args: sizes.append(len(args[-1])) or real(*args))
    looked(model, [[0, 1], [2, 3]], files)
    assert sizes == []
    again = {i: files[i] for i in (0, 1, 3)}
    drawn, _ = looked(model, [[0, 1], [2, 3]], again)
    assert (sizes, drawn, again) == ([2], [2], files)  # as in the batch that it belongs to


def test_settings_draw_with_their_own_values(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Protocol] = []
    real = sampling.denoise
    monkeypatch.setattr(sampling, "denoise", lambda pipe, protocol, *args: asked.append(protocol) or real(pipe, protocol, *args))
    list(Evaluator(model, Rules(), PROMPTS, 3, Judges()).look(Setting(1, 4.5, "ddim"), [[0]], lambda i: None))
    assert asked == [Protocol(5, 1, 4.5, 3, (8, 8), "ddim")]
    assert sampling.scheduler_name(model.pipe) == "ddim"
    assert sampling.scheduler_name(model.pipe, "dpm++") == "dpm++"


def test_quantised_layers_are_smaller_and_the_rest_is_as_it_was(model: Model) -> None:
    small = quantize.quantized(model.network, "int8")
    linear = sum(m.weight.numel() for m in model.network.modules() if isinstance(m, torch.nn.Linear))
    saved = weight_bytes(model.network) - weight_bytes(small)
    assert 2 * linear < saved < 3 * linear  # 4 bytes become 1, and each row has a scale
    assert weight_bytes(model.network) == 4 * sum(p.numel() for p in model.network.parameters())
    assert torch.equal(small.conv_in.weight, model.network.conv_in.weight)
    with pytest.raises(UserError, match="unknown --quantize 'int4': choose from none, int8"):
        quantize.quantized(model.network, "int4")


def test_a_missing_torchao_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"pip install 'blockprune\[quantization\]'"):
        quantize.check_quantizer("int8")


TAKE = """
import sys
from pathlib import Path
from blockprune.runs.directory import Claims
claims = Claims(Path(sys.argv[1]))
print(claims.take(3, lambda: range(8)), flush=True)
sys.stdin.read()
"""


def test_claims_are_exclusive_and_die_with_their_holder(tmp_path: Path) -> None:
    file = tmp_path / "claims"
    command = [sys.executable, "-c", TAKE, str(file)]
    with Claims(file) as claims, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert json.loads(other.stdout.readline()) == [0, 1, 2]
        assert claims.take(2, lambda: range(8)) == [4, 5]  # 2 and 3 are one block, and 2 is taken
        assert claims.take(3, lambda: range(8)) == [3, 4, 5]
        assert claims.take(8, lambda: range(8)) == []
        other.kill()
        other.wait()
        assert claims.take(8, lambda: range(8)) == [0, 1, 2, 3, 4, 5, 6, 7]
        assert claims.take(3, lambda: [5, 7]) == [5]
        answers = iter([{0, 1, 4}, {4}, {4}])  # 0 and 1 were ended between question and lock
        assert claims.take(2, lambda: next(answers)) == [4]
        assert claims.take(9, lambda: []) == []


def test_a_shared_run_has_many_writers_and_no_other_kind(tmp_path: Path) -> None:
    with Run(tmp_path / "r", "evaluate", {"n": 1}, {}, shared=True) as first:
        with Run(tmp_path / "r", "evaluate", {"n": 1}, {}, shared=True) as second:
            rows = [{"kind": "score", "setting": s, **Score("0" * 12, "x", "fid", 1.0, 2, 0).to_json()} for s in ("a", "b")]
            first.append(rows[0])
            with second.alone():
                second.append(rows[1])
            assert first.rows() == rows
        with pytest.raises(UserError, match="another process"):
            Run(tmp_path / "r", "evaluate", {"n": 1}, {})
        with pytest.raises(UserError, match="n is 1 there, 2 asked"):
            Run(tmp_path / "r", "evaluate", {"n": 2}, {}, shared=True)
    with Run(tmp_path / "r", "evaluate", {"n": 1}, {}), pytest.raises(UserError, match="another process"):
        Run(tmp_path / "r", "evaluate", {"n": 1}, {}, shared=True)


def test_reference_statistics_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "real"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(picture(20, 12, i).permute(1, 2, 0).numpy()).save(folder / f"{i}.jpg")
    looks: list[int] = []

    class Counting(Eye):
        def __call__(self, images: torch.Tensor) -> np.ndarray:
            looks.append(len(images))
            return super().__call__(images)

    def stats(rules: Rules = JPEG) -> Any:
        looks.clear()
        return image_folder.cached_stats(
            image_folder.ImageFolder(folder), Counting(), rules.file, lambda image: as_stored(image, rules)
        )

    first, n = stats(), sum(looks)
    again = stats()
    assert (n, sum(looks)) == (5, 1)  # one look at a probe that tells the detector
    np.testing.assert_array_equal(first.mu, again.mu)
    want = Eye()(torch.stack([pixels(file_bytes(image_folder.read_image(folder / f"{i}.jpg"), Rules(resize=8))) for i in range(4)]))
    assert abs(first.mu - want.mean(0)).max() < 3
    os.utime(folder / "0.jpg", (1, 1))
    stats()
    assert sum(looks) == 5
    assert {f.name for f in dataclasses.fields(first)} >= {"mu", "sigma", "features"}
