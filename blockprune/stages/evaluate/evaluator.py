"""Stage: images of one model under a protocol, and what judges see in their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockprune.data.image_files import as_stored, file_bytes, pixels
from blockprune.measures.images import Judges
from blockprune.model.model import Model
from blockprune.model.sampling import Protocol
from blockprune.stages.evaluate.inputs import Inputs
from blockprune.stages.evaluate.protocol import Rules, Setting

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Drawn:
    """Image number `index` as the bytes of its file."""

    index: int
    file: bytes


@dataclass(frozen=True)
class Seen:
    """What the judges saw of some images, a row each; "index" has their numbers."""

    arrays: Arrays


@dataclass(frozen=True)
class Evaluator:
    """A model under a protocol: image i has prompt i and seed `seed + i`, whichever process draws it and in what batch.

    With `inputs` image i is made from input i. `tick` hears how many images were just seen.
    """

    model: Model
    rules: Rules
    prompts: Sequence[str]
    seed: int
    judges: Judges
    inputs: Inputs | None = None
    tick: Callable[[int], None] = lambda n: None

    def look(
        self, setting: Setting, batches: Iterable[Sequence[int]], recall: Callable[[int], bytes | None]
    ) -> Iterator[Drawn | Seen]:
        """Draws the images of each batch that `recall` does not know, then looks at the files of all; raises NotFinite.

        The next batch is asked for when what was seen of the last has been taken. One image that is missing is drawn with its whole
        batch: arithmetic may round by the size of the batch, and a run that was killed shall end as if it had not been.
        """
        protocol = Protocol(len(self.prompts), setting.steps, setting.cfg_scale, self.seed, self.model.latent, setting.scheduler)
        for batch in batches:
            images = {i: image for i in batch if (image := _known(recall(i))) is not None}
            drawn = self._draw(protocol, setting.strength, batch) if len(images) < len(batch) else []
            for i, image in zip(batch, drawn, strict=False):
                if i not in images:
                    file = file_bytes(image, self.rules)
                    images[i] = pixels(file)
                    yield Drawn(i, file)
            inputs = None if self.inputs is None else torch.stack([as_stored(self.inputs[i], self.rules) for i in batch])
            seen = self.judges.look(torch.stack([images[i] for i in batch]), [self.prompts[i] for i in batch], inputs)
            yield Seen({**seen, "index": np.array(batch, dtype=np.int64)})
            self.tick(len(batch))

    def _draw(self, protocol: Protocol, strength: float | None, index: Sequence[int]) -> Sequence[Tensor]:
        prompts, seeds = [self.prompts[i] for i in index], [self.seed + i for i in index]
        if self.inputs is not None and strength is not None:
            inputs = torch.stack([self.inputs[i] for i in index])
            return list(self.model.edited(protocol, strength, inputs, prompts, seeds))
        condition, blank = self.model.encode(prompts)
        return list(self.model.images(protocol, condition, blank, seeds))


def _known(file: bytes | None) -> Tensor | None:
    """The pixels of a file; None when there is none, or a machine's crash left it damaged."""
    try:
        return None if file is None else pixels(file)
    except (OSError, SyntaxError, ValueError):
        return None
