"""Racing: images go to the removals whose rank is open, and no more to one that is clear of its neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from blockprune.measures.intervals import Statistic, paired_interval, value_of

N_ROUNDS, LEAST = 8, 8  # of fewer images than that an interval says little


def rounds_of(n_images: int) -> list[int]:
    """How many images a removal has got after each round, as long as its rank is open."""
    return sorted({min(n_images, max(LEAST, -(-n_images * i // N_ROUNDS))) for i in range(1, N_ROUNDS + 1)})


class Race:
    """How many images each removal gets (`wanted`), and whose rank is `open`: it may get more after this round.

    The same statistics give the same race, whichever process asks, and in whatever order images were drawn. With one round
    everything gets its images and nothing is open.
    """

    def __init__(self, labels: Iterable[str], rounds: Iterable[int], seed: int) -> None:
        first, *self._rounds = rounds
        self.wanted, self.seed = dict.fromkeys(labels, first), seed
        self.open = set(self.wanted) if self._rounds else set[str]()

    def end_round(self, statistics: Mapping[str, Statistic]) -> None:
        """Goes on with those that the 95 % interval of the paired difference does not tell from a neighbour in the ranking.

        `statistics` are of all images that each removal has got; one without is out, for it has failed.
        """
        order = sorted(statistics, key=lambda label: value_of(statistics[label], self.wanted[label]))
        ties = [pair for pair in pairwise(order) if not self._clear(*pair, statistics)]
        self.open &= {label for pair in ties for label in pair}
        self.wanted |= dict.fromkeys(self.open, self._rounds.pop(0))
        if not self._rounds:
            self.open = set()

    def _clear(self, one: str, other: str, statistics: Mapping[str, Statistic]) -> bool:
        """True when the difference of two removals over the images that both have got is beyond its interval."""
        n = min(self.wanted[one], self.wanted[other])
        found = paired_interval(statistics[one], statistics[other], n, self.seed)
        return found is not None and not found[0] <= 0 <= found[1]
