"""Files from outside bring data, never a program: nothing in them runs, whatever command reads them."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import StandInInception, save_clip, save_resnet

import blockprune
from blockprune.data.image_folder import read_reference
from blockprune.errors import UserError
from blockprune.export.model_card import model_card
from blockprune.measures import detectors
from blockprune.measures.detectors import HubDetector, InceptionDetector, PytorchFidDetector, Scorer, load_detector
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.stages.train.checkpoints import file_digest

Folder = Callable[[str], Path]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A path that only code out of a file makes."""
    path = tmp_path / "something ran"
    yield path
    assert not path.exists()


@pytest.fixture
def model(tiny_folder: Folder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("sd1"), tmp_path / "model"))


def write_module(folder: Path, name: str, mark: Path) -> None:
    """A Python file that makes the mark as soon as it is imported."""
    (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil:\n    pass\n")


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_of_a_model_are_not_opened(part: str, model: Path, mark: Path) -> None:
    stem = pretrained.WEIGHTS[part]
    pickled = "pytorch_model.bin" if part == "text_encoder" else f"{stem}.bin"
    torch.save({"x": Bomb(mark)}, model / part / pickled)
    assert pretrained.load(str(model)) is not None
    (model / part / f"{stem}.safetensors").unlink()
    with pytest.raises(UserError, match=r"pickled \.bin files are not read"):
        pretrained.load(str(model))


@pytest.mark.parametrize("part", ["safety_checker", "image_encoder"])
def test_pickled_weights_of_parts_that_are_not_needed_are_not_opened(part: str, model: Path, mark: Path) -> None:
    (model / part).mkdir()
    torch.save({"x": Bomb(mark)}, model / part / "pytorch_model.bin")
    (model / part / "config.json").write_text('{"model_type": "clip"}')
    edit(model / "model_index.json", **{part: ["transformers", "CLIPVisionModelWithProjection"]})
    read_or_refuse(lambda: pretrained.load(str(model)))


def read_or_refuse(read: Callable[[], object]) -> None:
    """What is read is read, or refused in one line."""
    refusal = ""
    try:
        read()
    except UserError as err:
        refusal = str(err)
    assert "\n" not in refusal


@pytest.mark.parametrize("load", [HubDetector, Scorer], ids=["detector", "scorer"])
def test_pickled_weights_of_a_judge_run_nothing(load: Callable[[Path], object], tmp_path: Path, mark: Path) -> None:
    (save_clip if load is Scorer else save_resnet)(tmp_path / "judge")
    torch.save({"x": Bomb(mark)}, tmp_path / "judge" / "pytorch_model.bin")
    assert load(tmp_path / "judge") is not None
    (tmp_path / "judge" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot read the weights") as caught:
        load(tmp_path / "judge")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_pickle_of_pytorch_fid_runs_nothing(legacy: bool, tmp_path: Path, mark: Path) -> None:
    torch.save({"fc.weight": Bomb(mark)}, tmp_path / "weights.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="is not a whole pt_inception"):
        PytorchFidDetector(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["mu", "detector", "n", "features", "other"])
def test_statistics_with_objects_run_nothing(name: str, tmp_path: Path, mark: Path) -> None:
    arrays = {"mu": np.zeros(16), "sigma": np.eye(16), name: np.array([Bomb(mark)], dtype=object)}
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(UserError, match=r"is not a readable \.npz"):
        read_reference(tmp_path / "stats.npz", load_detector("tiny-digits"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model_index.json", {"_class_name": ["evil", "Evil"]}),
        ("model_index.json", {"_class_name": "evil"}),
        ("model_index.json", {"scheduler": ["evil", "Evil"]}),
        ("model_index.json", {"tokenizer": ["evil", "Evil"]}),
        ("model_index.json", {"unet": ["evil", "Evil"]}),
        ("model_index.json", {"safety_checker": ["evil", "Evil"]}),
        ("model_index.json", {"extra": ["evil", "Evil"]}),
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("vae/config.json", {"_class_name": "Evil", "auto_map": {"AutoModel": "evil.Evil"}}),
        ("text_encoder/config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}),
        ("scheduler/scheduler_config.json", {"_class_name": "Evil", "auto_map": {"AutoModel": "evil.Evil"}}),
    ],
)
def test_code_beside_a_model_runs_nowhere(name: str, change: dict[str, object], model: Path, mark: Path) -> None:
    for folder in (model, *(path for path in model.iterdir() if path.is_dir())):
        for module in ("evil", "None", "pipeline", "modeling_evil"):
            write_module(folder, module, mark)
    edit(model / name, **change)
    read_or_refuse(lambda: pretrained.configs(str(model)))
    read_or_refuse(lambda: pretrained.load(str(model)))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("load", [HubDetector, Scorer], ids=["detector", "scorer"])
def test_code_beside_a_judge_runs_nowhere(load: Callable[[Path], object], known: bool, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "judge"
    (save_clip if load is Scorer else save_resnet)(folder)
    write_module(folder, "evil", mark)
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor", "AutoTokenizer")
    auto_map = {"auto_map": dict.fromkeys(classes, "evil.Evil")}
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            edit(folder / name, **auto_map, **({} if known else {"model_type": "evil", "image_processor_type": "Evil"}))
    if known:
        assert load(folder) is not None
    else:
        with pytest.raises(UserError, match="cannot read the config") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


class Writing(torch.nn.Module):
    """A part of a TorchScript file that makes a file as it is loaded."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.mark, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.mark = state[0]
        self.training = state[1] and torch.from_file(self.mark, shared=True, size=1).numel() == 0


@pytest.fixture
def inception(tmp_path: Path, mark: Path) -> Path:
    """An Inception file that runs something when TorchScript loads it."""
    file = tmp_path / "inception-2015-12-05.pt"
    with warnings.catch_warnings(action="ignore"):
        whole = StandInInception()
        whole.extra = Writing(str(mark))
        torch.jit.script(whole).save(str(file))
    return file


def test_no_other_inception_than_the_published_one_is_run(inception: Path, mark: Path) -> None:
    with pytest.raises(UserError, match=r"is not the inception-2015-12-05\.pt that is published .* holds code") as caught:
        InceptionDetector(inception)
    assert "\n" not in str(caught.value)


def test_such_an_inception_would_run(inception: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "INCEPTION_SHA256", file_digest(inception))
    assert InceptionDetector(inception).n_features == 2048
    mark.unlink()


def test_a_card_holds_no_markup_from_outside() -> None:
    hostile = "x <script>alert(1)</script> | [click](javascript:alert(1)) ![i](http://a/b.png) `code` *b* & \n# title"
    card = {"title": hostile, "teacher": hostile, "license": hostile, "data": hostile, "scores": {hostile: {hostile: 1.0}}}
    _, front, body = model_card(Architecture(), "StableDiffusionPipeline", hostile, card).split("---\n", 2)
    assert json.loads(front.split("license: ")[1].split("\n")[0]) == hostile
    assert "<script" not in body and "\n# title" not in body
    assert not re.search(r"(?<!\\)[\[\]`*](?=click|i\]|code|b\*|\(javascript|\(http)", body)


FORBIDDEN = {"eval", "exec", "__import__", "importlib.import_module"}


def test_the_package_has_no_call_that_runs_what_a_file_says() -> None:
    """Each way to do so is one call; those that are there name the argument that makes them safe, or their file is checked."""
    for path in Path(blockprune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno} {name}"
            assert name not in FORBIDDEN, where
            assert name.split(".")[0] not in ("pickle", "yaml", "joblib", "shelve", "marshal", "dill"), where
            assert name != "torch.load" or given.get("weights_only") == "True", where
            assert name not in ("np.load", "numpy.load") or given.get("allow_pickle") == "False", where
            assert name != "torch.jit.load" or ast.unparse(node.args[0]).startswith("_published_"), where
            assert given.get("trust_remote_code", "False") == "False", where
            assert not name.endswith((".extractall", ".extract")), where
