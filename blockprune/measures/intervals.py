"""Intervals of measures by resampling images, and rank correlation. In float64; needs no torch.

A measure that has an interval is given as a `Statistic`, which evaluates many subsets of the samples in one call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blockprune.errors import UserError

Floats = NDArray[np.float64]
Index = NDArray[np.intp]
Statistic = Callable[[Index], Floats]  # (B, m) sample indices => (B,) values, one per subset of m samples


def mean_statistic(values: ArrayLike) -> Statistic:
    """The mean of subsets of (N,) values."""
    x = samples(values, (1,), "values must be (N,)", 1)
    return lambda index: np.asarray(x[index].mean(1))


def kendall_tau(a: ArrayLike, b: ArrayLike) -> float | None:
    """Kendall's τ-b of two paired rows of values; None where it is undefined (under two pairs, or a constant side)."""
    from scipy.stats import kendalltau  # imported here, for it takes longer than all of numpy

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    tau = float(kendalltau(x, y).statistic) if len(x) > 1 else np.nan
    return tau if np.isfinite(tau) else None


def resample(n: int, seed: int, n_resamples: int) -> Index:
    """(n_resamples, n // 2) indices: both halves of random permutations of n samples, no sample twice in a row."""
    draw = np.random.default_rng(seed)
    half = n // 2
    order = draw.permuted(np.tile(np.arange(n), ((n_resamples + 1) // 2, 1)), axis=1)
    return np.stack([order[:, :half], order[:, n - half :]], axis=1).reshape(-1, half)[:n_resamples]


def interval(statistic: Statistic, n: int, seed: int, n_resamples: int = 200) -> tuple[float, float] | None:
    """(low, high): the 95 % half-sample bootstrap interval of a statistic of n samples; None below four.

    Halves are drawn without replacement, and the deviations of their values from their own mean are laid around the value
    of the full sample. A half's variance about the full sample is (1/m - 1/n) σ², at m = n/2 just the σ²/n that is
    wanted (Shao and Wu 1989, delete-d jackknife); an odd n is put right by a factor. Drawn with replacement, repeated
    images would raise FID and KID far above the value itself and widen FID's spread (by two thirds at n = D). Centring
    removes the bias that the smaller size adds, so the interval speaks of the expected value at this n, given the
    reference: FID's own bias at small n stays in it.
    """
    if n < 4:
        return None
    value = value_of(statistic, n)
    index = resample(n, seed, n_resamples)
    resampled = np.asarray(statistic(index))
    if resampled.shape != (n_resamples,):
        raise ValueError(f"a statistic maps (B, m) indices to (B,) values: got {resampled.shape} for B = {n_resamples}")
    half = n // 2
    low, high = np.quantile(resampled - resampled.mean(), [0.025, 0.975]) * np.sqrt(half / (n - half))
    return value + float(low), value + float(high)


def paired_interval(
    statistic: Statistic, other: Statistic, n: int, seed: int, n_resamples: int = 200
) -> tuple[float, float] | None:
    """The interval of `statistic` less `other` over the same n samples (same seeds and prompts), drawn together."""
    return interval(lambda index: statistic(index) - other(index), n, seed, n_resamples)


def value_of(statistic: Statistic, n: int) -> float:
    """The statistic of all n samples."""
    return float(statistic(np.arange(n)[None])[0])


def samples(values: ArrayLike, n_axes: tuple[int, ...], rule: str, least: int) -> Floats:
    """The values of at least `least` images in float64; UserError for another shape, FloatingPointError on NaN or infinity."""
    x = np.asarray(values, dtype=np.float64)
    n = x.shape[0] if x.ndim else 0
    if x.size and x.ndim not in n_axes:
        raise UserError(f"{rule}: got the shape {x.shape}")
    if n < least or not x.size:
        raise UserError(f"a statistic of images needs at least {least}: got {n if x.size else 'none'}; raise the number of images")
    if not np.isfinite(x).all():
        raise FloatingPointError("features contain NaN or infinity: the images or the detector are broken")
    return x
