"""A study shared by processes: every trial is worked on once, whoever dies, in every kind of storage."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from lmtrain.sweep import lease as leases
from lmtrain.sweep.lease import Lease
from lmtrain.sweep.storage import journal_path
from lmtrain.sweep.study import LeaseLost, Outcome, SharedStudy, StudyPlan, attempts_of, lease_of

SPACE = {"x": FloatDistribution(-1.0, 1.0), "kind": CategoricalDistribution(["a", "b"])}


def tpe(number: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(seed=number, n_startup_trials=3)


@pytest.fixture(params=["journal", "sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> StudyPlan:
    """A study of eight trials in each kind of storage."""
    storage = {
        "journal": lambda: journal_path(tmp_path),
        "sqlite": lambda: f"sqlite:///{tmp_path}/study.db",
        "postgresql": lambda: request.getfixturevalue("postgresql"),
    }[request.param]()
    return StudyPlan(
        name=f"study of {tmp_path.name}",
        storage=storage,
        folder=tmp_path,
        directions=("minimize",),
        space=SPACE,
        num_trials=8,
        starting_points=[{"x": 0.5, "kind": "b"}, {"kind": "a"}],
        make_sampler=tpe,
    )


def complete(study: SharedStudy, trial: optuna.Trial) -> None:
    study.tell(
        trial, Outcome(state=TrialState.COMPLETE, values=(trial.params["x"] ** 2,), details={"status": "completed"})
    )


def work(plan: StudyPlan, worker: int = 0, *, die_at: int | None = None, pause: float = 0.0) -> None:
    """Work until nothing is left, or die by kill -9 in the middle of a trial."""
    study, done = SharedStudy(plan), 0
    while (trial := study.claim(worker)) is not None:
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
        complete(study, trial)
        done += 1


def points(plan: StudyPlan) -> list[dict[str, object]]:
    return [trial.params for trial in SharedStudy(plan).trials()]


def test_one_worker_does_every_trial_in_order(plan: StudyPlan) -> None:
    study = SharedStudy(plan)
    study.add_missing()
    study.add_missing()
    assert [trial.state for trial in study.trials()] == [TrialState.WAITING] * 8
    work(plan)
    trials = study.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 8
    assert trials[0].params == {"x": 0.5, "kind": "b"}
    assert trials[1].params["kind"] == "a"
    assert len({trial.params["x"] for trial in trials}) == 8
    assert study.is_done()
    assert not study.has_work()


def test_more_trials_go_on_where_the_study_was(plan: StudyPlan) -> None:
    shorter = dataclasses.replace(plan, num_trials=5)
    SharedStudy(shorter).add_missing()
    work(shorter)
    before = points(shorter)
    SharedStudy(plan).add_missing()
    work(plan)
    assert points(plan)[:5] == before
    assert len(points(plan)) == 8
    assert points(shorter) == before, "a smaller total does not see the rest"


def test_a_killed_worker_changes_nothing(plan: StudyPlan, tmp_path: Path) -> None:
    """One worker, killed twice in the middle of a trial: the study ends as the undisturbed one."""
    undisturbed = dataclasses.replace(plan, name="undisturbed", storage=journal_path(tmp_path / "u"))
    (tmp_path / "u").mkdir()
    SharedStudy(undisturbed).add_missing()
    work(undisturbed)
    SharedStudy(plan).add_missing()
    context = multiprocessing.get_context("spawn")
    for die_at in (3, 1):
        process = context.Process(target=partial(work, plan, die_at=die_at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert SharedStudy(plan).has_work()
    work(plan)
    study = SharedStudy(plan)
    assert points(plan) == points(undisturbed)
    assert {trial.state for trial in study.trials()} == {TrialState.COMPLETE}
    assert [len(attempts_of(trial)) for trial in study.trials()] == [1, 1, 1, 2, 2, 1, 1, 1]


@pytest.mark.multiprocess
def test_workers_side_by_side_share_the_trials(plan: StudyPlan) -> None:
    SharedStudy(plan).add_missing()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=partial(work, plan, worker, pause=0.05)) for worker in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    trials = SharedStudy(plan).trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert [len(attempts_of(trial)) for trial in trials] == [1] * 8
    assert len({trial.params["x"] for trial in trials}) == 8


def test_a_trial_put_back_keeps_its_number_parameters_and_reports(plan: StudyPlan) -> None:
    study = SharedStudy(plan)
    study.add_missing()
    first = study.claim()
    assert first is not None
    first.report(3.0, 100)
    second = study.claim()
    assert second is not None
    study.put_back(first)
    again = study.claim()
    assert again is not None
    assert (again.number, again.params) == (first.number, first.params)
    assert study.trials()[0].intermediate_values == {100: 3.0}
    assert study.trials()[1].state == TrialState.RUNNING


def test_a_lost_lease_is_noticed(plan: StudyPlan) -> None:
    study = SharedStudy(plan)
    study.add_missing()
    trial = study.claim()
    assert trial is not None
    thief = dataclasses.replace(Lease.of_this_process(0), host="elsewhere", pid=1)
    study.study._storage.set_trial_user_attr(trial._trial_id, "lease", thief.as_dict())
    with pytest.raises(LeaseLost):
        complete(study, trial)
    assert study.trials()[0].state == TrialState.RUNNING


def test_a_changed_definition_is_told_by_difference(plan: StudyPlan) -> None:
    study = SharedStudy(plan)
    assert study.define({"search x": "-1 … 1", "objective": "val/loss"}) == []
    assert SharedStudy(plan).define({"search x": "-1 … 1", "objective": "val/loss"}) == []
    changed = study.define({"search x": "-2 … 1", "objective": "val/loss", "lr": "0.1"})
    assert changed == ["search x -1 … 1 → -2 … 1", "lr None → 0.1"]


def test_trials_of_an_earlier_study_come_first_and_do_not_count(plan: StudyPlan, tmp_path: Path) -> None:
    earlier = dataclasses.replace(plan, name="earlier", num_trials=4)
    SharedStudy(earlier).add_missing()
    work(earlier)
    other = optuna.create_trial(value=1.0, params={"y": 1.0}, distributions={"y": FloatDistribution(0, 1)})
    study = SharedStudy(plan)
    study.add_missing([*SharedStudy(earlier).trials(), other])
    assert study.imported == 4
    work(plan)
    trials = study.trials()
    assert len(trials) == 4 + 8
    assert trials[4].params == {"x": 0.5, "kind": "b"}, "the starting points are those of its own trials"


# ----------------------------------------------------------------------------------------------------- leases


def test_a_lease_knows_whether_its_process_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Lease.of_this_process(0)
    assert mine.is_of_this_process()
    assert not mine.is_dead()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = dataclasses.replace(mine, pid=child.pid, started=leases.psutil.Process(child.pid).create_time())
    assert not theirs.is_dead()
    assert dataclasses.replace(theirs, started=theirs.started - 60).is_dead(), "its number is another process's now"
    child.kill()
    child.wait()
    assert theirs.is_dead()
    assert dataclasses.replace(mine, boot="another start of this machine").is_dead()


def test_a_lease_of_another_machine_ends_when_it_is_not_renewed() -> None:
    theirs = dataclasses.replace(Lease.of_this_process(0), host="elsewhere")
    assert not theirs.is_of_this_process()
    assert not theirs.is_dead()
    assert dataclasses.replace(theirs, renewed=time.time() - leases.DEAD_AFTER_SECONDS - 1).is_dead()


def test_a_lease_is_renewed_while_a_trial_is_kept(plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr("lmtrain.sweep.study.RENEW_OFTEN_SECONDS", 0.0)
    study = SharedStudy(plan)
    study.add_missing()
    trial = study.claim()
    assert trial is not None
    before = lease_of(study.trials()[0])
    with study.keep(trial):
        time.sleep(0.3)
    after = lease_of(study.trials()[0])
    assert before is not None
    assert after is not None
    assert after.renewed > before.renewed
    assert after.begun == before.begun
