"""Which documents train, validate and test: shares, order, copies, and that no side is empty."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data import division as division_module
from lmtrain.data.division import (
    CUT,
    LEFT_OUT,
    Division,
    divide,
    divide_by_document,
    divide_tail,
    leave_out_copies,
    place,
)
from lmtrain.data.prepared import SPLITS
from lmtrain.errors import DataError

TRAIN, VAL, TEST = map(place, SPLITS)


def by_document(values: np.ndarray, val_fraction: float, test_fraction: float) -> Division:
    return divide_by_document(values, np.unique(values), val_fraction=val_fraction, test_fraction=test_fraction)


def digests(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def tail(texts: list[str], val: float, test: float = 0.0) -> Division:
    names = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return divide_tail(
        digests(*(names[text] for text in texts)),
        np.array([len(text) for text in texts]),
        val_fraction=val,
        test_fraction=test,
        divisible=True,
    )


def parts(text: str, side: int, cut: tuple[int, int] | None) -> list[str]:
    if cut is not None:
        return [text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :]]
    return [text if side == other else "" for other in (TRAIN, VAL, TEST)]


def test_whole_documents_go_by_the_order_of_their_digests() -> None:
    values = random.Random(0).sample(range(2**62), 100)
    division = by_document(digests(*values), val_fraction=0.1, test_fraction=0.2)
    in_order = sorted(values)
    sides = dict(zip(values, division.sides.tolist(), strict=True))
    assert [value for value in in_order if sides[value] == VAL] == in_order[:10]
    assert [value for value in in_order if sides[value] == TEST] == in_order[10:30]
    assert not division.cuts
    doubled = by_document(digests(*values, *values[:7]), val_fraction=0.1, test_fraction=0.2)
    assert doubled.sides.tolist() == [*division.sides.tolist(), *division.sides[:7].tolist()]


def test_one_document_more_moves_at_most_one() -> None:
    values = random.Random(1).sample(range(2**62), 101)
    few = by_document(digests(*values[:100]), val_fraction=0.2, test_fraction=0.0).sides
    more = by_document(digests(*values), val_fraction=0.2, test_fraction=0.0).sides
    assert np.count_nonzero(few != more[:100]) <= 1


def test_auto_divides_documents_from_twenty_different_ones() -> None:
    def sides(count: int, mode: str) -> list[int]:
        values, lengths = digests(*range(count), *range(count)), np.full(2 * count, 10)
        return divide(  # type: ignore[no-any-return]
            values,
            lengths,
            mode,  # type: ignore[arg-type]
            val_fraction=0.1,
            test_fraction=0.0,
            divisible=True,
        ).sides.tolist()

    assert sides(19, "auto") == sides(19, "tail")
    assert sides(20, "auto") == sides(20, "document") != sides(20, "tail")


def test_the_tail_is_cut_where_it_falls() -> None:
    texts = ["a" * 50, "b" * 30, "c" * 20, "d" * 100]
    division = tail(texts, 0.55)
    assert division.sides.tolist() == [TRAIN, TRAIN, CUT, VAL]
    assert division.cuts == {2: (10, 120)}
    both = tail(["e" * 100], 0.2, 0.1)
    assert parts("e" * 100, CUT, both.cuts[0]) == ["e" * 70, "e" * 20, "e" * 10]


def test_copies_are_on_the_side_of_their_original() -> None:
    one, other = "abcdefghij", "klmnopqrst"
    division = tail([one, other, other, one], 0.25)
    assert division.sides.tolist() == [TRAIN, CUT, CUT, TRAIN]
    assert division.cuts == {1: (5, 10), 2: (5, 10)}
    left = leave_out_copies(digests(0, 1, 1, 0), division)
    assert left.sides.tolist() == [TRAIN, CUT, LEFT_OUT, LEFT_OUT]
    assert left.cuts == {1: (5, 10)}


def test_what_must_stay_whole_is_counted_not_cut() -> None:
    division = divide_tail(
        digests(*range(5)), np.array([1, 1, 1, 1, 100]), val_fraction=0.4, test_fraction=0.0, divisible=False
    )
    assert division.sides.tolist() == [TRAIN, TRAIN, TRAIN, VAL, VAL]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_no_side_is_ever_empty(fraction: float) -> None:
    assert parts("ab", CUT, tail(["ab"], fraction).cuts[0]) == ["a", "b", ""]
    assert sorted(by_document(digests(1, 2), val_fraction=fraction, test_fraction=0.0).sides) == [TRAIN, VAL]
    three = by_document(digests(1, 2, 3), val_fraction=fraction * 0.6, test_fraction=fraction * 0.4)
    assert sorted(three.sides) == [TRAIN, VAL, TEST]


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match=r"needs 2 different documents, found 1; use data\.split=tail"):
        by_document(digests(5, 5), val_fraction=0.1, test_fraction=0.0)
    with pytest.raises(DataError, match="1 character: too little"):
        tail(["x"], 0.1)


@given(
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=12),
    st.floats(0.01, 0.6),
    st.sampled_from([0.0, 0.1, 0.3]),
)
def test_the_tail_loses_nothing_and_leaks_nothing(texts: list[str], val: float, test: float) -> None:
    if sum(map(len, set(texts))) < 3:
        return
    division = tail(texts, val, test)
    found = [
        parts(text, side, division.cuts.get(n))
        for n, (text, side) in enumerate(zip(texts, division.sides, strict=True))
    ]
    assert ["".join(part) for part in found] == texts
    by_text: dict[str, list[str]] = {}
    for text, part in zip(texts, found, strict=True):
        assert by_text.setdefault(text, part) == part
    different = list(dict.fromkeys(texts))
    order = "".join(name * len(by_text[text][place]) for text in different for place, name in enumerate("TVX"))
    assert order == "".join(sorted(order, key="TVX".index)), "training comes first, the test last"
    assert "T" in order
    assert "V" in order
    assert ("X" in order) == (test > 0)


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=40), st.integers(1, 9))
def test_digests_are_sorted_once_each(values: list[int], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(division_module, "CHUNK", chunk)
        assert division_module.sorted_once(digests(*values)).tolist() == sorted(set(values))
