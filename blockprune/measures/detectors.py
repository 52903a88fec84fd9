"""Detectors and scorers: images and prompts in, features out. A detector is any `metrics.Detector`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockprune.assets import ASSETS
from blockprune.errors import UserError, first_line
from blockprune.measures.fid_kid import Detector

Features = NDArray[np.float32]

BUILT_IN = ASSETS / "models" / "tiny-digits"
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
MAX_INCEPTION_BYTES = 2**28
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
PYTORCH_FID_FILE = "pt_inception-2015-12-05-6726825d.pth"
PYTORCH_FID_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PYTORCH_FID_FILE}"
INCEPTION_SIDE = 299


class HubDetector:
    """The pooled output of a transformers image model, flattened; images are prepared as its image processor says.

    A CLIP-like model gives its projected image embedding. A classifier also gives probabilities: one group of labels, or
    several where its config lists their widths as `head_sizes` (the softmax of each, padded with 0 to the widest).
    UserError when the model is not to be had, incomplete, or has no pooled output.
    """

    unused = ""  # what the names of weights begin with that a checkpoint may lack

    def __init__(self, source: str | Path, device: str = "cpu", name: str | None = None) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

        self.name = name or (Path(source).resolve().name if Path(source).is_dir() else str(source))
        self.device = device
        classifies = any("ForImageClassification" in a for a in _config(source).architectures or ())
        self.model = _load_model(AutoModelForImageClassification if classifies else AutoModel, source, device, self.unused)
        self.processor = _load(AutoImageProcessor, source, "preprocessor_config.json")
        config = self.model.config
        self.head_sizes: list[int] = list(getattr(config, "head_sizes", [])) or [config.num_labels]
        if classifies and sum(self.head_sizes) != config.num_labels:
            raise UserError(
                f"head_sizes of {str(source)!r} must add up to its {config.num_labels} labels: "
                f"got {self.head_sizes}; mend its config.json"
            )
        size = getattr(getattr(config, "vision_config", config), "image_size", 64)
        side = size if isinstance(size, int) else max(size)
        self.n_features = self(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]

    def __call__(self, images: torch.Tensor) -> Features:
        return self.features_and_probs(images)[0]

    @torch.inference_mode()
    def features_and_probs(self, images: torch.Tensor) -> tuple[Features, Features | None]:
        pixels = _prepare(self.processor, images, self.device)
        if hasattr(self.model, "get_image_features"):
            return _array(_pooled(self.model.get_image_features(pixel_values=pixels), self.name)), None
        taken: list[Any] = []
        handle = self.model.base_model.register_forward_hook(lambda module, args, output: taken.append(output))
        try:
            output = self.model(pixel_values=pixels)
        finally:
            handle.remove()
        features = _array(_pooled(taken[0], self.name))
        if not hasattr(output, "logits"):
            return features, None
        heads = [head.softmax(1) for head in output.logits.float().split(self.head_sizes, dim=1)]
        width = max(self.head_sizes)
        padded = [torch.nn.functional.pad(head, (0, width - head.shape[1])) for head in heads]
        return features, _array(torch.stack(padded, dim=1), flat=False)


class Vision(HubDetector):
    """Embeddings of length 1: of the CLS token where the model has one, as DINO's are compared, else its pooled output."""

    unused = "pooler."

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> Features:
        if not any(name.endswith("cls_token") for name, _ in self.model.named_parameters()):
            return _unit(torch.from_numpy(super().__call__(images)))
        pixels = _prepare(self.processor, images, self.device)
        return _unit(self.model.base_model(pixel_values=pixels).last_hidden_state[:, 0])


class InceptionDetector:
    """clean-fid's Inception-v3: 2048 pooled features of images resized in its clean mode (bicubic, antialiased, 299 x 299).

    Probabilities are the softmax over 1008 classes without the bias of the last layer, as Inception Score has always
    been computed. UserError when the file is another than the published one: TorchScript is a program, and loading it runs it.
    """

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        from cleanfid.resize import build_resizer

        self.name, self.device = "inception", device
        with warnings.catch_warnings():
            # TorchScript is deprecated, but these weights exist in no other form
            warnings.simplefilter("ignore", FutureWarning)
            self.model = torch.jit.load(_published_inception(weights), map_location=device).eval()
        self.head = dict(self.model.named_parameters())["output.weight"]
        self.n_features = self.head.shape[1]
        self.resize: Callable[[NDArray[np.uint8]], Features] = build_resizer("clean")

    def __call__(self, images: torch.Tensor) -> Features:
        return self.features_and_probs(images)[0]

    @torch.inference_mode()
    def features_and_probs(self, images: torch.Tensor) -> tuple[Features, Features | None]:
        resized = np.stack([self.resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()])
        x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        features = self.model.layers((x - 128) / 128).reshape(len(x), self.n_features)
        probs = (features @ self.head.T).softmax(1)
        return _array(features), _array(probs[:, None], flat=False)


class PytorchFidDetector:
    """The Inception-v3 of the pytorch-fid package, clean-fid's `legacy_pytorch`: torch's bilinear resizing without antialiasing.

    Probabilities are torch-fidelity's: the same weights on images resized as TensorFlow 1 did, softmax without the last bias.
    UserError when the file cannot be loaded.
    """

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        self.name, self.device = "pytorch-fid", device
        net = _fid_inception()
        try:
            net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{str(weights)!r} is not a whole {PYTORCH_FID_FILE}: fetch it again from {PYTORCH_FID_URL}") from error
        self.head = net.fc.weight.detach().to(device)
        net.fc = torch.nn.Identity()
        self.model = net.to(device).eval().requires_grad_(False)
        self.n_features = self.head.shape[1]

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> Features:
        side = (INCEPTION_SIDE, INCEPTION_SIDE)
        x = torch.nn.functional.interpolate(images.to(self.device).float(), size=side, mode="bilinear", align_corners=False)
        return _array(self.model(2 * (x.clamp(0, 255) / 255) - 1))

    @torch.inference_mode()
    def features_and_probs(self, images: torch.Tensor) -> tuple[Features, Features | None]:
        resized = _resize_as_tensorflow(images.to(self.device).float(), INCEPTION_SIDE)
        probs = (self.model((resized - 128) / 128) @ self.head.T).softmax(1)
        return self(images), _array(probs[:, None], flat=False)


def _fid_inception() -> Any:
    """torchvision's Inception-v3 with the blocks of the FID network, without weights."""
    import torchvision
    from cleanfid import inception_pytorch as fid

    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    blocks = {"5b": fid.FIDInceptionA(192, 32), "5c": fid.FIDInceptionA(256, 64), "5d": fid.FIDInceptionA(288, 64)}
    blocks |= {f"6{name}": fid.FIDInceptionC(768, width) for name, width in zip("bcde", (128, 160, 160, 192), strict=True)}
    blocks |= {"7b": fid.FIDInceptionE_1(1280), "7c": fid.FIDInceptionE_2(2048)}
    for name, block in blocks.items():
        setattr(net, f"Mixed_{name}", block)
    return net


def _resize_as_tensorflow(x: torch.Tensor, side: int) -> torch.Tensor:
    """NCHW float resized bilinearly as TensorFlow 1 does: output pixel i lies at i * size / side of the input, without the half."""
    for dim in (3, 2):
        size = x.shape[dim]
        at = torch.arange(side, device=x.device) * torch.tensor(size / side, dtype=torch.float32)
        low = at.long()
        shape = [-1 if d == dim else 1 for d in range(4)]
        first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1))
        x = first + (second - first) * (at - low).view(shape)
    return x


def _published_inception(path: Path) -> io.BytesIO:
    """The bytes of the Inception file that NVIDIA publishes; UserError for any others."""
    try:
        data = path.read_bytes() if path.stat().st_size < MAX_INCEPTION_BYTES else b""
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}; fetch it again from {INCEPTION_URL}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != INCEPTION_SHA256:
        raise UserError(
            f"{str(path)!r} is not the {INCEPTION_FILE} that is published (SHA-256 {INCEPTION_SHA256}), and as it holds code "
            f"no other is run: fetch it again from {INCEPTION_URL}"
        )
    return io.BytesIO(data)


def inception_weights(path: Path | None = None) -> Path:
    """The Inception-v3 file: `path`, or else where clean-fid keeps it. Downloads nothing; UserError when there is none."""
    cached = Path("./" if os.name == "nt" else "/tmp") / INCEPTION_FILE
    return _weights_file("inception", path or cached, INCEPTION_FILE, INCEPTION_URL)


def pytorch_fid_weights(path: Path | None = None) -> Path:
    """pytorch-fid's file: `path`, or else where torch's hub keeps it. Downloads nothing; UserError when there is none."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / PYTORCH_FID_FILE
    return _weights_file("pytorch-fid", path or cached, PYTORCH_FID_FILE, PYTORCH_FID_URL)


def _weights_file(detector: str, wanted: Path, name: str, url: str) -> Path:
    if not wanted.is_file():
        raise UserError(
            f"the {detector} detector needs {name}, not found at {str(wanted)!r}: "
            f"download {url} and give it with --inception-weights PATH"
        )
    return wanted


# name => factory(device, Inception weights or None for the usual cache)
DETECTORS: dict[str, Callable[[str, Path | None], Detector]] = {
    "tiny-digits": lambda device, weights: HubDetector(BUILT_IN / "detector", device, "tiny-digits"),
    "inception": lambda device, weights: InceptionDetector(inception_weights(weights), device),
    "pytorch-fid": lambda device, weights: PytorchFidDetector(pytorch_fid_weights(weights), device),
}


def load_detector(name: str, device: str = "cpu", weights: Path | None = None) -> Detector:
    """The detector of that name in DETECTORS, else of a local folder or hub id in transformers layout. UserError if none."""
    return DETECTORS[name](device, weights) if name in DETECTORS else HubDetector(name, device)


class Scorer:
    """A CLIP model: L2-normalised embeddings of images and prompts in one space. A prompt past its length is cut there."""

    def __init__(self, source: str | Path, device: str = "cpu", name: str | None = None) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if _config(source).model_type != "clip":
            raise UserError(f"a scorer is a CLIP model: {str(source)!r} is {_config(source).model_type!r}; choose another")
        self.name = name or (Path(source).resolve().name if Path(source).is_dir() else str(source))
        self.device = device
        self.model = _load_model(CLIPModel, source, device)
        self.processor = _load(AutoImageProcessor, source, "preprocessor_config.json")
        self.tokenizer = _load(AutoTokenizer, source, "tokenizer files")

    @torch.inference_mode()
    def image(self, images: torch.Tensor) -> Features:
        """NCHW uint8 => (N, D) float32 of length 1."""
        pixels = _prepare(self.processor, images, self.device)
        return _unit(_pooled(self.model.get_image_features(pixel_values=pixels), self.name))

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> Features:
        """N prompts => (N, D) float32 of length 1."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(
            self.device
        )
        output = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return _unit(_pooled(output, self.name))


def load_vision(source: str, device: str = "cpu") -> Vision:
    """The built-in detector's features, or a vision model from a local folder or hub id. UserError when it is not to be had."""
    return Vision(BUILT_IN / "detector", device, source) if source == "tiny-digits" else Vision(source, device)


def load_scorer(source: str = "tiny-digits", device: str = "cpu") -> Scorer:
    """The built-in scorer, or a CLIP model from a local folder or hub id. UserError when it is not to be had."""
    return Scorer(BUILT_IN / "scorer", device, source) if source == "tiny-digits" else Scorer(source, device)


def _prepare(processor: Any, images: torch.Tensor, device: str) -> torch.Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be NCHW uint8 with 3 channels: got {tuple(images.shape)} {images.dtype}")
    pixels = processor(images=images.cpu(), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    return torch.as_tensor(pixels).to(device)


def _pooled(output: Any, name: str) -> torch.Tensor:
    # get_image_features gave a tensor in transformers 4 and an output object since 5
    pooled = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
    if pooled is None:
        raise UserError(f"{name!r} has no pooled image output: choose a model that has one, such as facebook/dinov2-base")
    return torch.as_tensor(pooled)


def _array(x: torch.Tensor, flat: bool = True) -> Features:
    return np.asarray((x.flatten(1) if flat else x).float().cpu().numpy())


def _unit(x: torch.Tensor) -> Features:
    return _array(torch.nn.functional.normalize(x.float(), dim=-1))


def _config(source: str | Path) -> Any:
    from transformers import AutoConfig

    return _load(AutoConfig, source, "config.json")


def _load_model(auto: Any, source: str | Path, device: str, unused: str = "") -> Any:
    model, info = _load(auto, source, "weights", output_loading_info=True)
    # transformers fills what a checkpoint lacks with random weights and only warns
    lacking = sorted({*info["missing_keys"], *(str(k) for k in info["mismatched_keys"])})
    lacking = [name for name in lacking if not unused or not name.startswith(unused)]
    if lacking:
        raise UserError(
            f"the weights of {str(source)!r} are incomplete ({len(lacking)} missing, such as {lacking[0]}): fetch it again"
        )
    return model.to(device).eval().requires_grad_(False)


def _load(auto: Any, source: str | Path, what: str, **kwargs: Any) -> Any:
    """`auto.from_pretrained`: what is on this machine first, then the hub; UserError when neither has it."""
    from safetensors import SafetensorError

    from blockprune.model.pretrained import silence

    failures = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError, pickle.UnpicklingError)
    local = Path(source).is_dir()
    with silence():
        try:
            return auto.from_pretrained(str(source), local_files_only=True, trust_remote_code=False, **kwargs)
        except failures as error:
            if local:
                raise UserError(f"cannot read the {what} of the model in {str(source)!r}: {first_line(error)}") from error
            if str(source).count("/") != 1:
                raise UserError(
                    f"no model {str(source)!r}: give a local folder, a hub id such as facebook/dinov2-base, "
                    f"or for a detector one of {', '.join(DETECTORS)}"
                ) from error
        try:
            return auto.from_pretrained(str(source), trust_remote_code=False, **kwargs)
        except failures as error:
            raise UserError(
                f"no model {str(source)!r}: neither a folder, nor downloaded before, nor to be had from the hub now; "
                f"fetch it with `hf download {source}` or give a local folder ({first_line(error)})"
            ) from error
