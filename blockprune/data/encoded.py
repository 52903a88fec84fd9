"""Training pairs as the U-Net takes them: encoded by a pipeline when asked for, and remembered."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log

import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline
from torch import Tensor

from blockprune.data.training_data import Reader
from blockprune.errors import UserError
from blockprune.model.families import Condition, join
from blockprune.model.sampling import encode, upcast


@dataclass(frozen=True)
class Encoded:
    """`mean` and `logvar` (B, C, h, w) float32 of the latents' distribution, and the condition, a row for each; on CPU.

    They are in the scale of the U-Net's latents: with the VAE's own mean m and log-variance v, its shift_factor b and
    scaling_factor s, mean = (m - b) s and logvar = v + 2 ln s. The condition has the precision of the text encoder.
    """

    mean: Tensor
    logvar: Tensor
    condition: Condition

    def rows(self, which: slice) -> Encoded:
        """Some of the pairs, as tensors of their own."""
        return Encoded(*recursively_apply(lambda t: t[which].clone(), (self.mean, self.logvar, self.condition)))

    @property
    def mem_bytes(self) -> int:
        return sum(t.nbytes for t in (self.mean, self.logvar, *(tensor for _, tensor in flat(self.condition))))

    def latents(self, noise: Tensor) -> Tensor:
        """Latents (B, C, h, w) drawn with standard normal noise: (m + exp(v / 2) noise - b) s."""
        return self.mean + (0.5 * self.logvar).exp() * noise


class Provider(ABC):
    """Encoded pairs by index. `identity` is a 12-digit id of the pairs and their resolution, the same for both kinds."""

    identity: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, indices: Sequence[int], flips: Sequence[bool]) -> Encoded:
        """The pairs of those indices, each mirrored left to right before it was encoded where its flip is true."""

    def latents(self, indices: Sequence[int], flips: Sequence[bool], noise: Tensor) -> tuple[Tensor, Condition]:
        """Latents (B, C, h, w) drawn with that noise, as the U-Net takes them, and their condition."""
        pairs = self.encoded(indices, flips)
        return pairs.latents(noise), pairs.condition


class Live(Provider):
    """Encodes with a pipeline's VAE and text encoders, `chunk` images at a time.

    With `chunk` 1 a pair's bits do not depend on what it is asked together with. Tokenizers keep state: one thread at a time.
    UserError when the VAE overflows.
    """

    def __init__(self, pipe: DiffusionPipeline, reader: Reader, chunk: int = 1) -> None:
        self.pipe, self.reader, self.chunk = pipe, reader, chunk
        side, factor = reader.source.size, pipe.vae_scale_factor
        if side % factor:
            raise UserError(f"the resolution must be a multiple of {factor} pixels: got {side}")
        self.latent = (side // factor, side // factor)
        self.identity = identity_of_pairs(reader.source.identity, side)

    def __len__(self) -> int:
        return len(self.reader)

    def encoded(self, indices: Sequence[int], flips: Sequence[bool]) -> Encoded:
        pairs = [self.reader.pair(i) for i in indices]
        images = torch.stack([p.image.flip(-1) if flip else p.image for p, flip in zip(pairs, flips, strict=True)])
        return Encoded(*self.moments(images), self.condition([p.caption for p in pairs]))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images NCHW uint8 => mean and log-variance as `Encoded` holds them."""
        vae = self.pipe.vae
        with torch.inference_mode(), upcast(vae):
            parts = [vae.encode(x.to(vae.device, vae.dtype) / 127.5 - 1).latent_dist for x in images.split(self.chunk)]
        mean, logvar = (torch.cat([getattr(p, name).float().cpu() for p in parts]) for name in ("mean", "logvar"))
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            raise UserError(f"the VAE's latents are not finite in {str(vae.dtype).removeprefix('torch.')}: use --dtype float32")
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        return (mean - shift) * scale, logvar + 2 * log(scale)

    def condition(self, captions: Sequence[str]) -> Condition:
        """The condition of each caption, on CPU."""
        return recursively_apply(lambda t: t.cpu().clone(), encode(self.pipe, captions, self.latent, self.chunk)[0])


class Remembered(Provider):
    """Another provider's pairs, kept in memory as they come while they take less than `keep_bytes`."""

    def __init__(self, provider: Provider, keep_bytes: int = 2**32) -> None:
        self.provider, self.identity, self.room = provider, provider.identity, keep_bytes
        self._rows: dict[tuple[int, bool], Encoded] = {}

    def __len__(self) -> int:
        return len(self.provider)

    def encoded(self, indices: Sequence[int], flips: Sequence[bool]) -> Encoded:
        wanted = list(zip(indices, flips, strict=True))
        if missing := [pair for pair in dict.fromkeys(wanted) if pair not in self._rows]:
            pairs = self.provider.encoded([i for i, _ in missing], [flip for _, flip in missing])
            fresh = {pair: pairs.rows(slice(k, k + 1)) for k, pair in enumerate(missing)}
        else:
            fresh = {}
        rows = [self._rows.get(pair) or fresh[pair] for pair in wanted]
        for pair, row in fresh.items():
            if row.mem_bytes <= self.room:
                self._rows[pair], self.room = row, self.room - row.mem_bytes
        mean, logvar = torch.cat([row.mean for row in rows]), torch.cat([row.logvar for row in rows])
        return Encoded(mean, logvar, join(*(row.condition for row in rows)))


def identity_of_pairs(data: str, resolution: int) -> str:
    """What tells pairs apart: the source's own id, at that many pixels."""
    return hashlib.sha256(f"{data} {resolution}".encode()).hexdigest()[:12]


def flat(condition: Condition, before: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a condition by path, such as added_cond_kwargs/text_embeds."""
    for name, value in condition.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}/")
        else:
            yield f"{before}{name}", value


def nested(flat: Mapping[str, Tensor]) -> Condition:
    """The condition whose tensors have those paths."""
    condition: Condition = {}
    for path, tensor in flat.items():
        *folders, name = path.split("/")
        place = condition
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = tensor
    return condition
