"""One worker of a study: claim a trial, train it, tell how it ended, until none is left.

Knows neither Hydra nor where settings come from: `train` makes the run of a trial.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from lmtrain.errors import Interrupted, NotEnoughMemoryError, TextChangedError, UsageError
from lmtrain.run import RunResult, StudyJudge, ended_for_good
from lmtrain.run_dir import RunDir, write_atomically
from lmtrain.sweep.study import ENDED, FailurePolicy, LeaseLost, Outcome, SharedStudy, outcome_of
from lmtrain.training.interrupt import StopRequest

log = logging.getLogger(__name__)

ERROR_FILE = "error.txt"
"""In the folder of a trial that failed: the traceback of each attempt."""


FAILED = ("failed", "invalid")
"""Statuses of trials that could not be made."""


class Train(Protocol):
    """Makes the run of a trial and returns how it ended. Raises what the run raises."""

    def __call__(self, number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult: ...

    def folder(self, number: int) -> Path:
        """The run folder of a trial."""


def work(
    study: SharedStudy,
    train: Train,
    *,
    worker: int = 0,
    failures: FailurePolicy | None = None,
    is_orphan: Callable[[], bool] = lambda: False,
) -> None:
    """Train trials until none is left. Raises Interrupted when a signal asked to stop; the trial is put back.

    `is_orphan` tells that whoever started the worker was killed, which counts as such a signal.
    """
    policy = failures or FailurePolicy()

    def stop_if_orphaned() -> None:
        if is_orphan():
            os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as stop:  # between trials; during one, the run listens itself
        while study.stopped is None:
            stop_if_orphaned()
            if stop.signal is not None:
                raise Interrupted("stopped between two trials", stop.signal)
            trial = study.claim(worker)
            if trial is None:
                return
            try:
                with study.keep(trial):
                    outcome = _attempt(study, trial, train, policy, stop_if_orphaned)
            except LeaseLost as error:
                log.warning("%s: its run here is dropped", error)
                continue
            except (Interrupted, KeyboardInterrupt):
                study.put_back(trial)
                raise
            except TextChangedError as error:
                study.put_back(trial)
                study.stop(str(error))
                continue
            study.tell(trial, outcome)
            if outcome.details["status"] in FAILED:
                _stop_if_all_fail_alike(study, policy)


def _attempt(
    study: SharedStudy, trial: optuna.Trial, train: Train, policy: FailurePolicy, at_evaluation: Callable[[], None]
) -> Outcome:
    folder = train.folder(trial.number)
    judge = _TrialJudge(study, trial, at_evaluation)
    for attempt in range(policy.max_retries + 1):
        try:
            # It may have ended by itself, and its worker died before it told so.
            result = ended_for_good(RunDir(folder)) or train(trial.number, trial.params, judge)
        except (Interrupted, KeyboardInterrupt, LeaseLost, TextChangedError):
            raise
        except NotEnoughMemoryError as error:
            return _infeasible("out_of_memory", str(error).splitlines()[0])
        except UsageError as error:  # these settings cannot be run: the sampler should keep away from them
            return _infeasible("invalid", str(error).splitlines()[0])
        except Exception as error:
            _note_error(folder, attempt)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("trial %d failed: %s", trial.number, reason)
        else:
            return outcome_of_run(result, len(study.plan.directions))
    return Outcome(state=TrialState.FAIL, details={"status": "failed", "reason": reason})


@dataclass(frozen=True)
class _TrialJudge:
    """What the run of a trial hears from its study."""

    study: SharedStudy
    trial: optuna.Trial
    at_evaluation: Callable[[], None]

    def read(self, texts: Mapping[str, str]) -> None:
        self.study.require_texts(texts)

    def __call__(self, tokens: int, score: float) -> bool:
        self.study.require_lease(self.trial)
        self.at_evaluation()
        return _verdict(self.trial, tokens, score)


def _verdict(trial: optuna.Trial, tokens: int, score: float) -> bool:
    """Report an evaluation and ask the pruner; a verdict once given stands."""
    if len(trial.study.directions) > 1:
        return False  # Optuna prunes single objectives only
    if "pruned_at" in trial.user_attrs:
        return True
    known = trial.storage.get_trial(trial._trial_id).intermediate_values
    if tokens not in known:
        trial.report(score, tokens)
    if trial.should_prune():
        trial.set_user_attr("pruned_at", tokens)
        return True
    return False


def outcome_of_run(result: RunResult, num_objectives: int = 1) -> Outcome:
    """What a study is told about a run that ended.

    Out of memory is a constraint, not a value: a sampler that is told a failure comes back there.
    A diverged run has its last finite value, so that the sampler learns which way is worse.
    """
    finite = {name: value for name, value in result.metrics.items() if value is not None and math.isfinite(value)}
    details = {
        "status": result.status,
        "step": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "metrics": finite,
    }
    if result.status == "pruned":
        return Outcome(state=TrialState.PRUNED, details=details)
    if result.status == "out_of_memory":
        return _infeasible("out_of_memory", "one sequence at a time does not fit into memory", details)
    values = list(result.objectives.values())
    if result.status == "diverged":
        values[0] = result.last_score
    told = tuple(value for value in values if value is not None and math.isfinite(value))
    if len(told) < num_objectives:  # diverged before the first evaluation
        return Outcome(state=TrialState.PRUNED, details=details | {"reason": "no finite value was measured"})
    return Outcome(state=TrialState.COMPLETE, values=told, details=details)


def _infeasible(status: str, reason: str, details: Mapping[str, Any] | None = None) -> Outcome:
    return Outcome(
        state=TrialState.PRUNED, infeasible=True, details={**(details or {}), "status": status, "reason": reason}
    )


def _note_error(folder: Path, attempt: int) -> None:
    """Keep the traceback of the error at hand in the trial's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ERROR_FILE
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    write_atomically(file, f"{before}attempt {attempt + 1}\n{traceback.format_exc()}\n")


def _stop_if_all_fail_alike(study: SharedStudy, policy: FailurePolicy) -> None:
    """A mistake in the settings or the program would fail every trial of the night: stop at the first few."""
    outcomes = [outcome_of(trial) for trial in study.trials(*ENDED)]
    if len(outcomes) < policy.stop_after or any(outcome["status"] not in FAILED for outcome in outcomes):
        return
    reasons = {outcome["reason"] for outcome in outcomes}
    if len(reasons) == 1:
        study.stop(f"the first {len(outcomes)} trials failed alike: {reasons.pop()}")
