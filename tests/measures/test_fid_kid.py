"""Laws of the measures, and agreement with clean-fid and torch-fidelity on the same features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cleanfid.fid import fid_from_feats, kernel_distance
from scipy.special import softmax
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from blockprune.errors import UserError
from blockprune.measures import fid_kid, intervals
from blockprune.measures.fid_kid import Stats

RNG = np.random.default_rng(0)


def gaussian(n: int, d: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, d)) @ draw.standard_normal((d, d)) + shift


@pytest.mark.parametrize("n", [200, 20], ids=["n > d", "n < d"])
def test_fid_of_a_set_to_itself_is_zero(n: int) -> None:
    x = gaussian(n, 24)
    assert fid_kid.fid(x, Stats.of(x)) == pytest.approx(0, abs=1e-5 * np.trace(np.cov(x.T)))


@pytest.mark.parametrize(("n", "d"), [(500, 16), (64, 64), (65, 64), (17, 48), (2, 8)])
@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_fid_equals_clean_fid(n: int, d: int) -> None:
    x, y = gaussian(n, d, 0.5, seed=1).astype(np.float32), gaussian(300, d, seed=2)
    reference = Stats.of(y)
    assert fid_kid.fid(x, reference) == pytest.approx(fid_from_feats(x.astype(np.float64), y), rel=1e-4)


def test_fid_of_known_gaussians() -> None:
    """Diagonal covariances: ‖μ₁ - μ₂‖² + Σ (σ₁ - σ₂)², here with exactly whitened samples."""
    for n, d in ((400, 5), (6, 5), (5, 8)):
        x = np.random.default_rng(n).standard_normal((n, d))
        x = x - x.mean(0)
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        rank = min(n - 1, d)
        white = (u[:, :rank] @ vt[:rank]) * np.sqrt(n - 1)  # covariance: a projection of that rank
        sigma = vt[:rank].T @ vt[:rank]
        reference = Stats(np.full(d, 2.0), 9 * sigma, n)
        assert fid_kid.fid(white, reference) == pytest.approx(4 * d + rank * (3 - 1) ** 2, rel=1e-9)


def test_fid_is_finite_where_covariances_are_singular() -> None:
    constant = np.ones((50, 6))
    assert fid_kid.fid(constant, Stats.of(constant)) == 0
    assert fid_kid.fid(constant + 1, Stats.of(constant)) == pytest.approx(6)
    assert fid_kid.fid(gaussian(30, 6), Stats.of(constant)) > 0


@pytest.mark.parametrize(("n", "largest"), [(12, 12), (200, 30)])
def test_fid_decomposes_no_matrix_larger_than_it_must(n: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    for name in ("eigvalsh", "eigh"):
        plain = getattr(np.linalg, name)
        monkeypatch.setattr(np.linalg, name, lambda a, plain=plain: (sizes.append(a.shape[-1]), plain(a))[1])
    fid_kid.fid(gaussian(n, 30, seed=1), Stats.of(gaussian(100, 30, seed=2)))
    assert max(sizes) == largest


def test_fid_refuses_what_it_cannot_measure() -> None:
    reference = Stats.of(gaussian(30, 6))
    with pytest.raises(UserError, match="got 5 and 6; make the reference with the same detector"):
        fid_kid.fid(gaussian(30, 5), reference)
    with pytest.raises(UserError, match="at least 2: got 1"):
        fid_kid.fid(gaussian(1, 6), reference)
    with pytest.raises(FloatingPointError, match="NaN"):
        fid_kid.fid(np.full((4, 6), np.nan), reference)
    with pytest.raises(UserError, match="must be"):
        fid_kid.fid(np.ones(6), reference)


def test_stats_keep_features_on_request() -> None:
    x = gaussian(9, 3)
    assert Stats.of(x).features is None
    kept = Stats.of(torch.from_numpy(x), keep=True)
    assert kept.n == 9
    np.testing.assert_array_equal(kept.features, x)
    np.testing.assert_allclose(kept.root @ kept.root.T, np.cov(x.T), rtol=1e-10)


def test_kid_equals_its_formula_and_both_libraries() -> None:
    x, y = gaussian(40, 8, 0.3, seed=3), gaussian(60, 8, seed=4)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 8 + 1) ** 3)

    within = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert fid_kid.kid(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert fid_kid.kid(x, y[:40]) == pytest.approx(kernel_distance(x, y[:40], num_subsets=1, max_subset_size=40), rel=1e-9)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    theirs = kid_features_to_metric(*tensors, kid_subsets=7, kid_subset_size=20, rng_seed=5, verbose=False)
    ours = fid_kid.kid(x, y, seed=5, n_subsets=7, subset_size=20)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours != fid_kid.kid(x, y, seed=6, n_subsets=7, subset_size=20)


def test_kid_is_unbiased() -> None:
    """The mean over pairs of samples of one population is zero within its error; the biased estimator's is far above."""
    values = [fid_kid.kid(*np.split(np.random.default_rng(s).standard_normal((40, 6)), 2)) for s in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_kid_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = gaussian(23, 5), gaussian(31, 5, 1, seed=1)
    whole = fid_kid.kid(x, y)
    monkeypatch.setattr(fid_kid, "_KERNEL_ROWS", 7)
    assert fid_kid.kid(x, y) == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(fid_kid, "_KERNEL_KEPT", 10)
    index = intervals.resample(23, 0, 4)
    assert fid_kid.kid(x, y) == pytest.approx(whole, rel=1e-12)
    values = fid_kid.kid_statistic(x, y)(index)
    np.testing.assert_allclose(values, [fid_kid.kid(x[row], y) for row in index], rtol=1e-9)


def test_kid_refuses_too_large_subsets_and_other_widths() -> None:
    with pytest.raises(UserError, match="subset of 1000"):
        fid_kid.kid(gaussian(20, 4), gaussian(20, 4), n_subsets=3)
    with pytest.raises(UserError, match="one width: got 4 and 5"):
        fid_kid.kid(gaussian(20, 4), gaussian(20, 5))


def test_inception_score_equals_torch_fidelity() -> None:
    logits = RNG.standard_normal((50, 7)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=1)["inception_score_mean"]
    assert fid_kid.inception_score(softmax(logits, axis=1)) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("n", "splits"), [(50, 10), (53, 10), (10, 10), (37, 3)])
def test_inception_score_over_splits_equals_torch_fidelity(n: int, splits: int) -> None:
    logits = np.random.default_rng(n).standard_normal((n, 7)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=splits)["inception_score_mean"]
    probs = softmax(logits, axis=1)
    assert fid_kid.inception_score(probs, splits) == pytest.approx(theirs, rel=1e-9)
    assert fid_kid.inception_score(probs, splits) != pytest.approx(fid_kid.inception_score(probs), rel=1e-3)
    with pytest.raises(UserError, match=f"over {n + 1} splits needs as many images: got {n}"):
        fid_kid.inception_score(probs, n + 1)


def test_inception_score_of_groups_is_their_mean_and_ignores_padding() -> None:
    sure = np.eye(4)[np.arange(40) % 4]  # every class once in four: score 4
    none = np.full((40, 3), 1 / 3)  # says nothing: score 1
    assert fid_kid.inception_score(sure) == pytest.approx(4)
    assert fid_kid.inception_score(none) == pytest.approx(1)
    grouped = np.stack([sure, np.pad(none, ((0, 0), (0, 1)))], axis=1)
    assert fid_kid.inception_score(grouped) == pytest.approx(2.5)


def test_clip_score_and_feature_distance_are_per_sample() -> None:
    x, y = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 2.0]])
    np.testing.assert_allclose(fid_kid.clip_score(x, y), [1, 0])
    np.testing.assert_allclose(fid_kid.feature_distance(x, y), [0, 5])
    for measure in (fid_kid.clip_score, fid_kid.feature_distance):
        with pytest.raises(UserError, match="paired"):
            measure(x, y[:1])
        with pytest.raises(FloatingPointError):
            measure(x, y * np.nan)


EMPTY: list[Any] = [[], np.empty((0, 4)), np.empty((0, 2, 4)), np.empty((3, 0)), [[]]]


@pytest.mark.parametrize("empty", EMPTY, ids=lambda x: str(np.shape(x)))
@pytest.mark.parametrize(
    "measure",
    [
        fid_kid.inception_score,
        lambda x: fid_kid.inception_score(x, 2),
        lambda x: fid_kid.fid(x, Stats.of(np.eye(4))),
        Stats.of,
        lambda x: fid_kid.kid(x, np.eye(4)),
        lambda x: fid_kid.kid(np.eye(4), x),
        lambda x: fid_kid.kid(x, np.eye(4), n_subsets=2, subset_size=2),
        lambda x: fid_kid.clip_score(x, x),
        lambda x: fid_kid.feature_distance(np.eye(4), x),
        intervals.mean_statistic,
    ],
)
def test_no_images_are_too_few(measure: Callable[[Any], Any], empty: Any) -> None:
    with pytest.raises(UserError, match=r"needs at least [12]: got none; raise the number of images"):
        measure(empty)


def test_arrays_of_another_form_are_named() -> None:
    for wrong, measure in (
        (np.ones(3), fid_kid.inception_score),
        (np.ones((1, 1, 1, 1)), fid_kid.inception_score),
        (1.0, fid_kid.inception_score),
        (np.ones((2, 2)), intervals.mean_statistic),
        (np.ones(3), Stats.of),
    ):
        with pytest.raises(UserError, match=r"must be \(N.*: got the shape"):
            measure(wrong)
    with pytest.raises(UserError, match="at least 1 split: got 0"):
        fid_kid.inception_score(np.ones((2, 2)) / 2, 0)
    with pytest.raises(UserError, match="at least 2: got 1"):
        fid_kid.kid(np.ones((1, 4)), np.eye(4))
    assert fid_kid.inception_score([[0.5, 0.5]]) == pytest.approx(1)
