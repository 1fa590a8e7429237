"""The best settings again with new seeds: what is run, what it shows, and that a kill changes neither."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from command_line import TINY, CommandLine
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from lmtrain.config import compose
from lmtrain.config.schema import ExperimentConfig, SweepConfig
from lmtrain.config.schema.sweep import ConfirmConfig
from lmtrain.errors import ConfigError
from lmtrain.run import RunResult, StudyJudge
from lmtrain.sweep import confirmation as shown
from lmtrain.sweep.confirm import best_distinct, confirm_best, new_seeds, require_confirmable
from lmtrain.sweep.confirmation import Candidate, Confirmation, read_confirmation, write_confirmation
from lmtrain.sweep.coordinator import open_study
from lmtrain.sweep.statistics import BEST, TIED, UNSTABLE, WORSE
from lmtrain.sweep.storage import journal_path
from lmtrain.sweep.study import SharedStudy, StudyPlan
from lmtrain.sweep.worker import Train, work

# ---------------------------------------------------------------------------------------------- statistics


def candidate(
    trial: int, *values: float, study_value: float = 1.0, mishaps: Mapping[int, str] | None = None
) -> Candidate:
    seeds = dict(enumerate(values, start=1))
    return Candidate(
        trial=trial, params={"lr": 0.1 * trial}, study_value=study_value, values=seeds, mishaps=mishaps or {}
    )


def confirmation(*candidates: Candidate) -> Confirmation:
    return Confirmation(study="s", objective="val/loss", num_compared=12, candidates=candidates)


def test_candidates_are_compared_seed_by_seed() -> None:
    """Seeds move all alike here: the intervals overlap widely, the paired difference is sure."""
    best, other = candidate(3, 1.0, 2.0, 3.0), candidate(5, 1.1, 2.12, 3.11)
    found = confirmation(best, other)
    assert best.interval is not None
    assert other.interval is not None
    assert other.interval.low < best.interval.high
    # By hand: differences 0.10 0.12 0.11, mean 0.11, s/√3 = 0.0057735, t(0.975; 2) = 4.302653.
    paired = found.judgements[5].difference
    assert paired is not None
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.11, 0.085159, 0.134841), abs=1e-6)
    assert [one.verdict for one in found.judgements.values()] == [BEST, WORSE]
    first, second = found.conclusions()
    assert first.startswith("Trial 3 wins: val/loss 2.0000 (-0.4841 … 4.4841) over 3 seeds")
    assert "was the lowest of 12" in second
    assert "a mean of 2.0000, 1.0000 higher" in second


def test_what_cannot_be_told_apart_is_said() -> None:
    found = confirmation(candidate(3, 1.0, 2.0, 3.0), candidate(5, 1.5, 1.8, 3.3), candidate(4, 2.0, 1.8, 3.6))
    assert [one.verdict for one in found.judgements.values()] == [BEST, TIED, TIED]
    assert "trials 4 and 5 cannot be told apart from it" in found.conclusions()[0]


def test_settings_that_do_not_always_train_never_win() -> None:
    fragile = candidate(3, 1.0, 1.1, mishaps={3: "diverged"})
    found = confirmation(candidate(5, 1.5, 1.6, 1.7), fragile)
    assert found.judgements[3].verdict == UNSTABLE
    assert found.conclusions()[0].startswith("Trial 5 wins")
    assert confirmation(fragile).conclusions() == ["No setting can be confirmed: not every run came to its end."]
    assert confirmation(candidate(1, 2.0)).conclusions() == ["No setting can be confirmed: too few runs."]


# ----------------------------------------------------------------------------------------- a scripted study


class Quadratic:
    """Training whose loss is the square of x, moved by the seed."""

    def __init__(
        self, root: Path, fail: Callable[[int, Mapping[str, Any]], bool] = lambda number, params: False
    ) -> None:
        self.root, self.fail = root, fail
        self.made: list[tuple[int, dict[str, Any]]] = []  # number and parameters, of reruns seed and folder too

    def folder(self, number: int) -> Path:
        return self.root / f"{number:04d}"

    def again(
        self, number: int, params: Mapping[str, Any], judge: StudyJudge, *, seed: int, subfolder: str
    ) -> RunResult:
        return self(number, {**params, "seed": seed, "subfolder": subfolder}, judge)

    def __call__(self, number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        if self.fail(number, params):
            raise KeyboardInterrupt
        self.made.append((number, dict(params)))
        loss = params["x"] ** 2 + 0.001 * params.get("seed", 0)
        status = "diverged" if params["x"] > 0.9 else "completed"
        return RunResult(
            status=status,
            objective=loss,
            objectives={"val/loss": loss},
            last_score=loss,
            best_step=1,
            step=1,
            tokens=1,
            metrics={"val/loss": loss},
            seconds=0.0,
        )


def launcher(plan: StudyPlan, train: Train) -> Sequence[int]:
    work(SharedStudy(plan), train)
    return [0]


@pytest.fixture
def settings(corpus: Path) -> ExperimentConfig:
    return compose.compose_config([f"data.path={corpus}", *TINY, "trainer.max_steps=10"])


def with_confirm(settings: ExperimentConfig, top: int, seeds: int) -> ExperimentConfig:
    return dataclasses.replace(settings, sweep=SweepConfig(name="s", confirm=ConfirmConfig(top=top, seeds=seeds)))


def finished_study(folder: Path, xs: Sequence[float], train: Train) -> SharedStudy:
    plan = StudyPlan(
        name="s",
        storage=journal_path(folder),
        folder=folder,
        directions=("minimize",),
        space={"x": FloatDistribution(0.0, 1.0)},
        num_trials=len(xs),
        starting_points=[{"x": x} for x in xs],
    )
    study = open_study(plan, {}, force=False)
    study.add_missing()
    launcher(plan, train)
    return study


def test_the_best_distinct_settings_are_run_again_with_the_same_seeds(
    tmp_path: Path, settings: ExperimentConfig
) -> None:
    train = Quadratic(tmp_path)
    study = finished_study(tmp_path, [0.5, 0.1, 0.1, 0.95, 0.3], train)
    assert [trial.number for trial in best_distinct(study, 9)] == [1, 4, 0], "each once, and none that diverged"
    train.made.clear()
    assert confirm_best(study, with_confirm(settings, top=2, seeds=2), train, launcher)
    assert train.made == [
        (number, {"x": x, "seed": seed, "subfolder": f"confirm/{number:04d}-seed{seed}"})
        for seed in (1, 2)
        for number, x in ((1, 0.1), (4, 0.3))
    ]
    found = read_confirmation(tmp_path)
    assert found is not None
    assert [(one.trial, one.study_value) for one in found.candidates] == [
        (1, pytest.approx(0.01)),
        (4, pytest.approx(0.09)),
    ]
    assert found.candidates[0].values == {1: pytest.approx(0.011), 2: pytest.approx(0.012)}
    assert [one.verdict for one in found.judgements.values()] == [BEST, WORSE]


def test_asking_again_runs_what_is_new_only(tmp_path: Path, settings: ExperimentConfig) -> None:
    train = Quadratic(tmp_path)
    study = finished_study(tmp_path, [0.5, 0.1, 0.3], train)
    for top, seeds, added in ((2, 2, 4), (2, 2, 0), (2, 3, 2), (3, 3, 3)):
        train.made.clear()
        confirm_best(study, with_confirm(settings, top, seeds), train, launcher)
        assert len(train.made) == added
    found = read_confirmation(tmp_path)
    assert found is not None
    assert {one.trial: sorted(one.values) for one in found.candidates} == {0: [1, 2, 3], 1: [1, 2, 3], 2: [1, 2, 3]}


def test_an_interrupted_confirmation_goes_on(tmp_path: Path, settings: ExperimentConfig) -> None:
    train = Quadratic(tmp_path)
    study = finished_study(tmp_path, [0.1, 0.3], train)
    config = with_confirm(settings, top=2, seeds=2)
    broken = Quadratic(tmp_path, fail=lambda number, params: params["seed"] == 2)
    with pytest.raises(KeyboardInterrupt):
        confirm_best(study, config, broken, launcher)
    assert [params["seed"] for _, params in broken.made] == [1, 1], "seed by seed: what is there can be compared"
    train.made.clear()
    confirm_best(study, config, train, launcher)
    assert [params["seed"] for _, params in train.made] == [2, 2]


def test_a_study_with_one_good_trial_has_nothing_to_compare(
    tmp_path: Path, settings: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    train = Quadratic(tmp_path)
    study = finished_study(tmp_path, [0.1, 0.95], train)
    assert not confirm_best(study, with_confirm(settings, 2, 2), train, launcher)
    assert "nothing to compare" in caplog.text
    assert read_confirmation(tmp_path) is None


def test_trials_of_other_machines_are_waited_for(
    tmp_path: Path, settings: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Quadratic(tmp_path)
    study = finished_study(tmp_path, [0.5, 0.1], train)
    storage, more = study._storage, dataclasses.replace(study.plan, num_trials=3, starting_points=())
    SharedStudy(more).add_missing()
    elsewhere = study.study.get_trials(deepcopy=False)[2]._trial_id
    storage.set_trial_state_values(elsewhere, TrialState.RUNNING)

    def ends_meanwhile(seconds: float) -> None:
        storage.set_trial_param(elsewhere, "x", 0.2, FloatDistribution(0.0, 1.0))
        storage.set_trial_user_attr(elsewhere, "outcome", {"status": "completed"})
        storage.set_trial_state_values(elsewhere, TrialState.COMPLETE, [0.04])

    monkeypatch.setattr("lmtrain.sweep.confirm.time.sleep", ends_meanwhile)
    confirm_best(SharedStudy(more), with_confirm(settings, 2, 2), train, launcher)
    found = read_confirmation(tmp_path)
    assert found is not None
    assert [one.trial for one in found.candidates] == [1, 2]


def test_files_hold_every_number(
    tmp_path: Path, settings: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Quadratic(tmp_path)
    study = finished_study(tmp_path, [0.1, 0.3], train)
    confirm_best(study, with_confirm(settings, 2, 3), train, launcher)
    found = read_confirmation(tmp_path)
    assert found is not None
    table, picture = write_confirmation(found, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with table.open(newline="", encoding="utf-8") as file:
        best, other = csv.DictReader(file)
    assert (best["trial"], best["x"], best["verdict"], best["difference"]) == ("0", "0.1", "best", "")
    assert [float(other[f"seed_{seed}"]) for seed in (1, 2, 3)] == pytest.approx([0.091, 0.092, 0.093])
    capsys.readouterr()
    shown.print_confirmation(found)
    told = capsys.readouterr().out
    assert "the best 2 again, seeds 1 2 3: val/loss" in told
    assert "Trial 0 wins" in told


def test_new_seeds_are_none_of_the_trials_and_stay_when_there_are_more() -> None:
    assert new_seeds(7, 3) == [8, 9, 10]
    assert new_seeds(7, 5)[:3] == new_seeds(7, 3)
    for seed in (0, 2**31 - 1, 2**63 - 1):
        assert len({seed, *new_seeds(seed, 5)}) == 6


def test_what_cannot_be_confirmed_is_refused(settings: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match="seed cannot be searched"):
        require_confirmable(settings, ["lr", "seed"])
    several = dataclasses.replace(settings, objective=["val/loss", "run/seconds"])
    with pytest.raises(ConfigError, match="compares by one objective, there are val/loss, run/seconds"):
        require_confirmable(several, ["lr"])


# ------------------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_a_confirmation_killed_and_continued_ends_the_same(lmtrain: CommandLine, corpus: Path) -> None:
    free = [word for word in TINY if not word.startswith("batch_size")]
    study = [
        *("--multirun", f"data.path={corpus}", *free, "sweep=lr_dropout_batch", "hydra/sweeper/pruner=none"),
        *("trainer.max_tokens=10240", "trainer.eval_every_tokens=2560", "trainer.checkpoint_every=10", "seed=3"),
        *("hydra.sweeper.n_trials=2", "sweep.confirm.top=2", "sweep.confirm.seeds=2", "sweep.name=study"),
    ]
    folder = lmtrain.folder / "multirun/study"
    with lmtrain.start(*study) as process:
        deadline = time.monotonic() + 240
        while not list(folder.glob("confirm/*-seed*/checkpoints/last")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    done = lmtrain(*study)
    runs = sorted(path.name for path in folder.glob("confirm/*-seed*"))
    assert runs == ["0000-seed4", "0000-seed5", "0001-seed4", "0001-seed5"]
    found = read_confirmation(folder)
    assert found is not None
    assert {one.trial: sorted(one.values) for one in found.candidates} == {0: [4, 5], 1: [4, 5]}
    assert "the best 2 again, seeds 4 5" in done.stdout
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal_path(folder)))
    reruns = optuna.load_study(study_name="study/confirm", storage=storage).trials
    assert [trial.state for trial in reruns] == [TrialState.COMPLETE] * 4
    assert max(len(trial.user_attrs["attempts"]) for trial in reruns) == 2, "the one that was killed went on"

    # As if nobody had disturbed it: the same settings alone, in a folder of their own.
    trial = found.candidates[0].trial
    again = lmtrain.folder / f"multirun/study/confirm/{trial:04d}-seed4"
    alone = ["--config-dir", str(again), "--config-name", "config", "hydra.run.dir=alone"]
    lmtrain(*alone)
    assert metrics(lmtrain.folder / "alone") == metrics(again)


def metrics(folder: Path) -> list[tuple[int, float]]:
    from lmtrain.tracking.metrics_file import read_metrics

    return [(int(r["step"]), r["val/loss"]) for r in read_metrics(folder / "metrics.jsonl") if "val/loss" in r]
