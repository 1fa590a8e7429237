"""The best settings of a study again with other seeds: which, how often, and how they are trained.

The reruns are a study of their own, `NAME/confirm` in the same storage, of which every point is given: so they are
claimed, continued and read like trials. What they show is in `confirmation`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState

from lmtrain.config.schema import ExperimentConfig
from lmtrain.errors import ConfigError
from lmtrain.run import RunResult, StudyJudge
from lmtrain.sweep.confirmation import CONFIRM_FOLDER, SEED, TRIAL
from lmtrain.sweep.coordinator import open_study, run_workers
from lmtrain.sweep.study import SharedStudy, StudyPlan, outcome_of
from lmtrain.sweep.worker import Train

log = logging.getLogger(__name__)

_POINTS = "points"  # attribute of the study: (trial, seed) of each rerun, only ever added to
_LOOK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """A trial to be run again."""

    trial: int
    seed: int
    params: Mapping[str, Any]

    @property
    def subfolder(self) -> str:
        """Where its run is, from the sweep folder."""
        return f"{CONFIRM_FOLDER}/{self.trial:04d}-seed{self.seed}"


class Repeat(Train, Protocol):
    """Makes the run of a trial, and can make it again."""

    def again(
        self, number: int, params: Mapping[str, Any], judge: StudyJudge, *, seed: int, subfolder: str
    ) -> RunResult: ...


@dataclass(frozen=True)
class TrainRerun:
    """Trains a rerun as the trial that it repeats, with another seed and in a folder of its own."""

    train: Repeat
    reruns: Sequence[Rerun]

    def folder(self, number: int) -> Path:
        """The run folder of a rerun."""
        return self.train.folder(0).parent / self.reruns[number].subfolder

    def __call__(self, number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        """Make the run, or go on with it. Raises what the run raises."""
        rerun = self.reruns[number]
        return self.train.again(rerun.trial, rerun.params, judge, seed=rerun.seed, subfolder=rerun.subfolder)


def require_confirmable(config: ExperimentConfig, searched: Sequence[str]) -> None:
    """Raise ConfigError if the settings of a study leave nothing to confirm."""
    if len(config.objectives) > 1:
        raise ConfigError(f"sweep.confirm compares by one objective, there are {', '.join(config.objectives)}")
    if "seed" in searched:
        raise ConfigError("sweep.confirm repeats trials with other seeds: seed cannot be searched as well")


def confirm_best(
    study: SharedStudy,
    config: ExperimentConfig,
    train: Repeat,
    launch: Callable[[StudyPlan, Train], Sequence[int]],
) -> bool:
    """Run the best trials of a study again, each with the same new seeds; False if there are not two to compare.

    `launch` runs the workers of a plan and returns what stopped each, as for `run_workers`, whose errors are raised.
    """
    if not _all_have_ended(study, lambda: launch(study.plan, train)):
        return False
    best = best_distinct(study, config.sweep.confirm.top)
    if len(best) < 2:
        log.warning("sweep.confirm has nothing to compare: fewer than two settings were trained")
        return False
    reruns = _open_reruns(study, [trial.number for trial in best], new_seeds(config.seed, config.sweep.confirm.seeds))
    params = {trial.number: trial.params for trial in study.trials()}
    again = TrainRerun(
        train, [Rerun(trial=trial, seed=seed, params=params[trial]) for trial, seed in _points(reruns.study)]
    )
    reruns.add_missing()
    run_workers(reruns, lambda: launch(reruns.plan, again))
    return True


def best_distinct(study: SharedStudy, top: int) -> list[FrozenTrial]:
    """The best of a study's own trials, each setting once.

    Those that came to their end go first. A harsh pruner leaves few of them: then those follow that it let go furthest.
    """
    distinct: dict[str, FrozenTrial] = {}
    own = [trial for trial in study.trials(TrialState.COMPLETE, TrialState.PRUNED) if trial.number >= study.imported]
    statuses = ("completed", "early_stopped", "pruned")
    for trial in sorted((t for t in own if outcome_of(t).get("status") in statuses and t.values), key=_promise):
        distinct.setdefault(json.dumps(trial.params, sort_keys=True, default=str), trial)
    return list(distinct.values())[:top]


def _promise(trial: FrozenTrial) -> tuple[bool, int, float, int]:
    furthest = 0 if trial.state == TrialState.COMPLETE else -max(trial.intermediate_values, default=0)
    return trial.state == TrialState.PRUNED, furthest, trial.values[0], trial.number


def new_seeds(seed: int, count: int) -> list[int]:
    """Seeds that are not that of the trials; the first ones stay the same when there are to be more."""
    return [(seed + number) % 2**31 for number in range(1, count + 1)]


def _all_have_ended(study: SharedStudy, launch: Callable[[], Sequence[int]]) -> bool:
    """Wait for the last trials of other machines, going on with them if they are given up there."""
    if not study.is_done():
        log.info("waiting for the trials that are still trained elsewhere")
    while study.stopped is None and not study.is_done():
        time.sleep(_LOOK_AGAIN_SECONDS)
        if study.has_work():
            run_workers(study, launch)
    return study.stopped is None


def _open_reruns(study: SharedStudy, trials: Sequence[int], seeds: Sequence[int]) -> SharedStudy:
    """The study of reruns, new or with more of them. Seed by seed, so that what is half done can be compared too."""
    plan = dataclasses.replace(
        study.plan,
        name=f"{study.plan.name}/{CONFIRM_FOLDER}",
        folder=study.plan.folder / CONFIRM_FOLDER,
        space={name: IntDistribution(min(values), max(values)) for name, values in ((TRIAL, trials), (SEED, seeds))},
        num_trials=len(trials) * len(seeds),
        starting_points=(),
        make_sampler=_sampler_of_given_points,
        make_pruner=optuna.pruners.NopPruner,
        extend=None,
    )
    opened = open_study(plan, {}, force=True)
    known = _points(opened.study)
    points = [*known, *((trial, seed) for seed in seeds for trial in trials if (trial, seed) not in known)]
    if points != known:
        opened.study.set_user_attr(_POINTS, points)
    space = {TRIAL: [trial for trial, _ in points], SEED: [seed for _, seed in points]}
    plan = dataclasses.replace(
        plan,
        space={name: IntDistribution(min(values), max(values)) for name, values in space.items()},
        num_trials=len(points),
        starting_points=[{TRIAL: trial, SEED: seed} for trial, seed in points],
    )
    return open_study(plan, {}, force=True)


def _points(study: optuna.Study) -> list[tuple[int, int]]:
    return [(trial, seed) for trial, seed in study.user_attrs.get(_POINTS, [])]


def _sampler_of_given_points(number: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=number)
