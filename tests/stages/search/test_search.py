"""The search on landscapes whose truth is known: phases, repair, tiers, finals, and who never scores twice."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from itertools import chain, combinations

import numpy as np
import pytest
import tiny

from blockprune.cost.latency import fitted_savings
from blockprune.errors import UserError
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.presets import fitting
from blockprune.model.trace import trace
from blockprune.runs.records import Candidate, Evaluation
from blockprune.stages.search.budget import parse_budget
from blockprune.stages.search.proposals import SAMPLERS, sampler_of
from blockprune.stages.search.search import Chance, Listed, Strategy, Tiers, finalists, search
from blockprune.stages.search.space import Space
from blockprune.stages.search.storage import open_storage
from blockprune.stages.search.trials import Trials

GRAPH = trace(tiny.config("sd1"))
STAGES = GRAPH.units("stage")
BLOCKS = GRAPH.units("block") | {"innermost": STAGES["innermost"]}
PRESETS = fitting(GRAPH)


def space(units: dict[str, Architecture], *budgets: str) -> Space:
    return Space(GRAPH, units, [parse_budget(b, GRAPH, 10**5, None) for b in budgets])


class Landscape:
    """Losses that add up but for interactions, and how often each architecture was asked for."""

    def __init__(self, of: Space, strength: float = 0.5, direction: float = 1.0) -> None:
        draw, self.space, self.direction = random.Random(0), of, direction
        self.alone = {label: draw.random() ** 3 for label in of.labels}
        self.pairs = {p: strength * draw.gauss(0, 1) * self.alone[p[0]] for p in combinations(of.labels, 2)}
        self.asked: list[tuple[str, int | None]] = []

    def loss(self, arch: Architecture) -> float:
        inside = [label for label, unit in self.space.units.items() if unit <= arch]
        return sum(self.alone[i] for i in inside) + sum(v for (a, b), v in self.pairs.items() if a in inside and b in inside)

    def __call__(self, arch: Architecture, label: str, n: int | None = None) -> Score:
        self.asked.append((arch.key, n))
        loss = self.loss(arch)
        return Score(arch.key, label, "eps_mse", loss, n or 100, 0, loss - 10 / (n or 100), loss + 10 / (n or 100))

    def plain(self, candidate: Candidate, _: Sequence[Evaluation]) -> tuple[Score, ...]:
        return (self(candidate.arch, candidate.label),)


def study(measure: str = "eps_mse") -> Trials:
    return Trials(open_storage(None, None), "s", measure, {"objective": measure})


def test_phases_come_in_order_and_are_all_charged() -> None:
    of = space(BLOCKS, "70%params")
    found = list(search(study(), Strategy(of, [of], PRESETS, n_exact=5), Landscape(of).plain, 70))
    sources = [e.candidate.source for e in found]
    assert len(found) == 70
    assert list(dict.fromkeys(sources)) == ["scan", "exact", "preset", "tpe", "near"]
    assert sources.count("scan") == len(BLOCKS)
    assert {e.score.label for e in found if e.candidate.source == "preset"} == {"bk-sdm-small", "bk-sdm-tiny"}
    assert len({e.candidate.arch for e in found}) == 70
    assert all(e.candidate.fits for e in found if e.candidate.source != "scan")
    costs = [GRAPH.cost(e.candidate.arch).params for e in found]
    assert [e.candidate.costs["params"] for e in found] == costs


def test_it_ends_at_the_optimum_and_when_all_is_known() -> None:
    names = ("down_blocks.1", "down_blocks.2", "innermost", "mid_block", "up_blocks.1", "up_blocks.2")
    few = {label: STAGES[label] for label in names}
    of = space(few, "75%params")
    every = (frozenset(c) for c in chain.from_iterable(combinations(few, r) for r in range(1, len(few) + 1)))
    feasible = {of.arch(c) for c in every if of.valid(c) and of.fits(c)}
    landscape = Landscape(of, 3.0)
    found = [e for e in search(study(), Strategy(of, [of], {}), landscape.plain) if e.candidate.fits]
    assert {e.candidate.arch for e in found} <= feasible
    assert len(found) > 0.8 * len(feasible)
    assert min(e.loss for e in found) == pytest.approx(min(map(landscape.loss, feasible)))
    assert len(landscape.asked) == len(set(landscape.asked))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_proposes_new_sets_within_the_budget(sampler: str) -> None:
    of, n = space(STAGES, "75%params", "90%macs"), 4 if sampler == "gp" else 16  # which takes seconds for each
    found = list(search(study(), Strategy(of, [of], {}, sampler, n_exact=1), Landscape(of).plain, len(STAGES) + 1 + n))
    proposed = [e for e in found if e.candidate.source == sampler]
    assert len(proposed) >= n // 2
    assert all(e.candidate.fits for e in proposed)


def test_unknown_sampler() -> None:
    with pytest.raises(UserError, match="unknown sampler 'cma'"):
        sampler_of("cma", 0)


def test_same_seed_same_search() -> None:
    of = space(BLOCKS, "65%params")
    runs = [[e.candidate.arch for e in search(study(), Strategy(of, [of], {}, seed=s), Landscape(of).plain, 60)] for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_too_few_trials_for_a_scan_take_the_presets_first() -> None:
    of = space(BLOCKS, "70%params")
    found = list(search(study(), Strategy(of, [of], PRESETS, n_exact=0, scan=False), Landscape(of).plain, 5))
    assert [e.candidate.source for e in found] == ["preset", "preset", "tpe", "near", "tpe"]


def test_a_resumed_search_goes_on_where_it_was() -> None:
    of = space(STAGES, "75%params")
    shared, landscape = study(), Landscape(of)
    first = list(search(shared, Strategy(of, [of], {}), landscape.plain, 12))
    second = list(search(shared, Strategy(of, [of], {}), landscape.plain, 20))
    assert len(first) == 12
    assert len(second) == 8
    assert len(landscape.asked) == len(set(landscape.asked)) == 20


def test_higher_is_better_measures_are_maximised() -> None:
    of, shared = space(STAGES, "75%params"), study("clip_score")
    landscape = Landscape(of)

    def score(c: Candidate, _: Sequence[Evaluation]) -> tuple[Score, ...]:
        return (Score(c.arch.key, c.label, "clip_score", 1 - landscape.loss(c.arch), 4, 0),)

    found = list(search(shared, Strategy(of, [of], {}, teacher=True), score, 25))
    assert found[0].score.label == "full"
    best = min((e for e in found if e.candidate.fits), key=lambda e: e.loss)
    assert best.score.value == max(e.score.value or 0 for e in found if e.candidate.fits)
    assert best.candidate == finalists(found, [of], 1)[0]
    assert shared.study.direction.name == "MAXIMIZE"


def test_failed_units_are_avoided_not_fatal() -> None:
    of = space(STAGES, "75%params")
    landscape = Landscape(of)

    def score(c: Candidate, _: Sequence[Evaluation]) -> tuple[Score, ...]:
        broken = "mid_block" in c.arch
        return (
            Score(c.arch.key, c.label, "eps_mse", None if broken else landscape.loss(c.arch), 4, 0, error="NaN" if broken else ""),
        )

    found = list(search(study(), Strategy(of, [of], {}), score, 20))
    assert len(found) == 20
    exact = [e for e in found if e.candidate.source == "exact"]
    assert "mid_block" not in exact[0].candidate.arch
    assert all(e.score.value is not None for e in finalists_of(found, of))


def finalists_of(found: Sequence[Evaluation], of: Space) -> list[Evaluation]:
    keys = {c.arch for c in finalists(found, [of], 4)}
    return [e for e in found if e.candidate.arch in keys]


def test_tiers_stop_what_is_clearly_worse_and_nothing_else() -> None:
    of = space(BLOCKS, "65%params")
    landscape = Landscape(of)
    tiers = Tiers(landscape, [25, 100], rank=3)
    found = list(search(study(), Strategy(of, [of], {}), tiers, 90))
    whole, stopped = ([e for e in found if len(e.tiers) == n] for n in (2, 1))
    assert stopped
    assert [s.n for s in whole[0].tiers] == [25, 100]
    best = min(whole, key=lambda e: e.loss)
    assert all(e.loss > best.loss for e in stopped)
    assert len([1 for _, n in landscape.asked if n == 100]) == len(whole)


def test_what_is_given_is_scored_and_chosen_from() -> None:
    of = space(BLOCKS, "70%params")
    given = {"least": of.arch(frozenset(of.labels))}
    found = list(search(study(), Strategy(of, [of], {}, n_exact=2, given=given), Landscape(of).plain, len(BLOCKS) + 9))
    sources = [e.candidate.source for e in found]
    assert list(dict.fromkeys(sources)) == ["scan", "given", "exact", "tpe", "near"]
    assert max(found, key=lambda e: e.loss * e.candidate.fits).candidate.label == "least"
    assert finalists(found, [of], 1)[1:] == [e.candidate for e in found if e.candidate.source == "given"]


def test_a_front_looks_in_every_space() -> None:
    spaces = [space(BLOCKS, f"{p}%params") for p in (80, 65, 55)]
    free = space(BLOCKS)
    found = list(search(study(), Strategy(free, spaces, PRESETS, n_exact=2), Landscape(free).plain, 70))
    for sources in (["tpe", "near"], ["exact"]):
        tightest = [sum(s.holds(e.candidate.arch) for s in spaces) for e in found if e.candidate.source in sources]
        shares = [tightest.count(n) / len(tightest) for n in (1, 2, 3)]
        assert min(shares) > 0.2, (sources, shares)  # a third of them for each budget, of which some hold the next one, too
    chosen = finalists(found, spaces, 1)
    for s in spaces:
        inside = [e for e in found if s.holds(e.candidate.arch)]
        assert min(inside, key=lambda e: e.loss).candidate in chosen
    best = [min(e.loss for e in found if s.holds(e.candidate.arch)) for s in spaces]
    assert best[0] < best[1] < best[2]
    assert {c.label for c in chosen} >= {"bk-sdm-tiny", "bk-sdm-small"}


def test_chance_stays_within_the_budget() -> None:
    of = space(BLOCKS, "65%params")
    found = list(search(study(), Chance(Strategy(of, [of], {}), 0), Landscape(of).plain, 30))
    assert len(found) == 30
    assert all(e.candidate.fits and e.candidate.source == "random" for e in found)
    sizes = [len(e.candidate.arch) for e in found]
    assert max(sizes) > min(sizes)


def test_listed_candidates_are_scored_once_each() -> None:
    of = space(STAGES, "75%params")
    strategy, landscape = Strategy(of, [of], {}), Landscape(of)
    listed = [strategy.candidate(frozenset({label}), "x", label) for label in list(STAGES)[:3]]
    assert [e.score.label for e in search(study(), Listed(listed), landscape.plain)] == list(STAGES)[:3]


class Waiting:
    """A source with nothing to offer as long as somebody else is at work."""

    def candidates(self, evaluations: Sequence[Evaluation], known: Collection[str]) -> list[Candidate]:
        return []


def test_a_search_waits_for_what_others_hold() -> None:
    of, shared = space(STAGES, "75%params"), study()
    strategy = Strategy(of, [of], {})
    shared.add([strategy.candidate(frozenset({"mid_block"}), "scan", "mid_block")])
    other = Trials(shared.storage, "s", "eps_mse", {"objective": "eps_mse"})
    trial = other.claim()
    assert trial is not None
    other.storage.set_trial_user_attr(trial._trial_id, "worker", shared.worker.rpartition(":")[0] + ":gone")
    found = list(search(shared, Waiting(), Landscape(of).plain))
    assert [e.score.label for e in found] == ["mid_block"]


def test_bounds_are_losses() -> None:
    up = Score("", "", "clip_score", 0.5, 1, 0, 0.4, 0.7)
    assert up.bounds == (-0.7, -0.4)
    assert up.loss == -0.5
    assert Score("", "", "fid", None, 1, 0).loss == math.inf
    assert Score("", "", "fid", 3.0, 1, 0).bounds == (3.0, 3.0)


def test_savings_are_fitted_to_sets_and_stay_near_what_units_save_alone() -> None:
    draw = np.random.default_rng(0)
    true = draw.random(20) * 0.01
    sets = draw.random((12, 20)) < 0.4
    noisy = 0.5 * true + 0.002 * draw.standard_normal(20)  # alone everything seems to save half, and noisily
    fitted = np.array(fitted_savings(noisy, sets, sets @ true))
    other = draw.random((50, 20)) < 0.4
    before, after = (np.abs(other @ guess - other @ true).mean() for guess in (noisy, fitted))
    assert after < before / 3
    assert (fitted >= 0).all()
    assert fitted_savings([0.1, 0.2], [[True, True]], [0.3]) == pytest.approx([0.1, 0.2])
