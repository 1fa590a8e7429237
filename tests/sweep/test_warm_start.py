"""A study that starts from an earlier one: what it takes over, and what its sampler makes of it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from lmtrain.errors import ConfigError, RunFolderError
from lmtrain.sweep.coordinator import open_study
from lmtrain.sweep.storage import journal_path
from lmtrain.sweep.study import Outcome, SharedStudy, StudyPlan
from lmtrain.sweep.warm_start import trials_to_learn_from

DEFINITION = {"search x": "0 … 1", "sampler": "tpe", "model.d_model": "64"}


def plan_in(folder: Path, **changes: object) -> StudyPlan:
    folder.mkdir(exist_ok=True)
    plan = StudyPlan(
        name=folder.name,
        storage=journal_path(folder),
        folder=folder,
        directions=("minimize",),
        space={"x": FloatDistribution(0.0, 1.0), "kind": CategoricalDistribution(["a", "b"])},
        num_trials=12,
        make_sampler=lambda number: optuna.samplers.TPESampler(seed=number, n_startup_trials=10),
    )
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def run(plan: StudyPlan, source: Path | None = None, count: int = 99) -> SharedStudy:
    """Open the study and end up to `count` trials: the lowest x is best, trials of kind b cannot be run."""
    earlier = trials_to_learn_from(None if source is None else str(source), plan, DEFINITION)
    study = open_study(plan, DEFINITION, force=False)
    study.add_missing(earlier)
    for _ in range(count):
        trial = study.claim()
        if trial is None:
            break
        outcome = Outcome(state=TrialState.COMPLETE, values=(trial.params["x"],), details={"status": "completed"})
        if trial.params["kind"] == "b":
            outcome = Outcome(state=TrialState.PRUNED, infeasible=True, details={"status": "out_of_memory"})
        study.tell(trial, outcome)
    return study


def test_the_sampler_learns_from_the_first_trial_on(tmp_path: Path) -> None:
    run(plan_in(tmp_path / "earlier"))
    cold = run(plan_in(tmp_path / "cold"), count=6).trials()[:6]
    warm_study = run(plan_in(tmp_path / "warm"), tmp_path / "earlier", count=6)
    warm = warm_study.trials()[12 : 12 + 6]
    assert [trial.number for trial in warm] == list(range(12, 18)), "the earlier ones come first"
    assert warm[0].params != cold[0].params
    mean_warm, mean_cold = (sum(trial.params["x"] for trial in trials) / 6 for trials in (warm, cold))
    assert mean_warm < mean_cold
    imported = warm_study.trials()[:12]
    assert all(trial.user_attrs["outcome"]["imported"] for trial in imported)
    infeasible = [trial for trial in imported if trial.params["kind"] == "b"]
    assert infeasible
    assert all(trial.constraints == {"feasible": 1.0} for trial in infeasible), "what cannot be run stays known"


def test_imported_trials_do_not_count_and_come_in_once(tmp_path: Path) -> None:
    run(plan_in(tmp_path / "earlier"))
    plan = plan_in(tmp_path / "warm", num_trials=4)
    run(plan, tmp_path / "earlier", count=2)
    study = run(plan, tmp_path / "earlier")
    assert study.is_done()
    assert (study.imported, len(study.trials())) == (12, 16)


def test_an_import_cut_off_by_a_kill_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plan_in(tmp_path / "earlier"))
    real = optuna.Study.add_trials

    def cut_off(study: optuna.Study, trials: list[optuna.trial.FrozenTrial]) -> None:
        real(study, trials[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(optuna.Study, "add_trials", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(plan_in(tmp_path / "warm"), tmp_path / "earlier")
    monkeypatch.undo()
    study = run(plan_in(tmp_path / "warm"), tmp_path / "earlier")
    assert (study.imported, len(study.trials())) == (12, 24)
    assert all("imported" in trial.user_attrs["outcome"] for trial in study.trials()[:12])


def test_trials_outside_the_space_stay_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    earlier = run(plan_in(tmp_path / "earlier")).trials()
    narrow = {"x": FloatDistribution(0.0, 0.5), "kind": CategoricalDistribution(["a", "c"])}
    inside = [trial for trial in earlier if trial.params["x"] <= 0.5 and trial.params["kind"] == "a"]
    assert 0 < len(inside) < 12
    assert run(plan_in(tmp_path / "warm", space=narrow), tmp_path / "earlier", count=0).imported == len(inside)
    assert f"{len(inside)} of its 12 ended trials fit this space" in caplog.text


def test_other_settings_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(plan_in(tmp_path / "earlier"))
    plan = plan_in(tmp_path / "warm")
    trials_to_learn_from(str(tmp_path / "earlier"), plan, DEFINITION | {"sampler": "gp", "search x": "0 … 2"})
    assert "may mislead" not in caplog.text
    trials_to_learn_from(str(tmp_path / "earlier"), plan, DEFINITION | {"model.d_model": "128"})
    assert "may mislead the sampler: model.d_model 64 → 128" in caplog.text


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    run(plan_in(tmp_path / "earlier"))
    (tmp_path / "empty").mkdir()
    plan = plan_in(tmp_path / "warm")
    for source, changes, error, rule in [
        ("empty", {}, RunFolderError, "is not the folder of a study"),
        ("nowhere", {}, RunFolderError, "is not the folder of a study"),
        ("warm", {}, ConfigError, "is this study itself"),
        ("earlier", {"space": {"y": FloatDistribution(0, 1)}}, ConfigError, "none of its 12 ended trials fits"),
        ("earlier", {"objectives": ("val/perplexity",)}, ConfigError, "its objective is val/loss .minimize."),
    ]:
        with pytest.raises(error, match=rule):
            trials_to_learn_from(str(tmp_path / source), dataclasses.replace(plan, **changes), DEFINITION)  # type: ignore[arg-type]
    assert not (tmp_path / "warm/study.journal").exists()
