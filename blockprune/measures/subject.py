"""How near drawn images are to a subject's own, and to their prompts: DINO, CLIP-I and CLIP-T of arXiv 2208.12242."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blockprune.measures.detectors import Features, Scorer, Vision


@dataclass(frozen=True)
class Subject:
    """A subject by its own images, NCHW uint8 each, the word that names it, and who compares; either may be missing.

    An image's nearness is its mean cosine to the subject's images. Its prompt is compared without the word, which no CLIP knows.
    """

    images: Sequence[Tensor]
    token: str
    vision: Vision | None = None
    scorer: Scorer | None = None

    def look(self, images: Tensor, prompts: Sequence[str], seen: Mapping[str, Features]) -> dict[str, NDArray[Any]]:
        """NCHW uint8, their prompts and, where there is a scorer, its embeddings of them as "image" => cosines (N,) each."""
        cosines: dict[str, NDArray[Any]] = {}
        if self.vision is not None:
            cosines["dino"] = self.vision(images) @ self._dino
        if self.scorer is not None:
            plain = self.scorer.text([without(self.token, prompt) for prompt in prompts])
            cosines |= {"clip_i": seen["image"] @ self._clip, "clip_t": (seen["image"] * plain).sum(1)}
        return cosines

    @cached_property
    def _dino(self) -> Features:
        assert self.vision is not None
        return np.concatenate([self.vision(image) for image in self.images]).mean(0)

    @cached_property
    def _clip(self) -> Features:
        assert self.scorer is not None
        return np.concatenate([self.scorer.image(image) for image in self.images]).mean(0)


def word(token: str) -> re.Pattern[str]:
    """What finds a token as a word of its own, in upper or lower case."""
    return re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)


def without(token: str, prompt: str) -> str:
    """The prompt without the token."""
    return " ".join(word(token).sub(" ", prompt).split())
