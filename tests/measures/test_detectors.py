"""One conformance suite for all detectors, the CLIP scorer, and agreement with clean-fid on image files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import inception_pytorch
from cleanfid.features import build_feature_extractor
from cleanfid.fid import compute_fid, get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from stand_ins import StandInInception, save_clip, save_pytorch_fid, save_resnet
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)
from transformers.utils import logging

from blockprune.errors import UserError
from blockprune.measures import detectors, fid_kid
from blockprune.measures.detectors import (
    DETECTORS,
    INCEPTION_FILE,
    PYTORCH_FID_FILE,
    HubDetector,
    InceptionDetector,
    PytorchFidDetector,
    Scorer,
    load_detector,
    load_scorer,
)
from blockprune.stages.train.checkpoints import file_digest

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


def images(n: int, size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    logging.disable_progress_bar()
    torch.manual_seed(0)
    save_resnet(root / "classifier", [3, 4])
    save_clip(root / "clip")
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(dino).save_pretrained(root / "dino")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(root / "dino")
    stand_in = StandInInception()
    with torch.no_grad():
        stand_in.output.bias += torch.randn(1008)
    torch.jit.script(stand_in).save(str(root / INCEPTION_FILE))
    save_pytorch_fid(root / PYTORCH_FID_FILE)
    return {name: root / name for name in ("classifier", "clip", "dino", INCEPTION_FILE, PYTORCH_FID_FILE)}


@pytest.fixture(autouse=True)
def stand_in_is_published(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "INCEPTION_SHA256", file_digest(folders[INCEPTION_FILE]))


IMPLEMENTATIONS: dict[str, Callable[[dict[str, Path]], fid_kid.Detector]] = {
    "classifier": lambda f: load_detector(str(f["classifier"])),
    "clip": lambda f: load_detector(str(f["clip"])),
    "dino": lambda f: load_detector(str(f["dino"])),
    "inception": lambda f: load_detector("inception", weights=f[INCEPTION_FILE]),
    "pytorch-fid": lambda f: load_detector("pytorch-fid", weights=f[PYTORCH_FID_FILE]),
    "tiny-digits": lambda f: load_detector("tiny-digits"),
}
built_in = pytest.mark.skipif(not detectors.BUILT_IN.is_dir(), reason="the built-in model is not trained yet")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=built_in if k == "tiny-digits" else ()) for k in IMPLEMENTATIONS])
def test_every_detector_keeps_the_contract(kind: str, folders: dict[str, Path]) -> None:
    detector = IMPLEMENTATIONS[kind](folders)
    batch = images(5)
    before = batch.clone()
    found, probs = detector.features_and_probs(batch)
    assert detector.name == kind
    assert found.dtype == np.float32
    assert found.shape == (5, detector.n_features)
    assert np.isfinite(found).all()
    assert found.std(axis=0).max() > 0, "all images look the same to it"
    assert torch.equal(batch, before)
    np.testing.assert_allclose(detector(batch), found, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([detector(batch[:1]), detector(batch[1:])]), found, rtol=1e-4, atol=1e-5)
    if kind in ("clip", "dino"):
        assert probs is None
    else:
        assert probs is not None
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs.sum(axis=2), 1, rtol=1e-5)
        assert fid_kid.inception_score(probs) >= 1


def test_a_classifier_gives_its_pooled_features_and_padded_groups(folders: dict[str, Path]) -> None:
    model = ResNetForImageClassification.from_pretrained(folders["classifier"]).eval()
    x = (images(3).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        pooled, logits = model.resnet(x).pooler_output.flatten(1), model(x).logits
    detector = HubDetector(folders["classifier"])
    found, probs = detector.features_and_probs(images(3))
    assert not detector.model.base_model._forward_hooks
    np.testing.assert_allclose(found, pooled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probs[:, 0, :3], logits[:, :3].softmax(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(probs[:, 1], logits[:, 3:].softmax(1), rtol=1e-4, atol=1e-6)
    assert not probs[:, 0, 3].any()


def test_head_sizes_default_to_one_group_and_must_add_up(tmp_path: Path) -> None:
    save_resnet(tmp_path / "one")
    assert HubDetector(tmp_path / "one").features_and_probs(images(2))[1].shape == (2, 1, 7)
    save_resnet(tmp_path / "wrong", [3, 3])
    with pytest.raises(UserError, match=r"must add up to its 7 labels: got \[3, 3\]"):
        HubDetector(tmp_path / "wrong")


def test_a_clip_detector_gives_the_projected_embedding(folders: dict[str, Path]) -> None:
    found = HubDetector(folders["clip"])(images(4))
    np.testing.assert_allclose(
        found / np.linalg.norm(found, axis=1, keepdims=True), Scorer(folders["clip"]).image(images(4)), rtol=1e-5
    )


def test_detectors_refuse_float_images(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="NCHW uint8"):
        HubDetector(folders["dino"])(images(2).float())


def write_images(folder: Path, n: int, seed: int, sizes: tuple[int, ...] = (64,)) -> list[np.ndarray]:
    folder.mkdir()
    draw = np.random.default_rng(seed)
    arrays = [draw.integers(0, 256, (sizes[i % len(sizes)], 48, 3), dtype=np.uint8) // (1 + seed) for i in range(n)]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:03}.png")
    return arrays


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_inception_agrees_with_clean_fid_on_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """clean-fid reads, resizes and runs its own wrapper of the same weights; FID on 8 of the features, for speed."""
    detector = InceptionDetector(folders[INCEPTION_FILE])
    ours = [
        np.concatenate(
            [detector(torch.from_numpy(a).permute(2, 0, 1)[None]) for a in write_images(tmp_path / name, n, seed, (64, 50))]
        )
        for name, n, seed in (("a", 12, 0), ("b", 30, 1))
    ]
    theirs = InceptionV3W(str(folders[INCEPTION_FILE].parent), download=False)
    options = {"num_workers": 0, "batch_size": 8, "device": torch.device("cpu"), "verbose": False}
    np.testing.assert_allclose(ours[0], get_folder_features(str(tmp_path / "a"), theirs, **options), rtol=1e-4, atol=1e-5)
    score = compute_fid(
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        mode="clean",
        custom_feat_extractor=lambda x: theirs(x)[:, ::256],
        use_dataparallel=False,
        **options,
    )
    first, second = (x[:, ::256] for x in ours)
    assert fid_kid.fid(first, fid_kid.Stats.of(second)) == pytest.approx(score, rel=1e-4)


@pytest.mark.slow
def test_pytorch_fid_agrees_with_clean_fid_and_torch_fidelity_on_files(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are clean-fid's `legacy_pytorch`, the Inception Score is torch-fidelity's, from the same weights file."""
    file = folders[PYTORCH_FID_FILE]
    arrays = write_images(tmp_path / "a", 6, 0)
    detector = PytorchFidDetector(file)
    found, probs = detector.features_and_probs(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda url, progress: torch.load(file, weights_only=True))
    options = {"num_workers": 0, "batch_size": 8, "device": torch.device("cpu"), "verbose": False, "mode": "legacy_pytorch"}
    with warnings.catch_warnings(action="ignore"):  # clean-fid uses what torchvision deprecates, and changes the filters itself
        theirs = build_feature_extractor("legacy_pytorch", torch.device("cpu"), use_dataparallel=False)
        wanted = get_folder_features(str(tmp_path / "a"), theirs, **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    fidelity = FeatureExtractorInceptionV3("inception", ["logits_unbiased"], feature_extractor_weights_path=str(file))
    with torch.no_grad():
        logits = fidelity(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))[0]
    np.testing.assert_allclose(probs[:, 0], logits.softmax(1), rtol=1e-3, atol=1e-6)
    wanted_is = isc_features_to_metric(logits, splits=3)["inception_score_mean"]
    assert wanted_is > 1.005
    assert fid_kid.inception_score(probs, 3) == pytest.approx(wanted_is, rel=1e-4)


def test_pytorch_fid_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors.torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"pt_inception-2015-12-05-6726825d.pth.*download https://github.*--inception-weights PATH"):
        load_detector("pytorch-fid")
    (tmp_path / "half.pth").write_bytes(b"half a file")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    for name in ("half.pth", "other.pth"):
        with pytest.raises(UserError, match=r"is not a whole pt_inception-2015-12-05-6726825d.pth: fetch it again"):
            load_detector("pytorch-fid", weights=tmp_path / name)


def test_inception_probabilities_leave_out_the_bias(folders: dict[str, Path]) -> None:
    model = torch.jit.load(str(folders[INCEPTION_FILE]))
    batch = images(2, 299)
    with torch.no_grad():
        wanted, biased = model(batch.float(), no_output_bias=True), model(batch.float())
    probs = InceptionDetector(folders[INCEPTION_FILE]).features_and_probs(batch)[1]
    assert probs.shape == (2, 1, 1008)
    np.testing.assert_allclose(probs[:, 0], wanted, rtol=1e-4)
    assert not np.allclose(probs[:, 0], biased, rtol=1e-2)


def test_missing_inception_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"inception-2015-12-05.pt.*download https://nvlabs.*--inception-weights PATH") as caught:
        DETECTORS["inception"]("cpu", tmp_path / "absent.pt")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(detectors, "INCEPTION_FILE", "not-there.pt")
    with pytest.raises(UserError, match="--inception-weights PATH"):
        load_detector("inception")


def test_broken_inception_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / INCEPTION_FILE).write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"is not the inception-2015-12-05.pt that is published .*: fetch it again"):
        load_detector("inception", weights=tmp_path / INCEPTION_FILE)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / INCEPTION_FILE))
    with pytest.raises(UserError, match="is not the"):
        load_detector("inception", weights=tmp_path / INCEPTION_FILE)


@pytest.mark.parametrize("name", ["nonsense", "nobody/nothing-here", "some/deep/path"])
@pytest.mark.parametrize("load", [load_detector, load_scorer], ids=["detector", "scorer"])
def test_a_model_that_is_not_to_be_had_is_one_line(load: Callable[[str], object], name: str) -> None:
    with pytest.raises(UserError, match=f"no model '{name}'") as caught:
        load(name)
    assert "\n" not in str(caught.value)
    # the hub is asked for owner/name alone: a misspelt detector must not wait for the network
    assert ("hf download" in str(caught.value)) == (name == "nobody/nothing-here")


def test_incomplete_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the config"):
        load_detector(str(tmp_path))
    save_resnet(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="cannot read the preprocessor_config"):
        load_detector(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read the weights"):
        load_detector(str(tmp_path))
    # transformers would make the classifier up, with no more than a warning
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["ResNetForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"incomplete .2 missing, such as classifier"):
        load_detector(str(tmp_path))


@pytest.mark.parametrize("name", ["clip", pytest.param("tiny-digits", marks=built_in)])
def test_a_scorer_puts_images_and_prompts_in_one_space(name: str, folders: dict[str, Path]) -> None:
    scorer = load_scorer("tiny-digits" if name == "tiny-digits" else str(folders[name]))
    prompts = ["a 3 and 5", "7", "word " * 40]
    seen, read = scorer.image(images(3)), scorer.text(prompts)
    assert scorer.name == name
    assert seen.shape == read.shape
    assert seen.dtype == read.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(read, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([scorer.text([p]) for p in prompts]), read, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([scorer.image(images(3)[i : i + 1]) for i in range(3)]), seen, rtol=1e-4, atol=1e-6)
    assert not np.allclose(read[0], read[1])


def test_scorer_equals_the_clip_models_own_logits(folders: dict[str, Path]) -> None:
    model = CLIPModel.from_pretrained(folders["clip"]).eval()
    pixels = CLIPImageProcessor.from_pretrained(folders["clip"])(images=images(3), return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(folders["clip"])(["one 1", "two", "34"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = (model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()).diagonal()
    scorer = load_scorer(str(folders["clip"]))
    np.testing.assert_allclose(fid_kid.clip_score(scorer.image(images(3)), scorer.text(["one 1", "two", "34"])), wanted, atol=1e-5)


def test_a_scorer_must_be_clip(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"a scorer is a CLIP model.*'dinov2'"):
        load_scorer(str(folders["dino"]))


def test_loading_leaves_progress_bars_as_they_were(folders: dict[str, Path]) -> None:
    logging.enable_progress_bar()
    HubDetector(folders["dino"])
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    HubDetector(folders["dino"])
    assert not logging.is_progress_bar_enabled()
