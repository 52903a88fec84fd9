"""FID, KID, Inception Score and CLIP score: features of images in, number out. In float64; no torch at run time.

Those that have an interval are also given as a `Statistic`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

from blockprune.errors import UserError
from blockprune.measures.intervals import Floats, Index, Statistic, samples, value_of

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 1 << 24
_KERNEL_ROWS = 1024
_KERNEL_KEPT = 8192
_SPLIT_SEED = 2020  # torch-fidelity's


class Detector(Protocol):
    """Images in, features out: the seam between models and measures. The name goes into stored statistics."""

    name: str
    n_features: int

    def __call__(self, images: torch.Tensor) -> NDArray[np.float32]:
        """NCHW uint8 => (N, D) float32."""

    def features_and_probs(self, images: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """NCHW uint8 => (N, D) features and (N, G, K) class probabilities in one pass; None for a model without classes."""


@dataclass(frozen=True, eq=False)
class Stats:
    """Mean (D,) and unbiased covariance (D, D) of n feature vectors, with the (n, D) features themselves where kept.

    n is 0 where a published file does not say.
    """

    mu: Floats
    sigma: Floats
    n: int
    features: Floats | None = None

    @classmethod
    def of(cls, features: ArrayLike, keep: bool = False) -> Stats:
        """The statistics of (N, D) features. UserError below two samples; FloatingPointError on NaN or infinity."""
        x = _matrix(features)
        return cls(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)), len(x), x if keep else None)

    @functools.cached_property
    def root(self) -> Floats:
        """A (D, D) matrix R with R Rᵀ = sigma."""
        values, vectors = np.linalg.eigh(self.sigma)
        return np.asarray(vectors * np.sqrt(values.clip(min=0)))


def fid(features: ArrayLike, reference: Stats) -> float:
    """The Fréchet distance of (N, D) features to the reference: ‖μ₁ - μ₂‖² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½).

    Equals clean-fid's `fid_from_feats` (Heusel et al. 2017, eq. 6). Raises as `Stats.of`.
    """
    return value_of(fid_statistic(features, reference), len(_matrix(features)))


def fid_statistic(features: ArrayLike, reference: Stats) -> Statistic:
    """FID of subsets of (N, D) features to a fixed reference.

    Tr (Σ₁ Σ₂)^½ is the sum of the roots of the eigenvalues of X Σ₂ Xᵀ, with X the m centred rows over √(m - 1), or of
    Rᵀ Σ₁ R with R Rᵀ = Σ₂: whichever is smaller, m x m or D x D. Both are symmetric, so the result is always finite.
    """
    x = _matrix(features)
    if x.shape[1] != reference.mu.size:
        raise UserError(
            f"features and reference must have one width: got {x.shape[1]} and {reference.mu.size}; "
            "make the reference with the same detector"
        )
    mean, trace = x.mean(0), float(np.trace(reference.sigma))
    x = x - mean
    gram = functools.cache(lambda: x @ reference.sigma @ x.T)
    rooted = functools.cache(lambda: x @ reference.root)

    def distance(index: Index) -> Floats:
        m, part = index.shape[1], x[index]
        centre = part.mean(1, keepdims=True)
        if m < x.shape[1]:
            k = gram()[index[:, :, None], index[:, None, :]]
            k = k - k.mean(1, keepdims=True) - k.mean(2, keepdims=True) + k.mean((1, 2), keepdims=True)
        else:
            y = rooted()[index]
            y = y - y.mean(1, keepdims=True)
            k = y.transpose(0, 2, 1) @ y
        roots = np.sqrt(np.linalg.eigvalsh(k / (m - 1)).clip(min=0)).sum(1)
        spread = ((part - centre) ** 2).sum((1, 2)) / (m - 1)
        shift = ((centre[:, 0] + mean - reference.mu) ** 2).sum(1)
        return np.asarray(shift + spread + trace - 2 * roots).clip(min=0)

    def statistic(index: Index) -> Floats:
        rows = max(1, _CHUNK_ELEMENTS // (index.shape[1] * max(index.shape[1], x.shape[1])))
        return np.concatenate([distance(index[i : i + rows]) for i in range(0, len(index), rows)])

    return statistic


def kid(x: ArrayLike, y: ArrayLike, seed: int = 0, n_subsets: int = 0, subset_size: int = 1000) -> float:
    """The kernel distance of (N, D) to (M, D) features: unbiased squared MMD with the kernel (x·y / D + 1)³.

    By default the exact estimator over all samples (Bińkowski et al. 2018; Gretton et al. 2012, eq. 3). With `n_subsets`
    the mean over seeded random subsets, the same number as torch-fidelity's for the same seed. It can be below zero.
    """
    a, b = _matrix(x), _matrix(y)
    if not n_subsets:
        return value_of(kid_statistic(a, b), len(a))
    if subset_size > min(len(a), len(b)):
        raise UserError(f"a KID subset of {subset_size} needs as many images on both sides: got {len(a)} and {len(b)}")
    # torch-fidelity's generator and order of draws, so that numbers can be compared
    draw = np.random.RandomState(seed % 2**32)
    values = []
    for _ in range(n_subsets):
        first = draw.choice(len(a), subset_size, replace=False)
        values.append(kid(a[first], b[draw.choice(len(b), subset_size, replace=False)]))
    return float(np.mean(values))


def kid_statistic(x: ArrayLike, y: ArrayLike) -> Statistic:
    """KID of subsets of (N, D) features `x` to all of the (M, D) features `y`.

    The N² values of the kernel are kept up to N = 8192 (0.5 GB), and computed again by rows for each call beyond.
    """
    a, b = _matrix(x), _matrix(y)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"both sides of KID must have one width: got {a.shape[1]} and {b.shape[1]}; use one detector")
    kept = list(_kernel_rows(a, a)) if len(a) <= _KERNEL_KEPT else None
    own = ((a**2).mean(1) + 1) ** 3
    across = np.concatenate([rows.mean(1) for rows in _kernel_rows(a, b)])
    total = sum(float(rows.sum()) for rows in _kernel_rows(b, b))
    other = (total - float((((b**2).mean(1) + 1) ** 3).sum())) / (len(b) * (len(b) - 1))

    def statistic(index: Index) -> Floats:
        m, weights = index.shape[1], _counts(index, len(a))
        pairs, start = -(weights @ own), 0
        for rows in kept or _kernel_rows(a, a):
            mine = weights[:, start : start + len(rows)]
            pairs += (mine * (weights @ rows.T)).sum(1)
            start += len(rows)
        return np.asarray(pairs / (m * (m - 1)) + other - 2 * (weights @ across) / m)

    return statistic


def inception_score(probs: ArrayLike, splits: int = 1) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)) of (N, K) class probabilities (Salimans et al. 2016).

    (N, G, K) holds G independent labels per image: the mean of their G scores. Rows of fewer classes are padded with 0.
    With `splits` the mean score of that many equal parts of the shuffled images, shuffled and cut as torch-fidelity does.
    UserError for fewer images than splits.
    """
    probs = np.asarray(probs)
    return value_of(inception_statistic(probs, splits), probs.shape[0] if probs.ndim else 0)


def inception_statistic(probs: ArrayLike, splits: int = 1) -> Statistic:
    """Inception Score of subsets of (N, K) or (N, G, K) class probabilities; an image stays in its split in every subset."""
    p = samples(probs, (2, 3), "class probabilities must be (N, K) or (N, G, K)", 1)
    if splits < 1:
        raise UserError(f"an Inception Score has at least 1 split: got {splits}")
    if splits == 1:
        return _whole_inception(p)
    if (n := len(p)) < splits:
        raise UserError(f"an Inception Score over {splits} splits needs as many images: got {n}; raise the number of images")
    order = np.random.RandomState(_SPLIT_SEED).permutation(n)
    split = np.empty(n, dtype=np.intp)
    for i in range(splits):
        split[order[i * n // splits : (i + 1) * n // splits]] = i
    score = _whole_inception(p)

    def statistic(index: Index) -> Floats:
        parts = ([row[split[row] == i] for i in range(splits)] for row in index)
        return np.array([np.mean([score(part[None])[0] for part in row if len(part)]) for row in parts])

    return statistic


def _whole_inception(probs: Floats) -> Statistic:
    p = probs[:, None] if probs.ndim == 2 else probs
    negative_entropy = xlogy(p, p).sum(2)

    def statistic(index: Index) -> Floats:
        weights = _counts(index, len(p)) / index.shape[1]
        marginal = (weights @ p.reshape(len(p), -1)).reshape(-1, *p.shape[1:])
        return np.asarray(np.exp(weights @ negative_entropy - xlogy(marginal, marginal).sum(2)).mean(1))

    return statistic


def clip_score(image: ArrayLike, text: ArrayLike) -> Floats:
    """(N, D), (N, D) => (N,) cosines of each image with its own prompt, not scaled by 100; their mean is the score."""
    a, b = _pair(image, text)
    return np.asarray((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))


def feature_distance(x: ArrayLike, teacher: ArrayLike) -> Floats:
    """(N, D), (N, D) => (N,) squared distances of images of the same seeds; their mean is the measure."""
    a, b = _pair(x, teacher)
    return np.asarray(((a - b) ** 2).sum(1))


def _matrix(features: ArrayLike) -> Floats:
    return samples(features, (2,), "features must be (N, D)", 2)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    a, b = (samples(x, (2,), "paired features must be (N, D)", 1) for x in (first, second))
    if a.shape != b.shape:
        raise UserError(f"paired features must be (N, D) of one shape: got {a.shape} and {b.shape}")
    return a, b


def _counts(index: Index, n: int) -> Floats:
    """(B, m) indices => (B, n), how often each sample occurs."""
    counts = np.zeros((len(index), n))
    np.add.at(counts, (np.arange(len(index))[:, None], index), 1)
    return counts


def _kernel_rows(x: Floats, y: Floats) -> Iterator[Floats]:
    """The polynomial kernel of (N, D) and (M, D), some rows at a time: 40,000 x 40,000 does not fit in memory."""
    for i in range(0, len(x), _KERNEL_ROWS):
        yield (x[i : i + _KERNEL_ROWS] @ y.T / x.shape[1] + 1) ** 3
