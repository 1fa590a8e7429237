"""What seeds allow to conclude, against hand computation and scipy's own tests."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lmtrain.sweep.statistics import (
    BEST,
    TIED,
    UNKNOWN,
    UNSTABLE,
    WORSE,
    Interval,
    Judgement,
    holm,
    judge,
    judge_alone,
)


@dataclasses.dataclass(frozen=True)
class Runs:
    values: Mapping[int, float]
    mishaps: Mapping[int, str] = dataclasses.field(default_factory=dict)


def runs(*values: float, first_seed: int = 0) -> Runs:
    return Runs(dict(enumerate(values, start=first_seed)))


def test_an_interval_is_students() -> None:
    # By hand: s = 1.2910, s/√4 = 0.6455, t(0.975; 3) = 3.1824, half the width 2.0543.
    found = Interval.of([1.0, 2.0, 3.0, 4.0])
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, 0.445740, 4.554260), abs=1e-6)
    assert Interval.of([1.0]) is None


def test_runs_of_common_seeds_are_compared_pair_by_pair() -> None:
    ours, best = [3.02, 3.11, 2.94, 3.30], [3.00, 3.05, 2.95, 3.21]
    (found,) = judge(runs(*best), [runs(*ours)])
    expected = stats.ttest_rel(ours, best)
    assert found.paired
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-12)
    assert isinstance(found.difference, Interval)
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_only_the_seeds_in_common_make_pairs() -> None:
    (found,) = judge(runs(1.0, 2.0, 3.0), [runs(2.5, 3.6, 9.9, first_seed=1)])  # seeds 1 and 2
    # By hand: differences 0.5 and 0.6; mean 0.55, error 0.05; t = 11, one degree of freedom: p = 2/π · atan(1/11).
    assert found.p_value == pytest.approx(2 / math.pi * math.atan(1 / 11))
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(0.55)


def test_runs_of_other_seeds_are_compared_after_welch() -> None:
    best, ours = [3.00, 3.05, 2.95, 3.02, 2.99], [3.2, 3.6, 2.9]
    (found,) = judge(runs(*best), [runs(*ours, first_seed=4)])  # one seed in common is none
    expected = stats.ttest_ind(ours, best, equal_var=False)
    assert not found.paired
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.difference is not None
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_many_differences_are_corrected_after_holm() -> None:
    # By hand, m = 4: 0.01·4, 0.02·3, max(0.06, 0.04·2), max(0.08, 0.3·1).
    assert holm([0.04, 0.01, 0.3, 0.02]) == pytest.approx([0.08, 0.04, 0.3, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_a_correction_keeps_the_order_and_never_helps(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    ranked = [c for _, c in sorted(zip(p_values, corrected, strict=True))]
    assert ranked == sorted(ranked)


def test_a_difference_that_is_sure_alone_is_not_among_many() -> None:
    best, doubtful = runs(1.0, 1.1, 1.2, 1.3), runs(1.12, 1.15, 1.4, 1.45)
    (alone,) = judge(best, [doubtful])
    assert alone.p_value is not None
    assert 0.01 < alone.p_value < 0.05
    assert alone.verdict == WORSE
    among = judge(best, [doubtful, *[runs(1.0, 1.2, 1.15, 1.35)] * 5])[0]
    assert among.verdict == TIED
    assert among.p_value == pytest.approx(6 * alone.p_value)
    assert among.difference == alone.difference, "an interval is of one difference"


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Ten settings that are all the same: at most 5 % of comparisons may call any of them worse than another."""
    draw = random.Random(0)
    alarms = 0
    for _ in range(400):
        reference, *others = ([draw.gauss(3, 0.1) for _ in range(5)] for _ in range(11))
        alarms += any(found.verdict == WORSE for found in judge(runs(*reference), [runs(*one) for one in others]))
    # 400 draws at 5 % give 20 ± 4.4; a comparison without a correction would give some 100.
    assert alarms <= 34


def test_the_same_numbers_are_no_difference_and_a_constant_one_is_sure() -> None:
    best = runs(1.0, 2.0, 3.0)
    same, constant = judge(best, [best, runs(1.5, 2.5, 3.5)])
    assert (same.verdict, same.p_value) == (TIED, 1.0)
    assert (constant.verdict, constant.p_value) == (WORSE, 0.0)
    assert constant.difference == Interval(mean=0.5, low=0.5, high=0.5)
    (apart,) = judge(runs(1.0, 1.0), [runs(2.0, 2.0, first_seed=5)])
    assert (apart.verdict, apart.paired) == (WORSE, False)


def test_too_few_runs_and_mishaps_are_no_verdict_on_numbers() -> None:
    best = runs(1.0, 1.1)
    assert judge(best, [runs(5.0)]) == [Judgement(verdict=UNKNOWN)]
    broken = Runs({0: 1.0, 1: 1.2}, {2: "diverged"})
    (found,) = judge(best, [broken])
    assert found.verdict == UNSTABLE
    assert found.difference is not None
    assert judge(best, [Runs({}, {0: "failed"})]) == [Judgement(verdict=UNSTABLE)]
    assert [judge_alone(one).verdict for one in (best, broken, runs(1.0))] == [BEST, UNSTABLE, UNKNOWN]
