"""Runs that differ in nothing but their seed, taken as one setting: what can be concluded, in numbers and sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lmtrain.sweep.comparison import Comparison, Row, higher_is_better
from lmtrain.sweep.statistics import BEST, TIED, WORSE, Interval, Judgement, judge, judge_alone
from lmtrain.sweep.wording import short_names, short_score, short_value

ONE_SEED = (
    "Each setting was trained with one seed, so a small difference may be chance: run the best few again with others, "
    "seed=1,2,3, and compare all"
)

_MISHAPS = ("diverged", "out_of_memory", "failed")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that some runs have in common, all but the seed."""

    settings: Mapping[str, Any]  # those that differ from other runs'
    runs: tuple[str, ...]  # their names
    values: Mapping[int, float]  # seed → the metric compared by, of the runs that came to their end
    mishaps: Mapping[int, str]  # seed → how it ended, of those that will not

    @cached_property
    def interval(self) -> Interval | None:
        """Their mean; None of fewer than two."""
        return Interval.of(list(self.values.values()))

    @property
    def mean(self) -> float:
        """NaN if no run came to its end."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def label(self) -> str:
        """`lr 0.003, dropout 0.1`."""
        names = short_names(list(self.settings))
        return ", ".join(f"{names[key]} {short_value(value)}" for key, value in self.settings.items()) or self.runs[0]


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """The settings of a comparison, the best first, each with what seeds allow to say of it."""

    metric: str
    settings: tuple[Setting, ...]
    judgements: tuple[Judgement, ...]

    def conclusions(self) -> list[str]:
        """What follows, in sentences."""
        best, verdict = self.settings[0], self.judgements[0].verdict
        if verdict != BEST:
            return [f"No setting can be called the best: {verdict}."]
        assert best.interval is not None
        span = f"{short_score(best.interval.low)} … {short_score(best.interval.high)}"
        found = f"{self.metric} {short_score(best.mean)} (95 %: {span}) over {len(best.values)} seeds"
        counts = {kind: sum(one.verdict == kind for one in self.judgements) for kind in (TIED, WORSE)}
        if counts[TIED]:
            rest = f"has the best mean, {found}, but {_others(counts[TIED])} not distinguishable from it."
        elif counts[WORSE]:
            rest = f"is the best: {found}; {_others(counts[WORSE])} worse beyond chance."
        else:
            rest = f"has {found}."
        return [f"{best.label} {rest}"]


def repetition_of(comparison: Comparison) -> Repetition | None:
    """The settings of a comparison that have several runs; None where none has two seeds that came to their end."""
    together: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for row in comparison.rows if row.came_to_its_end or row.status in _MISHAPS):
        together.setdefault(comparison.identities[row.name], []).append(row)
    settings = [_setting(comparison, rows) for rows in together.values() if len(rows) > 1]
    if not any(len(setting.values) > 1 for setting in settings):
        return None
    upwards = higher_is_better(comparison.metric)

    def rank(one: Setting) -> tuple[bool, bool, float]:
        return bool(one.mishaps), one.interval is None, (-one.mean if upwards else one.mean) if one.values else math.inf

    ranked = sorted(settings, key=rank)
    judgements = (judge_alone(ranked[0]), *judge(ranked[0], ranked[1:], higher_is_better=upwards))
    return Repetition(metric=comparison.metric, settings=tuple(ranked), judgements=judgements)


def _setting(comparison: Comparison, rows: Sequence[Row]) -> Setting:
    values: dict[int, float] = {}
    mishaps: dict[int, str] = {}
    for row in rows:
        value, seed = comparison.value(row), int(row.run.config.get("seed", 0))
        if row.came_to_its_end and value is not None:
            values.setdefault(seed, value)
        elif row.status in _MISHAPS:
            mishaps.setdefault(seed, row.status)
    shown = {key: value for key, value in comparison.settings[rows[0].name].items() if key != "seed"}
    return Setting(settings=shown, runs=tuple(row.name for row in rows), values=values, mishaps=mishaps)


def _others(count: int) -> str:
    return "1 other is" if count == 1 else f"{count} others are"
