"""Judges of images that a test makes: small, with random weights, of the real ones' form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from blockprune.measures import detectors


class StandInInception(torch.nn.Module):
    """The call signature of the real TorchScript file: `layers` on (-1, 1) images to 2048 features, `output` to 1008."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 23, 23), torch.nn.LeakyReLU(), torch.nn.AdaptiveMaxPool2d(8))
        self.output = torch.nn.Linear(2048, 1008)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        # fed with images that are 299 x 299 already
        x = self.layers((img - 128) / 128).reshape(-1, 2048)
        if return_features:
            return x
        if no_output_bias:
            return torch.nn.functional.linear(x, self.output.weight).softmax(1)
        return self.output(x).softmax(1)


def save_clip(folder: Path) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
        "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1,
        "pad_token_id": len(words) - 1,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=20).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def save_resnet(folder: Path, head_sizes: list[int] | None = None) -> ResNetForImageClassification:
    extra = {} if head_sizes is None else {"head_sizes": head_sizes}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7, **extra)
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return model


def save_pytorch_fid(file: Path) -> None:
    """Random weights, scaled so that images still differ after 48 convolutions, in the form of the real file."""
    torch.manual_seed(0)  # another seed may give all images one class
    net = detectors._fid_inception()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 4:
                torch.nn.init.kaiming_normal_(p)
            elif name.startswith("fc"):
                p.normal_(std=2.0)
    torch.save(net.state_dict(), file)


class Eye:
    """A detector and scorer of mean colours; its two classes are dark and bright."""

    name, n_features = "eye", 3

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        return images.float().mean((2, 3)).numpy()

    def features_and_probs(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        bright = images.float().mean((1, 2, 3)).numpy() / 255
        return self(images), np.stack([1 - bright, bright], axis=1)[:, None]

    image = __call__

    def text(self, prompts: list[str]) -> np.ndarray:
        return np.array([[len(p), 1.0, p.count("o")] for p in prompts], dtype=np.float32)
