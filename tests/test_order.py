"""The order of sequences: every item once an epoch, in no order one could tell, and fair shares at every moment."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmtrain.data.order import SequenceOrder, Shares, key_of, proportional, shuffled

MANY = 20_000
KEYS = np.concatenate([key_of(0, number) for number in range(MANY)])


def permuted(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """By one key for all, or one a place."""
    return shuffled(places, np.full(len(places), size), np.broadcast_to(key, places.shape))


def permutations(size: int, number: int = MANY) -> np.ndarray:
    """One a row."""
    places = np.tile(np.arange(size), number)
    return permuted(places, size, np.repeat(KEYS[:number], size)).reshape(number, size)


# ------------------------------------------------------------------------------------ shuffling


@pytest.mark.parametrize("size", [*range(1, 70), 1000, 1023, 1024, 1025, 99_991, 2**20 + 1])
def test_it_is_a_bijection_of_any_size(size: int) -> None:
    for key in KEYS[:3, None]:
        assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [10**9 + 7, 2**40, 10**15])
def test_places_of_a_large_one_need_no_others(size: int) -> None:
    places = np.arange(0, size, size // 1000)
    found = permuted(places, size, key_of(1))
    assert len(set(found.tolist())) == len(places)
    assert found.min() >= 0
    assert found.max() < size
    assert permuted(places[500:501], size, key_of(1))[0] == found[500]
    assert abs(np.corrcoef(places, found)[0, 1]) < 0.1


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_are_equally_frequent(size: int) -> None:
    _, counts = np.unique(permutations(size), axis=0, return_counts=True)
    assert len(counts) == math.factorial(size)
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("size", [16, 50, 101])
def test_where_one_goes_tells_nothing_of_the_next(size: int) -> None:
    found = permutations(size)
    distances = np.bincount(((found[:, 1:] - found[:, :-1]) % size).reshape(-1), minlength=size)
    assert distances[0] == 0
    assert stats.chisquare(distances[1:]).pvalue > 0.001
    first_and_last = np.bincount(found[:, 0] * size + found[:, -1], minlength=size**2).reshape(size, size)
    assert stats.chisquare(first_and_last[~np.eye(size, dtype=bool)]).pvalue > 0.001


def test_the_order_is_the_same_in_every_version() -> None:
    """So that a run of today can be repeated with the libraries of tomorrow."""
    assert key_of(7, 0).tolist() == [16920295385781661272]
    assert permuted(np.arange(12), 12, key_of(7, 0)).tolist() == [0, 4, 10, 5, 9, 8, 1, 6, 11, 2, 3, 7]


# ------------------------------------------------------------------------------------ shares

weights_of_sources = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


@given(weights_of_sources)
@settings(deadline=None)
def test_every_source_has_its_share_at_every_moment(weights: list[float]) -> None:
    shares = Shares(weights)
    sources, counts = shares.turns(range(600))
    for source, share in enumerate(shares.fractions):
        had = np.cumsum(sources == source)
        assert np.abs(had - float(share) * np.arange(1, 601)).max() < 2
        assert counts[sources == source].tolist() == list(range(had[-1]))


@given(weights_of_sources, st.integers(0, 10**15), st.integers(0, 50), st.integers(0, 50))
@settings(deadline=None)
def test_turns_follow_from_their_number(weights: list[float], start: int, first: int, second: int) -> None:
    """Wherever one begins to count; and far into a run the bound holds as it did at its beginning."""
    shares = Shares(weights)
    middle, stop = start + first, start + first + second
    parts = [shares.turns(range(start, middle)), shares.turns(range(middle, stop))]
    for part, whole in zip(zip(*parts, strict=True), shares.turns(range(start, stop)), strict=True):
        assert np.concatenate(part).tolist() == whole.tolist()
    before = shares.before(start)
    assert sum(before) == start
    assert all(abs(had - share * start) < 2 for had, share in zip(before, shares.fractions, strict=True))
    if first:
        sources, counts = parts[0]
        assert counts[0] == before[sources[0]]


def test_shares_by_hand() -> None:
    assert Shares([1.0]).turns(range(3, 6))[0].tolist() == [0, 0, 0]
    assert Shares([1, 1]).turns(range(6))[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert Shares([0.1, 0.3]).turns(range(8))[0].tolist() == [1, 1, 0, 1, 1, 1, 0, 1]
    assert Shares([0.1, 0.2]).fractions == [Fraction(1, 3), Fraction(2, 3)], "as written, not as rounded"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 120))
def test_a_part_is_taken_in_proportion(sizes: list[int], number: int) -> None:
    counts = proportional(sizes, number)
    assert sum(counts) == min(number, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert all(abs(c - s * sum(counts) / sum(sizes)) < 2 for c, s in zip(counts, sizes, strict=True))


# ------------------------------------------------------------------------------------ sequences


def test_every_source_is_gone_through_in_epochs_of_its_own() -> None:
    order = SequenceOrder([7, 30, 1], [0.5, 0.3, 0.2], seed=3)
    assert order.epoch_size == 38
    items = order.locate(range(400))
    for source, size in enumerate([7, 30, 1]):
        of_it = items.sources == source
        numbers, draws = items.numbers[of_it], items.draws[of_it]
        epochs = [numbers[start : start + size] for start in range(0, len(numbers) - size + 1, size)]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert size < 7 or not np.array_equal(epochs[0], epochs[1])
        assert len(np.unique(draws)) == -(-len(numbers) // size), "one an epoch"
        assert all(len(np.unique(draws[start : start + size])) == 1 for start in range(0, len(draws), size))


def test_sources_of_one_size_and_seeds_differ() -> None:
    items = SequenceOrder([50, 50], [1, 1], seed=0).locate(range(100))
    one, other = items.numbers[items.sources == 0], items.numbers[items.sources == 1]
    assert not np.array_equal(one, other)
    for seed in (1, 2**63 - 1):
        assert not np.array_equal(one, SequenceOrder([50], [1], seed).locate(range(50)).numbers)
    assert np.array_equal(one, SequenceOrder([50], [1], 0).locate(range(50)).numbers), "whatever it is mixed with"


def test_a_mean_goes_by_the_shares() -> None:
    assert SequenceOrder([5, 5], [3, 1], seed=0).mean([Fraction(2), Fraction(10)]) == 4
