"""Intervals cover what they should, and every statistic of subsets is that of the subsets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import softmax

from blockprune.measures import fid_kid, intervals
from blockprune.measures.fid_kid import Stats

RNG = np.random.default_rng(0)


def gaussian(n: int, d: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, d)) @ draw.standard_normal((d, d)) + shift


def test_kendall_tau_counts_pairs() -> None:
    assert intervals.kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    assert intervals.kendall_tau([1, 2, 3], [3, 2, 1]) == -1


@pytest.mark.parametrize("pair", [([1, 1, 1], [1, 2, 3]), ([1], [2])])
def test_kendall_tau_may_be_undefined(pair: tuple[list[float], list[float]]) -> None:
    assert intervals.kendall_tau(*pair) is None


def test_resamples_are_balanced_halves() -> None:
    index = intervals.resample(10, 0, 6)
    assert index.shape == (6, 5)
    for first, second in zip(index[::2], index[1::2], strict=True):
        assert sorted([*first, *second]) == list(range(10))
    assert intervals.resample(11, 0, 5).shape == (5, 5)
    assert all(len(set(row)) == 5 for row in intervals.resample(11, 0, 5))


@pytest.mark.parametrize("n", [64, 65, 7])
def test_interval_of_a_mean_has_the_right_width(n: int) -> None:
    ratios = []
    for seed in range(40):
        x = np.random.default_rng(seed).standard_normal(n)
        low, high = intervals.interval(intervals.mean_statistic(x), n, seed=0, n_resamples=1000)
        assert low < x.mean() < high
        ratios.append((high - low) / 2 / (1.96 * x.std(ddof=1) / np.sqrt(n)))
    assert np.mean(ratios) == pytest.approx(1, rel=0.08)


def test_interval_of_a_mean_covers_it_95_times_in_100() -> None:
    hits = 0
    for seed in range(200):
        x = np.random.default_rng(seed).standard_normal(40)
        low, high = intervals.interval(intervals.mean_statistic(x), 40, seed)
        hits += low <= 0 <= high
    assert 180 <= hits <= 198


def test_interval_of_fid_spans_its_true_spread() -> None:
    """Its width is the spread of FID over fresh samples of the same size, although FID is biased at that size."""
    n, d = 48, 24
    reference = Stats.of(np.random.default_rng(99).standard_normal((400, d)))
    fresh = [np.random.default_rng(s).standard_normal((n, d)) * 1.3 + 0.2 for s in range(150)]
    values = np.array([fid_kid.fid(x, reference) for x in fresh])
    bounds = [intervals.interval(fid_kid.fid_statistic(x, reference), n, 0) for x in fresh[:60]]
    half_widths = [(high - low) / 2 for low, high in bounds]
    assert np.mean(half_widths) == pytest.approx(1.96 * values.std(), rel=0.25)
    covered = np.mean([low <= values.mean() <= high for low, high in bounds])
    assert covered >= 0.85
    for value, (low, high) in zip(values, bounds, strict=False):
        assert low < value < high


def statistics_of(n: int) -> dict[str, intervals.Statistic]:
    x, y = gaussian(n, 6, seed=1), gaussian(2 * n, 6, seed=2)
    probs = softmax(np.random.default_rng(3).standard_normal((n, 2, 4)), axis=2)
    return {
        "fid": fid_kid.fid_statistic(x, Stats.of(y)),
        "fid, n < d": fid_kid.fid_statistic(gaussian(n, 40, seed=4), Stats.of(gaussian(60, 40, seed=5))),
        "kid": fid_kid.kid_statistic(x, y),
        "is": fid_kid.inception_statistic(probs),
        "is, 3 splits": fid_kid.inception_statistic(probs, 3),
        "mean": intervals.mean_statistic(x[:, 0]),
    }


@pytest.mark.parametrize("name", statistics_of(24))
def test_statistics_of_subsets_are_those_of_the_subsets(name: str) -> None:
    """Conformance: rows are independent, order within a row does not matter, and seeds decide the interval."""
    statistic = statistics_of(24)[name]
    index = intervals.resample(24, 7, 8)
    values = statistic(index)
    assert values.shape == (8,)
    np.testing.assert_allclose([statistic(row[None])[0] for row in index], values, rtol=1e-7)
    np.testing.assert_allclose(statistic(index[:, ::-1]), values, rtol=1e-7)
    assert len(set(np.round(values, 9))) > 1
    first = intervals.interval(statistic, 24, seed=0)
    assert first == intervals.interval(statistic, 24, seed=0)
    assert first != intervals.interval(statistic, 24, seed=1)
    json.dumps(first)


def test_subset_values_equal_the_plain_functions() -> None:
    x, y, row = gaussian(30, 6, seed=1), gaussian(50, 6, seed=2), np.array([3, 5, 8, 13, 21, 22, 23, 29])
    probs = softmax(x, axis=1)
    wide, other = gaussian(30, 20, seed=3), Stats.of(gaussian(50, 20, seed=4))
    assert fid_kid.fid_statistic(wide, other)(row[None])[0] == pytest.approx(fid_kid.fid(wide[row], other), rel=1e-7)
    assert fid_kid.fid_statistic(x, Stats.of(y))(row[None])[0] == pytest.approx(fid_kid.fid(x[row], Stats.of(y)), rel=1e-9)
    assert fid_kid.kid_statistic(x, y)(row[None])[0] == pytest.approx(fid_kid.kid(x[row], y), rel=1e-9)
    assert fid_kid.inception_statistic(probs)(row[None])[0] == pytest.approx(fid_kid.inception_score(probs[row]), rel=1e-9)


def test_fid_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    statistic, index = statistics_of(24)["fid"], intervals.resample(24, 0, 9)
    whole = statistic(index)
    monkeypatch.setattr(fid_kid, "_CHUNK_ELEMENTS", 300)
    np.testing.assert_allclose(statistic(index), whole, rtol=1e-12)


def test_paired_interval_cancels_what_both_share() -> None:
    draw = np.random.default_rng(0)
    shared = draw.standard_normal(64) * 10
    a, b = (intervals.mean_statistic(shared + draw.standard_normal(64) * 0.1 + shift) for shift in (0.5, 0.0))
    low, high = intervals.paired_interval(a, b, 64, seed=0)
    assert 0.4 < low < high < 0.6
    alone = intervals.interval(a, 64, seed=0)
    assert alone[1] - alone[0] > 20 * (high - low)


def test_interval_needs_four_samples_and_a_batched_statistic() -> None:
    assert intervals.interval(intervals.mean_statistic([1.0, 2.0, 3.0]), 3, 0) is None
    assert intervals.interval(intervals.mean_statistic([1.0, 2.0, 3.0, 4.0]), 4, 0) is not None
    with pytest.raises(ValueError, match="a statistic maps"):
        intervals.interval(lambda index: np.arange(4.0)[index[:1]].mean(1), 4, 0)
