"""Laws of the measures, and agreement with clean-fid and torch-fidelity on the same features."""

from __future__ import annotations

import json
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
from blockprune.measures import statistics
from blockprune.measures.statistics import Stats

RNG = np.random.default_rng(0)


def gaussian(n: int, d: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, d)) @ draw.standard_normal((d, d)) + shift


@pytest.mark.parametrize("n", [200, 20], ids=["n > d", "n < d"])
def test_fid_of_a_set_to_itself_is_zero(n: int) -> None:
    x = gaussian(n, 24)
    assert statistics.fid(x, Stats.of(x)) == pytest.approx(0, abs=1e-5 * np.trace(np.cov(x.T)))


@pytest.mark.parametrize(("n", "d"), [(500, 16), (64, 64), (65, 64), (17, 48), (2, 8)])
@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_fid_equals_clean_fid(n: int, d: int) -> None:
    x, y = gaussian(n, d, 0.5, seed=1).astype(np.float32), gaussian(300, d, seed=2)
    reference = Stats.of(y)
    assert statistics.fid(x, reference) == pytest.approx(fid_from_feats(x.astype(np.float64), y), rel=1e-4)


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
        assert statistics.fid(white, reference) == pytest.approx(4 * d + rank * (3 - 1) ** 2, rel=1e-9)


def test_fid_is_finite_where_covariances_are_singular() -> None:
    constant = np.ones((50, 6))
    assert statistics.fid(constant, Stats.of(constant)) == 0
    assert statistics.fid(constant + 1, Stats.of(constant)) == pytest.approx(6)
    assert statistics.fid(gaussian(30, 6), Stats.of(constant)) > 0


@pytest.mark.parametrize(("n", "largest"), [(12, 12), (200, 30)])
def test_fid_decomposes_no_matrix_larger_than_it_must(n: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    for name in ("eigvalsh", "eigh"):
        plain = getattr(np.linalg, name)
        monkeypatch.setattr(np.linalg, name, lambda a, plain=plain: (sizes.append(a.shape[-1]), plain(a))[1])
    statistics.fid(gaussian(n, 30, seed=1), Stats.of(gaussian(100, 30, seed=2)))
    assert max(sizes) == largest


def test_fid_refuses_what_it_cannot_measure() -> None:
    reference = Stats.of(gaussian(30, 6))
    with pytest.raises(UserError, match="got 5 and 6; make the reference with the same detector"):
        statistics.fid(gaussian(30, 5), reference)
    with pytest.raises(UserError, match="at least 2: got 1"):
        statistics.fid(gaussian(1, 6), reference)
    with pytest.raises(FloatingPointError, match="NaN"):
        statistics.fid(np.full((4, 6), np.nan), reference)
    with pytest.raises(UserError, match="must be"):
        statistics.fid(np.ones(6), reference)


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
    assert statistics.kid(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert statistics.kid(x, y[:40]) == pytest.approx(kernel_distance(x, y[:40], num_subsets=1, max_subset_size=40), rel=1e-9)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    theirs = kid_features_to_metric(*tensors, kid_subsets=7, kid_subset_size=20, rng_seed=5, verbose=False)
    ours = statistics.kid(x, y, seed=5, n_subsets=7, subset_size=20)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours != statistics.kid(x, y, seed=6, n_subsets=7, subset_size=20)


def test_kid_is_unbiased() -> None:
    """The mean over pairs of samples of one population is zero within its error; the biased estimator's is far above."""
    values = [statistics.kid(*np.split(np.random.default_rng(s).standard_normal((40, 6)), 2)) for s in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_kid_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = gaussian(23, 5), gaussian(31, 5, 1, seed=1)
    whole = statistics.kid(x, y)
    monkeypatch.setattr(statistics, "_KERNEL_ROWS", 7)
    assert statistics.kid(x, y) == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(statistics, "_KERNEL_KEPT", 10)
    index = statistics.resample(23, 0, 4)
    assert statistics.kid(x, y) == pytest.approx(whole, rel=1e-12)
    values = statistics.kid_statistic(x, y)(index)
    np.testing.assert_allclose(values, [statistics.kid(x[row], y) for row in index], rtol=1e-9)


def test_kid_refuses_too_large_subsets_and_other_widths() -> None:
    with pytest.raises(UserError, match="subset of 1000"):
        statistics.kid(gaussian(20, 4), gaussian(20, 4), n_subsets=3)
    with pytest.raises(UserError, match="one width: got 4 and 5"):
        statistics.kid(gaussian(20, 4), gaussian(20, 5))


def test_inception_score_equals_torch_fidelity() -> None:
    logits = RNG.standard_normal((50, 7)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=1)["inception_score_mean"]
    assert statistics.inception_score(softmax(logits, axis=1)) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("n", "splits"), [(50, 10), (53, 10), (10, 10), (37, 3)])
def test_inception_score_over_splits_equals_torch_fidelity(n: int, splits: int) -> None:
    logits = np.random.default_rng(n).standard_normal((n, 7)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=splits)["inception_score_mean"]
    probs = softmax(logits, axis=1)
    assert statistics.inception_score(probs, splits) == pytest.approx(theirs, rel=1e-9)
    assert statistics.inception_score(probs, splits) != pytest.approx(statistics.inception_score(probs), rel=1e-3)
    with pytest.raises(UserError, match=f"over {n + 1} splits needs as many images: got {n}"):
        statistics.inception_score(probs, n + 1)


def test_inception_score_of_groups_is_their_mean_and_ignores_padding() -> None:
    sure = np.eye(4)[np.arange(40) % 4]  # every class once in four: score 4
    none = np.full((40, 3), 1 / 3)  # says nothing: score 1
    assert statistics.inception_score(sure) == pytest.approx(4)
    assert statistics.inception_score(none) == pytest.approx(1)
    grouped = np.stack([sure, np.pad(none, ((0, 0), (0, 1)))], axis=1)
    assert statistics.inception_score(grouped) == pytest.approx(2.5)


def test_clip_score_and_feature_distance_are_per_sample() -> None:
    x, y = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 2.0]])
    np.testing.assert_allclose(statistics.clip_score(x, y), [1, 0])
    np.testing.assert_allclose(statistics.feature_distance(x, y), [0, 5])
    for measure in (statistics.clip_score, statistics.feature_distance):
        with pytest.raises(UserError, match="paired"):
            measure(x, y[:1])
        with pytest.raises(FloatingPointError):
            measure(x, y * np.nan)


def test_kendall_tau_counts_pairs() -> None:
    assert statistics.kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    assert statistics.kendall_tau([1, 2, 3], [3, 2, 1]) == -1


@pytest.mark.parametrize("pair", [([1, 1, 1], [1, 2, 3]), ([1], [2])])
def test_kendall_tau_may_be_undefined(pair: tuple[list[float], list[float]]) -> None:
    assert statistics.kendall_tau(*pair) is None


def test_resamples_are_balanced_halves() -> None:
    index = statistics.resample(10, 0, 6)
    assert index.shape == (6, 5)
    for first, second in zip(index[::2], index[1::2], strict=True):
        assert sorted([*first, *second]) == list(range(10))
    assert statistics.resample(11, 0, 5).shape == (5, 5)
    assert all(len(set(row)) == 5 for row in statistics.resample(11, 0, 5))


@pytest.mark.parametrize("n", [64, 65, 7])
def test_interval_of_a_mean_has_the_right_width(n: int) -> None:
    ratios = []
    for seed in range(40):
        x = np.random.default_rng(seed).standard_normal(n)
        low, high = statistics.interval(statistics.mean_statistic(x), n, seed=0, n_resamples=1000)
        assert low < x.mean() < high
        ratios.append((high - low) / 2 / (1.96 * x.std(ddof=1) / np.sqrt(n)))
    assert np.mean(ratios) == pytest.approx(1, rel=0.08)


def test_interval_of_a_mean_covers_it_95_times_in_100() -> None:
    hits = 0
    for seed in range(200):
        x = np.random.default_rng(seed).standard_normal(40)
        low, high = statistics.interval(statistics.mean_statistic(x), 40, seed)
        hits += low <= 0 <= high
    assert 180 <= hits <= 198


def test_interval_of_fid_spans_its_true_spread() -> None:
    """Its width is the spread of FID over fresh samples of the same size, although FID is biased at that size."""
    n, d = 48, 24
    reference = Stats.of(np.random.default_rng(99).standard_normal((400, d)))
    fresh = [np.random.default_rng(s).standard_normal((n, d)) * 1.3 + 0.2 for s in range(150)]
    values = np.array([statistics.fid(x, reference) for x in fresh])
    bounds = [statistics.interval(statistics.fid_statistic(x, reference), n, 0) for x in fresh[:60]]
    half_widths = [(high - low) / 2 for low, high in bounds]
    assert np.mean(half_widths) == pytest.approx(1.96 * values.std(), rel=0.25)
    covered = np.mean([low <= values.mean() <= high for low, high in bounds])
    assert covered >= 0.85
    for value, (low, high) in zip(values, bounds, strict=False):
        assert low < value < high


def statistics_of(n: int) -> dict[str, statistics.Statistic]:
    x, y = gaussian(n, 6, seed=1), gaussian(2 * n, 6, seed=2)
    probs = softmax(np.random.default_rng(3).standard_normal((n, 2, 4)), axis=2)
    return {
        "fid": statistics.fid_statistic(x, Stats.of(y)),
        "fid, n < d": statistics.fid_statistic(gaussian(n, 40, seed=4), Stats.of(gaussian(60, 40, seed=5))),
        "kid": statistics.kid_statistic(x, y),
        "is": statistics.inception_statistic(probs),
        "is, 3 splits": statistics.inception_statistic(probs, 3),
        "mean": statistics.mean_statistic(x[:, 0]),
    }


@pytest.mark.parametrize("name", statistics_of(24))
def test_statistics_of_subsets_are_those_of_the_subsets(name: str) -> None:
    """Conformance: rows are independent, order within a row does not matter, and seeds decide the interval."""
    statistic = statistics_of(24)[name]
    index = statistics.resample(24, 7, 8)
    values = statistic(index)
    assert values.shape == (8,)
    np.testing.assert_allclose([statistic(row[None])[0] for row in index], values, rtol=1e-7)
    np.testing.assert_allclose(statistic(index[:, ::-1]), values, rtol=1e-7)
    assert len(set(np.round(values, 9))) > 1
    first = statistics.interval(statistic, 24, seed=0)
    assert first == statistics.interval(statistic, 24, seed=0)
    assert first != statistics.interval(statistic, 24, seed=1)
    json.dumps(first)


def test_subset_values_equal_the_plain_functions() -> None:
    x, y, row = gaussian(30, 6, seed=1), gaussian(50, 6, seed=2), np.array([3, 5, 8, 13, 21, 22, 23, 29])
    probs = softmax(x, axis=1)
    wide, other = gaussian(30, 20, seed=3), Stats.of(gaussian(50, 20, seed=4))
    assert statistics.fid_statistic(wide, other)(row[None])[0] == pytest.approx(statistics.fid(wide[row], other), rel=1e-7)
    assert statistics.fid_statistic(x, Stats.of(y))(row[None])[0] == pytest.approx(statistics.fid(x[row], Stats.of(y)), rel=1e-9)
    assert statistics.kid_statistic(x, y)(row[None])[0] == pytest.approx(statistics.kid(x[row], y), rel=1e-9)
    assert statistics.inception_statistic(probs)(row[None])[0] == pytest.approx(statistics.inception_score(probs[row]), rel=1e-9)


def test_fid_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    statistic, index = statistics_of(24)["fid"], statistics.resample(24, 0, 9)
    whole = statistic(index)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 300)
    np.testing.assert_allclose(statistic(index), whole, rtol=1e-12)


def test_paired_interval_cancels_what_both_share() -> None:
    draw = np.random.default_rng(0)
    shared = draw.standard_normal(64) * 10
    a, b = (statistics.mean_statistic(shared + draw.standard_normal(64) * 0.1 + shift) for shift in (0.5, 0.0))
    low, high = statistics.paired_interval(a, b, 64, seed=0)
    assert 0.4 < low < high < 0.6
    alone = statistics.interval(a, 64, seed=0)
    assert alone[1] - alone[0] > 20 * (high - low)


def test_interval_needs_four_samples_and_a_batched_statistic() -> None:
    assert statistics.interval(statistics.mean_statistic([1.0, 2.0, 3.0]), 3, 0) is None
    assert statistics.interval(statistics.mean_statistic([1.0, 2.0, 3.0, 4.0]), 4, 0) is not None
    with pytest.raises(ValueError, match="a statistic maps"):
        statistics.interval(lambda index: np.arange(4.0)[index[:1]].mean(1), 4, 0)


EMPTY: list[Any] = [[], np.empty((0, 4)), np.empty((0, 2, 4)), np.empty((3, 0)), [[]]]


@pytest.mark.parametrize("empty", EMPTY, ids=lambda x: str(np.shape(x)))
@pytest.mark.parametrize(
    "measure",
    [
        statistics.inception_score,
        lambda x: statistics.inception_score(x, 2),
        lambda x: statistics.fid(x, Stats.of(np.eye(4))),
        Stats.of,
        lambda x: statistics.kid(x, np.eye(4)),
        lambda x: statistics.kid(np.eye(4), x),
        lambda x: statistics.kid(x, np.eye(4), n_subsets=2, subset_size=2),
        lambda x: statistics.clip_score(x, x),
        lambda x: statistics.feature_distance(np.eye(4), x),
        statistics.mean_statistic,
    ],
)
def test_no_images_are_too_few(measure: Callable[[Any], Any], empty: Any) -> None:
    with pytest.raises(UserError, match=r"needs at least [12]: got none; raise the number of images"):
        measure(empty)


def test_arrays_of_another_form_are_named() -> None:
    for wrong, measure in (
        (np.ones(3), statistics.inception_score),
        (np.ones((1, 1, 1, 1)), statistics.inception_score),
        (1.0, statistics.inception_score),
        (np.ones((2, 2)), statistics.mean_statistic),
        (np.ones(3), Stats.of),
    ):
        with pytest.raises(UserError, match=r"must be \(N.*: got the shape"):
            measure(wrong)
    with pytest.raises(UserError, match="at least 1 split: got 0"):
        statistics.inception_score(np.ones((2, 2)) / 2, 0)
    with pytest.raises(UserError, match="at least 2: got 1"):
        statistics.kid(np.ones((1, 4)), np.eye(4))
    assert statistics.inception_score([[0.5, 0.5]]) == pytest.approx(1)
