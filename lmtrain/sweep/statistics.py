"""What can be concluded from runs of the same settings with several seeds: intervals, differences, verdicts.

Owns the arithmetic. What is compared, and how it is told, is in `confirmation` and `repetition`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

LEVEL = 0.95
"""Of the intervals; a verdict takes chance for excluded where it explains the difference in less than the rest."""

BEST, TIED, WORSE = "best", "not distinguishable from the best", "worse"
UNSTABLE, UNKNOWN = "not every run came to its end", "too few runs"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and how well it is known: Student's t, two-sided."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """None of fewer than two values."""
        return None if len(values) < 2 else cls.around(*_estimate(values))

    @classmethod
    def around(cls, mean: float, error: float, freedom: float) -> Interval:
        """Of a mean with its standard error and degrees of freedom."""
        from scipy.special import stdtrit

        half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
        return cls(mean=mean, low=mean - half, high=mean + half)


class Repeated(Protocol):
    """Settings that were trained with several seeds."""

    @property
    def values(self) -> Mapping[int, float]:
        """Seed → what was measured, of the runs that came to their end."""

    @property
    def mishaps(self) -> Mapping[int, str]:
        """Seed → how it ended, of the runs that never will."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How settings compare with the best."""

    verdict: str  # BEST, TIED, WORSE, UNSTABLE or UNKNOWN
    difference: Interval | None = None  # how much higher than the best; None of the best itself, and of too few runs
    p_value: float | None = None  # two-sided, corrected for the number of differences looked at
    paired: bool = False  # whether the difference is of runs with the same seeds


def judge(best: Repeated, others: Sequence[Repeated], *, higher_is_better: bool = False) -> list[Judgement]:
    """How each of `others` compares with `best`.

    Paired by seed where two or more seeds are common: what a seed does to all settings alike then cancels. Else Welch's
    test, which takes the spreads for different. p-values are corrected after Holm (1979), so that among many settings
    none is called worse by chance more often than one alone would be.
    """
    found = [_difference(other.values, best.values) for other in others]
    corrected = iter(holm([p_value for _, p_value, _ in filter(None, found)]))
    judgements = []
    for other, one in zip(others, found, strict=True):
        if one is None:
            judgements.append(Judgement(verdict=UNSTABLE if other.mishaps else UNKNOWN))
            continue
        difference, p_value, paired = one[0], next(corrected), one[2]
        is_worse = p_value <= 1 - LEVEL and (difference.mean < 0 if higher_is_better else difference.mean > 0)
        verdict = UNSTABLE if other.mishaps else WORSE if is_worse else TIED
        judgements.append(Judgement(verdict=verdict, difference=difference, p_value=p_value, paired=paired))
    return judgements


def judge_alone(best: Repeated) -> Judgement:
    """Whether the best can be called so: all its runs came to their end, and there are two."""
    return Judgement(verdict=UNSTABLE if best.mishaps else BEST if len(best.values) > 1 else UNKNOWN)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the same order (Holm 1979, step-down)."""
    corrected, reached = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        reached = max(reached, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = reached
    return corrected


def _difference(ours: Mapping[int, float], best: Mapping[int, float]) -> tuple[Interval, float, bool] | None:
    """How much higher `ours` is, its p-value, whether paired; None of too few runs."""
    common = sorted(ours.keys() & best.keys())
    paired = len(common) > 1
    if paired:
        mean, error, freedom = _estimate([ours[seed] - best[seed] for seed in common])
    elif min(len(ours), len(best)) > 1:
        mean, error, freedom = _welch(_estimate(list(ours.values())), _estimate(list(best.values())))
    else:
        return None
    return Interval.around(mean, error, freedom), _p_value(mean, error, freedom), paired


def _estimate(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, its standard error, degrees of freedom."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1.0


def _welch(ours: tuple[float, float, float], best: tuple[float, float, float]) -> tuple[float, float, float]:
    """The same of the difference of two independent means (Welch 1947; Satterthwaite's degrees of freedom)."""
    (mean, error, freedom), (best_mean, best_error, best_freedom) = ours, best
    squared = error**2 + best_error**2
    spread = error**4 / freedom + best_error**4 / best_freedom
    return mean - best_mean, math.sqrt(squared), squared**2 / spread if spread else freedom + best_freedom


def _p_value(mean: float, error: float, freedom: float) -> float:
    """Of a difference: how often chance alone makes one as large."""
    from scipy.special import stdtr

    if error == 0:  # the same difference every time
        return 1.0 if mean == 0 else 0.0
    return 2 * float(stdtr(freedom, -abs(mean) / error))
