"""How searched settings and measured values stand on the axes of a study's pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial

from lmtrain.sweep.reading import ReadStudy
from lmtrain.sweep.wording import short_count, short_names
from lmtrain.tracking.drawing import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND_COLOURS = {"completed": BLUE, "diverged": ORANGE, "pruned": GREY}
"""Of trials that have a value to show; better ones lie on top."""

KIND_MARKERS = {"completed": "o", "diverged": "X", "pruned": "v"}
"""The same for who does not see the colours."""


ENOUGH = 8
"""Trials below which importances are chance: of four synthetic studies of four trials, three were wrong."""


@dataclass(frozen=True)
class Scale:
    """A setting on an axis from 0 to 1: its range, logarithmic where it was searched so; choices side by side."""

    name: str
    distribution: Any

    def place(self, value: Any) -> float:
        """Where a value stands."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.choices.index(value) / max(1, len(self.choices) - 1)
        low, high = self._warp(self.distribution.low), self._warp(self.distribution.high)
        return (self._warp(value) - low) / (high - low) if high > low else 0.5

    @property
    def choices(self) -> list[Any]:
        """The choices of a categorical setting, numbers by size."""
        return sorted(self.distribution.choices) if self.is_ordered else list(self.distribution.choices)

    @property
    def is_ordered(self) -> bool:
        """Whether what lies between two values means something."""
        choices = getattr(self.distribution, "choices", ())
        return all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels."""
        if isinstance(self.distribution, CategoricalDistribution):
            return [(self.place(choice), f"{choice}") for choice in self.choices]
        from matplotlib.ticker import MaxNLocator

        low, high = self.distribution.low, self.distribution.high
        if self.distribution.log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1, 2, 5) if high / low < 200 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
        else:
            whole = isinstance(self.distribution, IntDistribution)
            values = [float(value) for value in MaxNLocator(5, integer=whole).tick_values(low, high)]
        slack = 1e-9 * (high - low)
        inside = [value for value in values if low - slack <= value <= high + slack]
        return [(self.place(value), f"{value:g}") for value in inside]

    def dress(self, axes: Axes, side: str = "x") -> None:
        """Put ticks and name on one side of a panel."""
        places, labels = zip(*self.ticks(), strict=True)
        getattr(axes, f"set_{side}ticks")(places, labels)
        getattr(axes, f"set_{side}lim")(-0.05, 1.05)
        getattr(axes, f"set_{side}label")(self.name)

    def _warp(self, value: float) -> float:
        return math.log(value) if self.distribution.log else float(value)


def scales_of(study: ReadStudy) -> dict[str, Scale]:
    """Of every setting that some trial was given a value for and that had more than one to choose from."""
    distributions = {
        name: found for trial in study.trials for name, found in trial.distributions.items() if not found.single()
    }
    names = short_names(list(distributions))
    return {name: Scale(names[name], found) for name, found in distributions.items()}


def value_of(study: ReadStudy, trial: FrozenTrial, objective: int = 0) -> float | None:
    """An objective of a trial; of a pruned one what it had last. None if nothing finite was measured."""
    if trial.values is not None:
        value = float(trial.values[objective])
    else:
        value = math.nan if objective else float(study.score_of(trial) or math.nan)
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Sample:
    """Trials with values that compare: all final, or all after the same tokens."""

    trials: list[FrozenTrial]  # best first
    values: list[float]
    note: str = ""  # where they are not final


def sample_of(study: ReadStudy, objective: int = 0) -> Sample:
    """The completed trials; if they are few, and pruned ones help, all as they were at an earlier evaluation.

    It is the last evaluation that came for ENOUGH trials. Evaluations lie at the same tokens but for less than a step.
    """
    final = Sample(study.ranked, [trial.values[objective] for trial in study.ranked])
    reports = {
        trial.number: sorted(trial.intermediate_values.items())
        for trial in (*study.by_kind["completed"], *study.by_kind["pruned"])
    }
    counts = sorted((len(reported) for reported in reports.values()), reverse=True)
    if len(final.trials) >= ENOUGH or len(counts) < ENOUGH or not counts[ENOUGH - 1]:
        return final
    index = counts[ENOUGH - 1] - 1
    then = {number: reported[index] for number, reported in reports.items() if len(reported) > index}
    sign = 1.0 if study.directions[0] == "minimize" else -1.0
    numbers = sorted((n for n in then if math.isfinite(then[n][1])), key=lambda n: (sign * then[n][1], n))
    trials = {trial.number: trial for trial in study.trials}
    tokens = short_count(statistics.median_low([tokens for tokens, _ in then.values()]))
    note = f"as they were after {tokens} tokens: {len(numbers)} trials came so far, {len(final.trials)} to the end"
    return Sample([trials[number] for number in numbers], [then[number][1] for number in numbers], note)


def limits_of(study: ReadStudy, objective: int = 0) -> tuple[float, float]:
    """Ends of an axis for an objective of the trials; those that diverged are not to squeeze the others flat."""
    for kinds in (("completed", "pruned"), ("diverged",)):
        trials = [trial for kind in kinds for trial in study.by_kind[kind]]
        values = [value for trial in trials if (value := value_of(study, trial, objective)) is not None]
        if values:
            return typical_limits(values, study.directions[objective])
    return 0.0, 1.0


def typical_limits(values: Sequence[float], direction: str) -> tuple[float, float]:
    """Ends of an axis on which no runaway value squeezes the rest flat: the good end is shown whole."""
    if len(values) < 2:
        return (values[0] - 0.5, values[0] + 0.5)
    sign = 1.0 if direction == "minimize" else -1.0
    losses = sorted(sign * value for value in values)
    upper_quartile = statistics.quantiles(losses, n=4, method="inclusive")[2]
    worst = min(losses[-1], upper_quartile + 2.0 * (upper_quartile - losses[0]))
    margin = 0.06 * (worst - losses[0]) or 0.05 * abs(worst) or 0.5
    ends = sign * (losses[0] - margin), sign * (worst + margin)
    return min(ends), max(ends)
