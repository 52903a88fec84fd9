"""Budgets as text, and the exact best removal sets against enumeration."""

from __future__ import annotations

import random
from itertools import chain, combinations, product

import pytest
import tiny

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.presets import fitting
from blockprune.model.trace import trace
from blockprune.stages.search.budget import Budget, parse_budget
from blockprune.stages.search.problem import units_of
from blockprune.stages.search.proposals import Proposer
from blockprune.stages.search.space import Space

GRAPH = trace(tiny.config("sd1"))
STAGES = GRAPH.units("stage")
BLOCKS = GRAPH.units("block") | {"innermost": STAGES["innermost"]}


def budget(text: str) -> Budget:
    return parse_budget(text, GRAPH, 10**5, 0.1)


def scores(labels: dict[str, Architecture], seed: int = 0) -> dict[str, float]:
    draw = random.Random(seed)
    return {label: draw.random() for label in labels}


@pytest.mark.parametrize(
    ("text", "quantity", "limit"),
    [
        ("0.3M", "params", 200_000),
        ("300K", "params", 200_000),
        ("2.5MMACs", "macs", 2_500_000),
        ("70ms", "latency", 0.07),
        ("50%macs", "macs", GRAPH.total.thop / 2),
        ("50%latency", "latency", 0.05),
        ("50%params", "params", (GRAPH.total.params + 10**5) / 2 - 10**5),
    ],
)
def test_budgets_read(text: str, quantity: str, limit: float) -> None:
    assert (budget(text).quantity, budget(text).limit) == (quantity, pytest.approx(limit))


def test_scope_counts_the_unet_alone() -> None:
    assert parse_budget("0.2M", GRAPH, 10**9, None, scope="unet").limit == 200_000


@pytest.mark.parametrize("text", ["", "big", "5", "5%", "-3M", "3BMACs", "7%ms", "1.2.3M"])
def test_budgets_that_say_nothing(text: str) -> None:
    with pytest.raises(UserError, match="cannot read the budget"):
        budget(text)


def test_percent_of_an_unmeasured_latency() -> None:
    with pytest.raises(UserError, match="needs the teacher's latency"):
        parse_budget("50%latency", GRAPH, 0, None)


def test_best_sets_equal_enumeration() -> None:
    space = Space(GRAPH, STAGES, [budget("60%params"), budget("70%macs")])
    values = scores(STAGES)
    every = (frozenset(c) for c in chain.from_iterable(combinations(STAGES, r) for r in range(len(STAGES) + 1)))
    sums = sorted(sum(values[label] for label in c) for c in every if space.valid(c) and space.fits(c))
    found = list(space.best(values, 6))
    assert [sum(values[label] for label in c) for c in found] == pytest.approx(sums[:6])
    assert len(set(found)) == 6


@pytest.mark.parametrize("seed", range(5))
def test_found_sets_hold_the_budgets_at_the_exact_price(seed: int) -> None:
    budgets = [budget("55%params"), budget("80%macs")]
    space, values = Space(GRAPH, BLOCKS, budgets), scores(BLOCKS, seed)
    start = random.Random(seed).sample(list(BLOCKS), 6)
    best, second, *_ = space.best(values, 3)
    minimal = [best, space.repair(start, values), space.repair([], values)]
    for choice in [*minimal, second]:
        assert choice is not None
        assert space.valid(choice)
        cost = GRAPH.cost(GRAPH.check(space.arch(choice)))
        assert all(b.of(cost, 0.0, "thop") <= b.limit for b in budgets)
        if choice in minimal:
            assert all(not space.fits(choice - {label}) or not space.valid(choice - {label}) for label in choice)


FITTED = units_of(GRAPH, "stage", Architecture(), ("channel", "linear"))


def test_a_unit_stays_goes_or_goes_with_a_fit() -> None:
    space = Space(GRAPH, FITTED, [])
    assert set(space.choices) == set(STAGES)
    assert space.choices["mid_block"] == ("mid_block", "mid_block~channel", "mid_block~linear")
    for labels in space.choices.values():
        assert all(pair in space.exclusive for pair in combinations(labels, 2))
    assert ("mid_block~linear", "innermost") in space.exclusive or ("innermost", "mid_block~linear") in space.exclusive
    assert space.choice(Architecture({"mid_block~linear"})) == {"mid_block~linear"}
    assert space.choice(Architecture({"mid_block"})) == {"mid_block"}


def test_best_sets_with_fits_equal_enumeration_and_cost_exactly() -> None:
    budgets = [budget("70%params"), budget("80%macs")]
    few = {label: arch for label, arch in FITTED.items() if not label.startswith("down_blocks.0")}
    space, values = Space(GRAPH, few, budgets), scores(few)
    options = [(None, *labels) for labels in space.choices.values()]
    every = (frozenset(filter(None, c)) for c in product(*options))
    fitting_sets = {c for c in every if space.valid(c) and space.fits(c)}
    for c in list(fitting_sets)[:200]:
        cost = GRAPH.cost(GRAPH.check(space.arch(c)))
        assert all(b.of(cost, 0.0, "thop") <= b.limit for b in budgets)
        assert space.choice(space.arch(c)) == c
    found = list(space.best(values, 6))
    assert set(found) <= fitting_sets
    assert [sum(values[label] for label in c) for c in found] == pytest.approx(
        sorted(sum(values[label] for label in c) for c in fitting_sets)[:6]
    )


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_proposals_with_fits_are_valid_and_new(sampler: str) -> None:
    space = Space(GRAPH, FITTED, [budget("70%params")])
    proposer, known, kinds = Proposer(space, sampler, 0, scores(FITTED)), set[str](), set[str]()
    for _ in range(12):
        proposal = proposer.ask(known)
        assert proposal is not None
        arch = GRAPH.check(space.arch(proposal[1]))
        assert space.valid(proposal[1]) and space.fits(proposal[1]) and arch.key not in known
        known.add(arch.key)
        kinds |= {kind for _, kind in arch.fits}
    assert kinds == {"channel", "linear"}


def test_presets_are_points_of_the_space() -> None:
    space = Space(GRAPH, BLOCKS, [])
    for arch in fitting(GRAPH).values():
        choice = space.choice(arch)
        assert choice is not None
        assert space.arch(choice) == arch
    assert space.choice(Architecture(frozenset({"mid_block.attentions.0.transformer_blocks.0"}))) is None


def test_impossible_budget_names_the_smallest() -> None:
    space = Space(GRAPH, BLOCKS, [budget("110K")])
    smallest = GRAPH.total.params - space.savings[0] @ [label in {"x"} for label in space.labels]
    with pytest.raises(
        UserError, match=r"no removal meets the budget 110K: the least to be had is [\d.]+M parameters of the whole"
    ):
        space.check()
    assert 10**4 < space.smallest()["110K"] < smallest
