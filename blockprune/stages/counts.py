"""The passes of what several stages do, counted from a request: drawing, denoising errors, fits, timings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from blockprune.cost.work import Passes, batches, share
from blockprune.measures.measure import MEASURES, measure
from blockprune.measures.runner import N_TIMINGS
from blockprune.model import fit
from blockprune.model.architecture import Architecture
from blockprune.model.defaults import judge_names
from blockprune.model.sampling import Protocol
from blockprune.stages.fields import Measuring
from blockprune.stages.outline import Outline
from blockprune.stages.plan import N_PICTURES

WARMUP = 2
FULL = Architecture()
OF_MEMORY = 8  # what the memory of a pass takes on a processor, in passes


@dataclass(frozen=True)
class Counts:
    """What a filled request to measure comes to, before anything is loaded.

    `clean` says that denoising errors have data of their own, `detects` and `captions` that there will be a detector and a CLIP
    scorer.
    """

    outline: Outline
    protocol: Protocol
    batch_size: int
    n_noisy: int
    clean: bool
    detects: bool
    captions: bool

    @classmethod
    def of(cls, outline: Outline, request: Measuring) -> Counts:
        """Of a request that is filled. UserError for a scheduler that cannot draw so."""
        r, defaults = request, outline.defaults
        scale = r.cfg_scale or 0.0
        protocol = Protocol(r.n_images or 1, r.steps or 1, scale, r.seed, outline.latent, r.scheduler or "")
        detector, scorer = judge_names(defaults, r.detector, r.inception_weights, r.clip, r.reference)
        clean = (r.data or defaults.get("data")) is not None
        return cls(outline, protocol, r.batch_size or 1, r.eps_samples or 1, clean, bool(detector), bool(scorer))

    @property
    def judged(self) -> bool:
        """True where somebody looks at images."""
        return self.detects or self.captions

    @property
    def n_pictures(self) -> int:
        return min(N_PICTURES, self.protocol.n_images)

    def possible(self) -> list[str]:
        """What is measured where no measures are named, as far as passes go."""
        wanted = [m for m in MEASURES.values() if m.kind != "images" or (m.name == "clip_score" and self.captions)]
        wanted += [MEASURES["is"]] if self.detects else []
        return [m.name for m in wanted if "training" not in m.needs and (self.protocol.cfg_scale > 1 or "guidance" not in m.needs)]

    def drawn(self, step: str, n: int | None = None, arch: Architecture = FULL, times: int = 1) -> Iterator[Passes]:
        """Images, all of the protocol's where `n` is None."""
        protocol = replace(self.protocol, n_images=self.protocol.n_images if n is None else n)
        yield from self.outline.drawing(step, protocol, self.batch_size, share(self.outline.graph, arch), times)

    def denoised(self, name: str, n: int, of_network: float = 1.0, times: int = 1, step: str = "") -> Iterator[Passes]:
        """The errors on `n` samples by a denoising measure; `of_network` is the share of it that runs."""
        guided = "guidance" in measure(name).needs
        yield from batches(step or name, n, self.batch_size, times, 1 + guided, of_network)

    def fitted(self, archs: Sequence[Architecture], step: str = "fits") -> Iterator[Passes]:
        """The fits of architectures, one after another on the same samples, with the teacher's passes over these."""
        graph, size = self.outline.graph, fit.at_a_time(self.n_noisy, self.outline.latent, self.batch_size)
        if any(arch.fits for arch in archs):
            yield from batches(step, self.n_noisy, size)
        n_batches = -(-self.n_noisy // size)
        for arch, n in zip(archs, fit.n_passes(graph, archs, n_batches), strict=True):
            if n:
                yield Passes(step, n, min(size, self.n_noisy), share(graph, arch, replayed=True) / 2)  # it ends behind the last fit

    def timed(self, archs: Iterable[Architecture], memory: bool = False, step: str = "latency") -> Iterator[Passes]:
        """Steps of each architecture in turn with the teacher's, of the teacher itself alone."""
        rounds = WARMUP + N_TIMINGS
        for arch in archs:
            yield Passes(step, rounds, 1, share(self.outline.graph, arch))
            if arch:
                yield Passes(step, rounds, 1)
            if memory:  # one pass, which takes longer for being watched
                yield Passes("memory", 1, 1, OF_MEMORY * share(self.outline.graph, arch))
