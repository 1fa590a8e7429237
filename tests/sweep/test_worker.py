"""What a worker does with the ways a trial can end; training is scripted."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from lmtrain.errors import ConfigError, Interrupted
from lmtrain.run import RunResult, StudyJudge
from lmtrain.sweep.storage import journal_path
from lmtrain.sweep.study import FailurePolicy, SharedStudy, StudyPlan, attempts_of, outcome_of
from lmtrain.sweep.worker import work

RUNGS = (100, 200, 300)  # tokens at the evaluations of a trial


def result(status: str = "completed", objective: float | None = 1.0, last: float | None = None) -> RunResult:
    return RunResult(
        status=status,
        objective=objective,
        objectives={"val/loss": objective},
        last_score=objective if last is None else last,
        best_step=3,
        step=3,
        tokens=300,
        metrics={"val/loss": math.nan if objective is None else objective},
        seconds=1.0,
    )


class Script:
    """Trains by a function of (number, parameters, judge)."""

    def __init__(self, folder: Path, train: Callable[[int, Mapping[str, Any], StudyJudge], RunResult]) -> None:
        self.root, self.train = folder, train
        self.trained: list[int] = []

    def folder(self, number: int) -> Path:
        return self.root / f"{number:04d}"

    def __call__(self, number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        self.trained.append(number)
        return self.train(number, params, judge)


def study_of(folder: Path, *, num_trials: int = 4, **plan: Any) -> SharedStudy:
    study = SharedStudy(
        StudyPlan(
            name="study",
            storage=journal_path(folder),
            folder=folder,
            directions=plan.pop("directions", ("minimize",)),
            space={"x": FloatDistribution(0.0, 1.0)},
            num_trials=num_trials,
            **plan,
        )
    )
    study.add_missing()
    return study


def curve(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
    """Trial n has the constant loss n, unless it is ended early."""
    for tokens in RUNGS:
        if judge(tokens, float(number)):
            return result("pruned", float(number))
    return result(objective=float(number))


def test_evaluations_are_reported_at_tokens_and_bad_trials_pruned(tmp_path: Path) -> None:
    study = study_of(tmp_path, make_pruner=lambda: optuna.pruners.MedianPruner(n_startup_trials=2))
    work(study, Script(tmp_path, curve))
    states = [trial.state for trial in study.trials()]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert [sorted(trial.intermediate_values) for trial in study.trials()] == [[*RUNGS], [*RUNGS], [100], [100]]
    assert [outcome_of(trial)["status"] for trial in study.trials()] == ["completed", "completed", "pruned", "pruned"]


def test_a_diverged_trial_is_told_its_last_finite_value(tmp_path: Path) -> None:
    study = study_of(tmp_path, num_trials=2)
    ends = [result("diverged", objective=2.0, last=7.5), result("diverged", objective=None)]
    work(study, Script(tmp_path, lambda number, params, judge: ends[number]))
    first, second = study.trials()
    assert (first.state, first.value) == (TrialState.COMPLETE, 7.5)
    assert second.state == TrialState.PRUNED
    assert "no finite value" in outcome_of(second)["reason"]


def test_out_of_memory_and_impossible_settings_are_infeasible(tmp_path: Path) -> None:
    def train(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        if number == 0:
            return result("out_of_memory", objective=None)
        if number == 1:
            raise ConfigError("model.d_model (3) must be divisible by 2\nsecond line")
        return result(objective=0.5)

    study = study_of(tmp_path, num_trials=3)
    script = Script(tmp_path, train)
    work(study, script)
    trials = study.trials()
    assert [trial.state for trial in trials] == [TrialState.PRUNED, TrialState.PRUNED, TrialState.COMPLETE]
    assert [outcome_of(trial)["status"] for trial in trials] == ["out_of_memory", "invalid", "completed"]
    assert outcome_of(trials[1])["reason"] == "model.d_model (3) must be divisible by 2"
    assert all(trial.constraints == {"feasible": 1.0} for trial in trials[:2])
    assert script.trained == [0, 1, 2], "neither is tried again"
    assert study.study.best_trial.number == 2


def test_a_bug_is_retried_and_then_told_with_its_traceback(tmp_path: Path) -> None:
    def train(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        if number == 1 or (number == 2 and script.trained.count(2) == 1):
            raise ZeroDivisionError("a bug")
        return result()

    study = study_of(tmp_path, num_trials=4)
    script = Script(tmp_path, train)
    work(study, script, failures=FailurePolicy(max_retries=2))
    assert script.trained == [0, 1, 1, 1, 2, 2, 3]
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert outcome_of(study.trials()[1])["reason"] == "ZeroDivisionError: a bug"
    error = (tmp_path / "0001" / "error.txt").read_text()
    assert error.count("Traceback") == 3
    assert "ZeroDivisionError: a bug" in error


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), ConfigError("data.path is missing")])
def test_a_study_whose_first_trials_fail_alike_stops(tmp_path: Path, error: Exception) -> None:
    def train(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        raise error

    study = study_of(tmp_path, num_trials=10)
    script = Script(tmp_path, train)
    work(study, script, failures=FailurePolicy(max_retries=0, stop_after=3))
    assert script.trained == [0, 1, 2]
    assert study.stopped is not None
    assert str(error) in study.stopped
    study.stop(None)
    work(study, script, failures=FailurePolicy(max_retries=0, stop_after=3))
    assert script.trained == [0, 1, 2, 3]


def test_an_interrupted_trial_is_left_to_the_next_worker(tmp_path: Path) -> None:
    def train(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        judge(100, 1.0)
        if script.trained == [0]:
            raise Interrupted("asked to stop", signal.SIGTERM)
        return result()

    study = study_of(tmp_path, num_trials=2)
    script = Script(tmp_path, train)
    with pytest.raises(Interrupted):
        work(study, script)
    assert study.trials()[0].state == TrialState.WAITING
    work(study, script)
    assert script.trained == [0, 0, 1]
    assert len(attempts_of(study.trials()[0])) == 2


def test_an_orphan_stops_at_its_next_evaluation(tmp_path: Path) -> None:
    orphaned: list[bool] = []

    def train(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        orphaned.append(True)
        judge(100, 1.0)
        raise Interrupted("what a run does when a signal came", signal.SIGTERM)

    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        study = study_of(tmp_path)
        with pytest.raises(Interrupted):
            work(study, Script(tmp_path, train), is_orphan=lambda: bool(orphaned))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [], "the worker itself takes the signal"
    assert study.trials()[0].state == TrialState.WAITING


def test_a_run_that_ended_before_its_worker_could_tell_is_not_made_again(tmp_path: Path) -> None:
    study = study_of(tmp_path, num_trials=2)
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000" / "result.json").write_text(json.dumps(asdict(result(objective=0.25))))
    script = Script(tmp_path, lambda number, params, judge: result())
    work(study, script)
    assert script.trained == [1]
    assert study.trials()[0].value == 0.25


def test_a_verdict_stands_after_a_crash(tmp_path: Path) -> None:
    """Successive halving gives its verdict on a rung once; a worker that died with it must not be let off."""
    study = study_of(
        tmp_path, num_trials=3, make_pruner=lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=100)
    )

    def train(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        if judge(100, float(number)):
            if script.trained.count(number) == 1:
                raise KeyboardInterrupt  # as good as dead
            return result("pruned", float(number))
        return result(objective=float(number))

    script = Script(tmp_path, train)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work(study, script)
    work(study, script)
    assert script.trained == [0, 1, 1, 2, 2]
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "PRUNED", "PRUNED"]


def test_several_objectives_are_told_and_not_pruned(tmp_path: Path) -> None:
    names = ("val/loss", "train/tokens_per_second")
    study = study_of(tmp_path, num_trials=2, directions=("minimize", "maximize"), objectives=names)

    def train(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        assert not judge(100, 1.0)
        return replace(result(), objectives=dict(zip(names, (1.0 + number, 10.0 + number), strict=True)))

    work(study, Script(tmp_path, train))
    assert [trial.values for trial in study.trials()] == [[1.0, 10.0], [2.0, 11.0]]
    assert len(study.study.best_trials) == 2


def test_a_text_that_changes_stops_the_study(tmp_path: Path) -> None:
    study = study_of(tmp_path)

    def train(number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        judge.read({"corpus": "old" if number < 2 else "new", "another": f"of trial {number % 1}"})
        return result()

    work(study, Script(tmp_path, train))
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE] * 2 + [TrialState.WAITING] * 2
    assert study.stopped is not None
    assert study.stopped.startswith("corpus has changed since this study began")
