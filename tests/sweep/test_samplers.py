"""Every sampler and pruner over a study whose training is a formula: what is asked, and that it repeats."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from lmtrain.config.compose import config_dir, register
from lmtrain.config.study_sweeper import PRUNERS, build_pruner, build_sampler, is_grid
from lmtrain.errors import ConfigError
from lmtrain.run import RunResult, StudyJudge
from lmtrain.sweep.setup import grid_points
from lmtrain.sweep.study import FailurePolicy, SharedStudy, StudyPlan
from lmtrain.sweep.worker import work

SAMPLERS = ("tpe", "random", "cmaes", "nsgaii", "nsgaiii", "gp", "qmc", "grid")
LEARNS_SOON = {  # so that few trials are enough to see it sample by what it has learnt
    "tpe": ("n_startup_trials=3",),
    "gp": ("n_startup_trials=3",),
    "cmaes": ("popsize=4",),
    "nsgaii": ("population_size=4",),
    "nsgaiii": ("population_size=4",),
}
SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "dropout": FloatDistribution(0.0, 0.2),
    "optimizer": CategoricalDistribution(("adamw", "muon")),
}
STEPS = 4  # evaluations of a trial, 1,000 tokens apart


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study here need not outlive the machine: waiting for its disk is most of what these tests would do."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Formula:
    """Stands for training: a loss that falls, to a level that the parameters decide."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, number: int) -> Path:
        return self.root / f"{number:04d}"

    def __call__(self, number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        level = abs(params.get("lr", 0.01) - 0.01) + params.get("dropout", 0.0) + (params.get("optimizer") == "adamw")
        for step in range(1, STEPS + 1):
            loss = 1.0 + level + 1.0 / step
            if judge(1000 * step, loss):
                return result_of("pruned", loss, step)
        return result_of("completed", loss, STEPS)


def result_of(status: str, loss: float, step: int) -> RunResult:
    return RunResult(
        status=status,
        objective=loss,
        objectives={"val/loss": loss},
        last_score=loss,
        best_step=step,
        step=step,
        tokens=1000 * step,
        metrics={"val/loss": loss},
        seconds=0.0,
    )


@functools.cache
def settings_of(kind: str, name: str, *words: str) -> DictConfig:
    """The option `hydra/sweeper/KIND=NAME` as Hydra composes it."""
    register()
    choice = [f"hydra/sweeper/{kind}={name}", *(f"hydra.sweeper.{kind}.{word}" for word in words)]
    with initialize_config_dir(str(config_dir())):
        config = compose("lmtrain", ["hydra/sweeper=study", *choice], return_hydra_config=True)
    found: DictConfig = config.hydra.sweeper[kind]
    return found


def plan_of(folder: Path, sampler: DictConfig, pruner: DictConfig, **changes: Any) -> StudyPlan:
    settings: dict[str, Any] = {
        "name": "study",
        "storage": str(folder / "study.journal"),
        "folder": folder,
        "directions": ("minimize",),
        "space": SPACE,
        "num_trials": 12,
        "make_sampler": functools.partial(build_sampler, sampler, 7),
        "make_pruner": functools.partial(build_pruner, pruner, first=1000, budget=1000 * STEPS),
    }
    return StudyPlan(**(settings | changes))


def finished(plan: StudyPlan) -> list[FrozenTrial]:
    """The trials of a study after one worker has done them all."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    study = SharedStudy(plan)
    study.add_missing()
    work(study, Formula(plan.folder))
    return study.trials()


def next_point(plan: StudyPlan) -> str:
    """What a process of its own would ask next; run there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = SharedStudy(plan)
        study.add_missing()
        trial = study.claim()
    assert trial is not None
    return json.dumps(trial.params)


def sampler_of(name: str) -> DictConfig:
    return settings_of("sampler", name, *LEARNS_SOON.get(name, ()))


def changes_of(name: str, space: Mapping[str, BaseDistribution] = SPACE) -> dict[str, Any]:
    """What a plan with this sampler has besides: all the points, for a grid."""
    if name != "grid":
        return {"space": space}
    choices = {
        key: found if isinstance(found, CategoricalDistribution) else FloatDistribution(0.01, 0.04, step=0.01)
        for key, found in space.items()
    }
    return {"space": choices, "starting_points": grid_points(choices)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_asks_each_point_once_and_the_same_ones_again(tmp_path: Path, name: str) -> None:
    pruner = settings_of("pruner", "none")
    first, again = (
        finished(plan_of(tmp_path / which, sampler_of(name), pruner, **changes_of(name)))
        for which in ("first", "again")
    )
    points = [trial.params for trial in first]
    assert points == [trial.params for trial in again]
    assert {trial.state for trial in first} == {TrialState.COMPLETE}
    assert len({json.dumps(point) for point in points}) == len(points) == 12
    assert is_grid(sampler_of(name)) == (name == "grid")
    assert not list(tmp_path.rglob("error.txt"))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """Another process, which shares nothing with this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", SAMPLERS)
def test_another_process_asks_the_same_next_point(tmp_path: Path, elsewhere: Executor, name: str) -> None:
    pruner, changes = settings_of("pruner", "none"), changes_of(name)
    finished(plan_of(tmp_path / "here", sampler_of(name), pruner, **changes, num_trials=9))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (plan_of(tmp_path / which, sampler_of(name), pruner, **changes) for which in ("here", "there"))
    assert next_point(here) == elsewhere.submit(next_point, there).result()


def test_points_of_one_scrambled_sequence_are_told_apart_by_number(tmp_path: Path) -> None:
    """Two workers that ask at the same time must not get the same point of it."""
    sampler = settings_of("sampler", "qmc", "scramble=true")
    plan = plan_of(tmp_path, sampler, settings_of("pruner", "none"), num_trials=8)
    trials = finished(plan)
    rates = sorted(trial.params["dropout"] for trial in trials[1:])
    assert len(set(rates)) == 7
    assert rates[0] < 0.05 < 0.15 < rates[-1], "it covers the range"
    again = finished(plan_of(tmp_path / "again", sampler, settings_of("pruner", "none"), num_trials=8))
    assert [trial.params for trial in again] == [trial.params for trial in trials]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pruner_ends_the_worse_trials_only(tmp_path: Path, pruner: str) -> None:
    trials = finished(plan_of(tmp_path, sampler_of("random"), settings_of("pruner", pruner), num_trials=16))
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(set(trial.intermediate_values) <= {1000, 2000, 3000, 4000} for trial in trials)
    assert bool(pruned) == (pruner not in ("none", "patient")), "every loss falls, so none tries a patient one"
    best = min(trials, key=lambda trial: trial.intermediate_values[1000])
    assert best.state == TrialState.COMPLETE


class Cliff(Formula):
    """The larger the better, but beyond the middle nothing can be run."""

    def __init__(self, root: Path, error: Exception) -> None:
        super().__init__(root)
        self.error = error

    def __call__(self, number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        if params["x"] > 0.5:
            raise self.error
        return result_of("completed", 1.0 - params["x"], STEPS)


def test_what_cannot_be_run_keeps_the_sampler_away_as_a_failure_does_not(tmp_path: Path) -> None:
    def falls_off(which: str, error: Exception) -> int:
        folder = tmp_path / which
        folder.mkdir()
        space: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0)}
        plan = plan_of(folder, sampler_of("tpe"), settings_of("pruner", "none"), space=space, num_trials=40)
        study = SharedStudy(plan)
        study.add_missing()
        work(study, Cliff(folder, error), failures=FailurePolicy(max_retries=0, stop_after=100))
        assert {trial.state for trial in study.trials()} == {TrialState.COMPLETE, state_of[type(error)]}
        return sum(trial.params["x"] > 0.5 for trial in study.trials())

    state_of = {ConfigError: TrialState.PRUNED, RuntimeError: TrialState.FAIL}
    assert falls_off("infeasible", ConfigError("too large")) < 20
    assert falls_off("failed", RuntimeError("too large")) > 30
