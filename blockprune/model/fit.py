"""Fits what stands in for removed blocks: for each a map from what reaches it to what the teacher's block gave, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from blockprune.errors import UserError
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.replay import Recording
from blockprune.model.surgery import StandIn

RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SMALL = 32 * 32  # latents up to this size are fitted in one batch
LEAST, MOST, GAIN = 64, 1024, 0.02  # samples of a fit, and the part of the held-out error that makes twice as many worth it
HELD_OUT = 4  # every fourth sample is held out, to choose the ridge by
Weights = Mapping[str, Tensor]
Fits = Callable[[Architecture], Weights]
Batch = tuple[Tensor, Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class Fit:
    """One fitted stand-in: its weights, and how well it does on samples held out.

    `plain` and `error` are |y - ŷ|² / |y - mean y|² of the plain stand-in and of the fit, where y is what the teacher's block gives
    (0 is exact). `n` samples were used, one in HELD_OUT of them held out to choose `ridge`, which is relative to the mean variance
    of a channel of the input.
    """

    name: str
    kind: str
    plain: float
    error: float
    ridge: float
    n: int
    weights: Mapping[str, Tensor]


def at_a_time(n: int, latent: tuple[int, int], batch_size: int) -> int:
    """How many of `n` samples go into one batch of a fit: all where latents are small; then one pass fits a student."""
    return n if latent[0] * latent[1] <= SMALL else batch_size


def enough(fitter: Callable[[int], Fitter], arch: Architecture) -> tuple[Fitter, str]:
    """A fitter of `arch` on as many samples as it takes, and what it came to in a sentence.

    From `LEAST` on the number is doubled until the mean held-out error falls by less than `GAIN` of itself, up to `MOST`.
    """
    n = LEAST
    chosen, before = fitter(n), math.inf
    while (error := _mean(fit.error for fit in chosen.fits(arch))) < (1 - GAIN) * before and 2 * n <= MOST:
        n, before = 2 * n, error
        chosen = fitter(n)
    fits = chosen.fits(arch)
    plain, error = _mean(fit.plain for fit in fits), _mean(fit.error for fit in fits)
    return chosen, (
        f"fitted {len(fits)} stand-ins on {n} samples: of what the blocks gave, {100 * error:.3g} % of the variance is missed on "
        f"samples held out, {100 * plain:.3g} % without fits (means)"
    )


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def no_fits(arch: Architecture) -> Weights:
    """The fitted weights of an architecture without fits; UserError for one that needs some."""
    if arch.fits:
        raise UserError(f"nothing is fitted yet in place of {min(arch.fits)[0]!r}: score it with `blockprune scan`, or distill it")
    return {}


class Fitter:
    """Fits architectures of one U-Net on the same samples, each block on what reaches it in the student, in forward order.

    `batches` are (sample, timesteps, condition) as the U-Net takes them. The teacher runs over them once; what it gives is kept
    while it takes less than `keep_bytes`, past that it is computed again for each fit. Blocks that two architectures share with
    everything before them are fitted once.
    """

    def __init__(self, unet: UNet2DConditionModel, graph: BlockGraph, batches: Sequence[Batch], keep_bytes: int = 2**31) -> None:
        self.unet, self.graph, self.batches, self.keep_bytes = unet, graph, batches, keep_bytes
        self._place = {block.name: i for i, block in enumerate(graph)}
        self._kept: list[Recording] = []
        self._kinds: set[str] = set()  # of small blocks that recordings hold, too
        self._known: dict[str, Fit] = {}

    @torch.no_grad()
    def __call__(self, arch: Architecture) -> Weights:
        """The fitted weights of `arch`, as `surgery.removed` takes them; none for an architecture without fits."""
        return {key: t for fit in self.fits(arch) for key, t in fit.weights.items()}

    @torch.no_grad()
    def fits(self, arch: Architecture) -> list[Fit]:
        """A Fit for each fitted block of `arch`, in forward order."""
        if new := {self.graph[name].kind for name, _ in arch.fits} & {"T", "C"} - self._kinds:
            self._kept, self._kinds = [], self._kinds | new
        order = sorted((name for name, _ in arch.fits), key=self._place.__getitem__)
        keys = {name: _up_to(self._place, arch, name).key for name in order}
        left = [name for name in order if keys[name] not in self._known]
        groups = [left] if len(self.batches) == 1 else [[name] for name in left]
        for group in filter(None, groups):
            known = [self._known[keys[name]] for name in order if keys[name] in self._known]
            self._known |= {keys[fit.name]: fit for fit in self._solve(arch, known, group)}
        return [self._known[keys[name]] for name in order]

    def _solve(self, arch: Architecture, known: Sequence[Fit], names: Sequence[str]) -> Iterator[Fit]:
        """Fits of the blocks `names`; one pass over one batch solves several, each on what the one before lets through."""
        problems = {name: _Problem(name, kind) for name, kind in arch.fits if name in names}
        for i, (sample, t, condition) in enumerate(self.batches):
            recording, masks = self._recording(i), surgery.stand_ins(self.unet, arch)
            for fit in known:
                _load(masks[fit.name], fit.weights)
            last = i == len(self.batches) - 1
            with recording.around(self.unet, arch, masks), suppress(_Stop), _watched(masks, recording, problems, names, last):
                self.unet(sample, t, **condition, return_dict=False)
        return (problem.solved for problem in problems.values() if problem.solved)

    def _recording(self, i: int) -> Recording:
        """The teacher's pass over batch `i`."""
        if i < len(self._kept):
            return self._kept[i]
        recording, (sample, t, condition) = Recording(self.graph, self._kinds), self.batches[i]
        with recording.of(self.unet):
            self.unet(sample, t, **condition, return_dict=False)
        if i == len(self._kept) and sum(r.mem_bytes for r in self._kept) < self.keep_bytes:
            self._kept.append(recording)
        return recording


def _up_to(place: Mapping[str, int], arch: Architecture, name: str) -> Architecture:
    """The part of `arch` that decides what reaches the block `name`, and what stands in for it; `place` is each block's."""
    return Architecture(frozenset(term for term in arch.terms if place[term.partition("~")[0]] <= place[name]))


def n_passes(graph: BlockGraph, archs: Iterable[Architecture], n_batches: int) -> Iterator[int]:
    """How many passes a new `Fitter` of so many batches makes for each architecture in turn, beside the teacher's."""
    place, known = {block.name: i for i, block in enumerate(graph)}, set[str]()
    for arch in archs:
        keys = {_up_to(place, arch, name).key for name, _ in arch.fits} - known
        known |= keys
        yield n_batches * len(keys) if n_batches > 1 else min(len(keys), 1)


class _Stop(Exception):
    """Ends a forward pass behind the last block that is looked at."""


@contextmanager
def _watched(
    masks: Mapping[str, StandIn], recording: Recording, problems: Mapping[str, _Problem], names: Sequence[str], last: bool
) -> Iterator[None]:
    """Within this context the stand-ins `names` add what they see to their problems, and are solved in the `last` batch."""

    def hook(name: str) -> Callable[..., Tensor | None]:
        def see(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
            problems[name].add(args[0], output, recording.output(name))
            if last:
                problems[name].solve(module)
            if name == names[-1]:
                raise _Stop
            return module.forward(args[0]) if last else None

        return see

    hooks = [masks[name].fit.register_forward_hook(hook(name)) for name in names]  # type: ignore[union-attr]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _load(stand_in: StandIn, weights: Mapping[str, Tensor]) -> None:
    assert stand_in.fit is not None
    stand_in.fit.load_state_dict({key.rpartition(".")[2]: t for key, t in weights.items()})


class _Problem:
    """One stand-in to be fitted: sums over the samples seen so far, those to solve with and those held out."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind, self.n, self.solved = name, kind, 0, None  # type: tuple[str, str, int, Fit | None]
        new = DiagonalMoments if kind == "channel" else Moments
        self.used, self.held, self.targets = new(), new(), DiagonalMoments()

    def add(self, x: Tensor, plain: Tensor, y: Tensor) -> None:
        """Adds samples: what reaches the fit, what it makes of them as yet, and what the teacher's block gave."""
        n = len(x)
        held = (torch.arange(self.n, self.n + n, device=x.device) % HELD_OUT) == HELD_OUT - 1
        rows, lacking = x, y.float() - plain.float()
        for moments, part in ((self.held, held), (self.used, ~held)):
            moments.add(_rows(rows[part]), _rows(lacking[part]))
        given = _rows(y[held].float())
        self.targets.add(given, given)
        self.n += n

    def solve(self, module: nn.Module) -> None:
        """Solves with the ridge that is best on the samples held out, then once more with all, and gives `module` the weights."""
        if not self.held.n:
            raise UserError(f"a fit needs at least {HELD_OUT} samples: got {self.n}")
        errors = {ridge: self.held.error(w, b) for ridge, w, b in self.used.solutions(RIDGES)}
        ridge = min(errors, key=lambda r: errors[r] if math.isfinite(errors[r]) else math.inf)
        ((_, w, b),) = (self.used + self.held).solutions((ridge,))
        spread = float(self.targets.centred()[0].sum()) or 1.0
        change = {"scale": w, "shift": b} if self.kind == "channel" else {"weight": w, "bias": b}
        weights = {key: (t.double() + change[key].view(t.shape)).to(t.dtype) for key, t in module.state_dict().items()}
        module.load_state_dict(weights)
        weights = {f"{self.name}.fit.{key}": t for key, t in weights.items()}
        plain = self.held.error(torch.zeros_like(w), torch.zeros_like(b))
        self.solved = Fit(self.name, self.kind, plain / spread, errors[ridge] / spread, ridge, self.n, weights)


def _rows(t: Tensor) -> Tensor:
    """(N, C, h, w) or (N, tokens, C) => (rows, C)."""
    t = t.movedim(1, -1) if t.ndim == 4 else t
    return t.reshape(-1, t.shape[-1])


class Moments:
    """Float64 sums over rows of x (rows, C_in), r (rows, C_out) and their products: O(C²) memory."""

    def __init__(self) -> None:
        self.n, self.sums = 0, tuple[Tensor, ...]()  # of x, r, xxᵀ, xrᵀ and r²

    def add(self, x: Tensor, r: Tensor) -> None:
        x, r = x.double(), r.double()
        new = (x.sum(0), r.sum(0), *self._products(x, r), r.square().sum(0))
        self.n += len(x)
        self.sums = tuple(a + b for a, b in zip(self.sums, new, strict=True)) if self.sums else new

    def __add__(self, other: Moments) -> Moments:
        both = type(self)()
        both.n = self.n + other.n
        both.sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        return both

    def _products(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return x.T @ x, x.T @ r

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """The covariances of x with x, of x with r, and the variances of r."""
        x, r, xx, xr, rr = (s / self.n for s in self.sums)
        return xx - torch.outer(x, x), xr - torch.outer(x, r), rr - r * r

    def solutions(self, ridges: Sequence[float]) -> Iterator[tuple[float, Tensor, Tensor]]:
        """(ridge, W, b) that minimise the mean of |r - W x - b|² + λ |W|², where λ is the ridge times the mean variance of x.

        Directions in which x does not vary are left alone (Hastie, Tibshirani, Friedman: Elements of Statistical Learning, 3.44).
        """
        xx, xr, _ = self.centred()
        values, vectors = torch.linalg.eigh(xx)
        values = values.clamp_min(0)
        least = values.max() * len(values) * torch.finfo(values.dtype).eps
        turned, mean = vectors.T @ xr, values.mean()
        x, r = self.sums[0] / self.n, self.sums[1] / self.n
        for ridge in ridges:
            inverse = torch.where(values > least, 1 / (values + ridge * mean), 0.0)
            w = (vectors @ (inverse[:, None] * turned)).T
            yield ridge, w, r - w @ x

    def error(self, w: Tensor, b: Tensor) -> float:
        """The mean over rows of |r - W x - b|²."""
        x, r, xx, xr, rr = (s / self.n for s in self.sums)
        square = (w @ xx * w).sum(1) + 2 * b * (w @ x) + b * b
        return float((rr + square - 2 * ((w * xr.T).sum(1) + b * r)).sum())


class DiagonalMoments(Moments):
    """Moments of each channel of x with the same channel of r alone: O(C) memory."""

    def _products(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return x.square().sum(0), (x * r).sum(0)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        x, r, xx, xr, rr = (s / self.n for s in self.sums)
        return xx - x * x, xr - x * r, rr - r * r

    def solutions(self, ridges: Sequence[float]) -> Iterator[tuple[float, Tensor, Tensor]]:
        xx, xr, _ = self.centred()
        x, r = self.sums[0] / self.n, self.sums[1] / self.n
        for ridge in ridges:
            w = torch.where(xx > 0, xr / (xx + ridge * xx.mean()), 0.0)
            yield ridge, w, r - w * x

    def error(self, w: Tensor, b: Tensor) -> float:
        x, r, xx, xr, rr = (s / self.n for s in self.sums)
        return float((rr + w * w * xx + 2 * b * w * x + b * b - 2 * (w * xr + b * r)).sum())
