"""Studies made by hand, without training, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from lmtrain.sweep.coordinator import open_study
from lmtrain.sweep.storage import journal_path
from lmtrain.sweep.study import Outcome, SharedStudy, StudyPlan


def plan_in(folder: Path, **changes: Any) -> StudyPlan:
    """A study of ten trials over a rate and a choice, 100,000 tokens each."""
    settings: dict[str, Any] = {
        "name": "made",
        "storage": journal_path(folder),
        "folder": folder,
        "directions": ("minimize",),
        "space": {
            "optimizer.lr": FloatDistribution(1e-4, 1e-1, log=True),
            "tokenizer": CategoricalDistribution(["byte", "[red]"]),
        },
        "num_trials": 10,
        "budget_tokens": 100_000,
    }
    return StudyPlan(**settings | changes)


def begun(folder: Path, **changes: Any) -> SharedStudy:
    """That study, no trial claimed yet."""
    study = open_study(plan_in(folder, **changes), {}, force=False)
    study.add_missing()
    return study


def end(study: SharedStudy, status: str, *scores: float, trial: optuna.Trial | None = None, **details: Any) -> int:
    """Claim a trial, unless given, and end it after an evaluation each 10,000 tokens; returns its number."""
    trial = trial or study.claim()
    assert trial is not None
    for count, score in enumerate(scores, 1):
        if len(study.plan.directions) == 1:
            trial.report(score, 10_000 * count)
    infeasible = status in ("out_of_memory", "invalid")
    state = TrialState.PRUNED if infeasible or status == "pruned" else TrialState.COMPLETE
    outcome = Outcome(
        state=TrialState.FAIL if status == "failed" else state,
        values=scores[-len(study.plan.directions) :] if state == TrialState.COMPLETE and status != "failed" else None,
        infeasible=infeasible,
        details={"status": status, "tokens": 10_000 * len(scores), **details},
    )
    study.tell(trial, outcome)
    return trial.number
