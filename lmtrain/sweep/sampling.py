"""Samplers as a shared study needs them: what is asked for a trial depends on its number and the history alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

DRAWS = 10
"""How often a sampler that draws a point there has been is asked again, before it gets its way."""


class SamplerPerTrial(BaseSampler):
    """Makes a sampler of its own for each trial, seeded by the trial's number.

    So it does not matter which process asks, nor how often one crashed before: the same history gives the same point,
    and no point is drawn twice because a seed was.
    """

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self._make = make
        self._made: tuple[int, BaseSampler] | None = None

    def _sampler(self, trial: FrozenTrial) -> BaseSampler:
        if self._made is None or self._made[0] != trial.number:
            self._made = (trial.number, self._make(trial.number))
        return self._made[1]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler, earlier = self._sampler(trial), study.get_trials(deepcopy=False)
        for _ in range(DRAWS):
            point = sampler.sample_relative(study, trial, search_space)
            if not any(_repeats(point, search_space, other) for other in earlier):
                break  # a genetic algorithm likes to hand on a parent as it is
        return point

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler(trial).after_trial(study, trial, state, values)


def _repeats(point: dict[str, Any], search_space: dict[str, BaseDistribution], other: FrozenTrial) -> bool:
    """Whether a point is that of another trial, or may become so: what it leaves open is one of a few choices."""
    left_open = [distribution for name, distribution in search_space.items() if name not in point]
    choices = all(isinstance(distribution, CategoricalDistribution) for distribution in left_open)
    return bool(point) and choices and point.items() <= other.params.items()
