"""The order of sequences in a run: the n-th is of which source, and which of its items, whatever came before.

Every answer is computed from n alone, so nothing is drawn, sorted or remembered at the start of an epoch. Owns the
shares of a mixture and the shuffling. What an item is, a window or a document, is decided in `packed` and `padded`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]

ROUNDS = 8
"""Of the Feistel network, each changing both halves. With six, permutations of five items are not equally frequent."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # states of SplitMix64 lie so far apart
_Tree = int | tuple[Fraction, "_Tree", "_Tree"]  # a source, or the share of the left branch and both branches


def mix(words: Words) -> Words:
    """The output function of SplitMix64 (Steele et al., doi:10.1145/2660193.2660195): a bijection that looks random."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def key_of(*seeds: int) -> Words:
    """One key, as an array of one, from integers of any size; the same in every version of NumPy."""
    return np.random.SeedSequence(seeds).generate_state(1, np.uint64).astype(np.uint64)


def shuffled(places: Integers, sizes: Integers, keys: Words) -> Integers:
    """Where each place goes in a permutation of range(size) that its key chooses. All arrays (B,).

    A Feistel network over pairs of a × b ≥ size (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002),
    walked on until the result is below size. As a × b < size + a, few places walk.
    """
    a = np.sqrt(sizes - 1).astype(np.uint64) + np.uint64(1)
    limits = sizes.astype(np.uint64)
    b = (limits + a - np.uint64(1)) // a
    found = _network(places.astype(np.uint64), a, b, keys)
    while (beyond := found >= limits).any():
        found[beyond] = _network(found[beyond], a[beyond], b[beyond], keys[beyond])
    return found.astype(np.int64)


def _network(words: Words, a: Words, b: Words, keys: Words) -> Words:
    right, left = np.divmod(words, a)
    for _ in range(ROUNDS):
        keys = keys + _GOLDEN
        left = (left + mix(right + keys) % a) % a
        keys = keys + _GOLDEN
        right = (right + mix(left + keys) % b) % b
    return left + a * right


class Shares:
    """Whose turn it is: of any first n turns, every source has its share of n, to within two.

    A tree halves the weights as evenly as whole sources allow. At a node whose left branch has the share p, turn n is
    the left one's if round(n p) grows with it, and each branch counts its own turns. A branch is thus off by at most
    1/2 and p times what its node is off; p is at most 2/3 for a branch of several sources, so these are off by at most
    3/2, and a single source by less than 2. Exact, in fractions of the weights as they are written.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(repr(weight)) for weight in weights]
        self.fractions = [weight / sum(exact) for weight in exact]
        # From heavy to light, which the bound above needs.
        self._tree = self._split(sorted(range(len(exact)), key=lambda source: -exact[source]))

    def _split(self, sources: list[int]) -> _Tree:
        if len(sources) == 1:
            return sources[0]
        sums = list(itertools.accumulate(self.fractions[source] for source in sources))
        cut = min(range(1, len(sources)), key=lambda number: abs(sums[number - 1] - sums[-1] / 2))
        return sums[cut - 1] / sums[-1], self._split(sources[:cut]), self._split(sources[cut:])

    def turns(self, numbers: range) -> tuple[Integers, Integers]:
        """The source of each turn, and how many turns that source had before."""
        return self._turns(self._tree, numbers)

    def _turns(self, node: _Tree, numbers: range) -> tuple[Integers, Integers]:
        if isinstance(node, int):
            return np.full(len(numbers), node), np.arange(numbers.start, numbers.stop)
        share, *branches = node
        before = [_rounded(n, share) for n in range(numbers.start, numbers.stop + 1)]
        is_left = np.diff(before) > 0
        own = range(before[0], before[-1]), range(numbers.start - before[0], numbers.stop - before[-1])
        sources, counts = np.empty((2, len(numbers)), np.int64)
        for branch, turns, where in zip(branches, own, (is_left, ~is_left), strict=True):
            sources[where], counts[where] = self._turns(branch, turns)
        return sources, counts

    def before(self, number: int) -> list[int]:
        """Turns of every source among the first `number`."""
        counts = [0] * len(self.fractions)

        def count(node: _Tree, turns: int) -> None:
            if isinstance(node, int):
                counts[node] = turns
                return
            share, left, right = node
            of_left = _rounded(turns, share)
            count(left, of_left)
            count(right, turns - of_left)

        count(self._tree, number)
        return counts


def _rounded(turns: int, share: Fraction) -> int:
    """Their product to the nearest integer, in Python's integers: it may need more than 64 bits."""
    return (2 * turns * share.numerator + share.denominator) // (2 * share.denominator)


def proportional(sizes: Sequence[int], number: int) -> list[int]:
    """How many to take of each part, in proportion to its size, which is at least 1: `number` together, or all."""
    return list(sizes) if number >= sum(sizes) else Shares(sizes).before(number)


@dataclass(frozen=True)
class Items:
    """What sequences are made of; all arrays (B,)."""

    sources: Integers
    numbers: Integers  # of the item within its source
    draws: Words  # a random word of the source's epoch


class SequenceOrder:
    """Sequence n of a run: an item of one of the sources, each of which is gone through in epochs of its own.

    An epoch visits every item of a source once, in an order of its own.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """`sizes` are the items of every source, at least one each."""
        self.sizes = np.array(sizes)
        self.shares = Shares(weights)
        self._keys = np.concatenate([key_of(seed, source) for source in range(len(sizes))])

    @property
    def epoch_size(self) -> int:
        """Sequences of an epoch: as many as all sources have items. Of a mixture, some are then seen more than once."""
        return int(self.sizes.sum())

    def locate(self, sequences: range) -> Items:
        """The items of consecutive sequences, counted from the beginning of the run."""
        sources, counts = self.shares.turns(sequences)
        epochs, places = np.divmod(counts, self.sizes[sources])
        keys = mix(self._keys[sources] + _GOLDEN * epochs.astype(np.uint64))
        return Items(sources, shuffled(places, self.sizes[sources], keys), draws=mix(keys))

    def mean(self, by_source: Sequence[Fraction]) -> Fraction:
        """The mean over sequences of what has these means over the items of each source."""
        return sum((p * mean for p, mean in zip(self.shares.fractions, by_source, strict=True)), Fraction(0))
