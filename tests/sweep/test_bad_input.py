"""Sweeps that cannot be: told in a line or two before anything starts, with nothing left behind; and doubtful ones."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from command_line import TINY, CommandLine, snapshot
from hydra import compose, initialize_config_dir
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from lmtrain.config.compose import config_dir, parse_config, register, without_hydra
from lmtrain.config.launch import Workers, count_workers
from lmtrain.config.schema import ExperimentConfig
from lmtrain.sweep.setup import unfair_budget, warn_of_doubts
from lmtrain.sweep.storage import doubts, filesystem_of
from lmtrain.sweep.study import StudyPlan

STUDY = (
    *("--multirun", *TINY, "hydra/sweeper=study", "hydra.sweeper.n_trials=1", "data.path=good.txt"),
    *("trainer.max_steps=null", "trainer.max_tokens=640", "trainer.eval_every=null", "trainer.eval_every_tokens=320"),
)
LR = "lr=tag(log,interval(1e-3,1e-2))"
TWO = "objective=[val/loss,run/seconds] hydra.sweeper.direction=[minimize,minimize]"

REFUSED = {
    "unknown setting": ("lrr=choice(1,2)", "there is no setting 'lrr'; did you mean lr?"),
    "unknown option": ("optimizer=choice(adamw,muonn)", "optimizer has no option 'muonn'; did you mean muon?"),
    "unknown sampler": (f"{LR} hydra/sweeper/sampler=tpee", "did you mean tpe?"),
    "removed sampler": (f"{LR} hydra/sweeper/sampler=motpe", "was removed in Optuna"),
    "unknown pruner": (f"{LR} hydra/sweeper/pruner=medain", "did you mean median?"),
    "unknown setting of a sampler": (f"{LR} hydra.sweeper.sampler.n_startup_trial=3", "sampler.n_startup_trials?"),
    "mistyped setting of a sampler": (f"{LR} hydra.sweeper.sampler.n_startup_trials=many", "n_startup_trials"),
    "wrong setting of a sampler": (
        f"{LR} hydra/sweeper/sampler=qmc hydra.sweeper.sampler.qmc_type=foo",
        "hydra.sweeper.sampler: The `qmc_type='foo'` is invalid",
    ),
    "wrong setting of a pruner": (f"{LR} hydra.sweeper.pruner.reduction_factor=0", "hydra.sweeper.pruner: "),
    "an interval upside down": ("lr=interval(1e-2,1e-3)", "must be below its upper end, got 0.01 and 0.001"),
    "an empty choice": ("lr=choice()", "empty choice"),
    "no point that can be run": ("model.d_model=choice(30,50) model.num_heads=4", "none of 20 settings drawn from"),
    "a wrong setting beside the space": (f"{LR} model.num_heads=3", "must be divisible by model.num_heads (3)"),
    "nothing searched": ("lr=1e-3", "nothing is searched"),
    "no trials": (f"{LR} hydra.sweeper.n_trials=0", "n_trials must be at least 1, got 0"),
    "no workers": (f"{LR} hydra.sweeper.n_jobs=0", "n_jobs must be at least 1, got 0"),
    "an objective that is none": (f"{LR} objective=val/los", "objective must be one of val/loss"),
    "an objective never measured": (f"{LR} objective=[val/loss,train/speed]", "'train/speed' is never measured"),
    "fewer directions than objectives": (f"{LR} objective=[val/loss,run/seconds]", "gives 1 for 2 objective(s)"),
    "a direction that is none": (f"{LR} hydra.sweeper.direction=down", "must be minimize or maximize, got down"),
    "a loss to maximise": (f"{LR} hydra.sweeper.direction=maximize", "val/loss is a loss"),
    "a sampler of one objective": (
        f"{LR} {TWO} hydra/sweeper/sampler=cmaes",
        "CmaEsSampler knows one objective only",
    ),
    "a starting point outside": (f"{LR} sweep.enqueue=[{{lr:1.0}}]", "lr=1.0 lies outside 0.001 … 0.01 (log)"),
    "a starting point elsewhere": (f"{LR} sweep.enqueue=[{{dropout:0.1}}]", "dropout is not searched; there are lr"),
    "a grid of an interval": (f"{LR} hydra/sweeper/sampler=grid", "a grid needs values, not an interval"),
    "a grid too large": (
        "hydra/sweeper/sampler=grid batch_size=range(1,1000) seed=range(1,1000)",
        "a grid of 998,001 points is too large",
    ),
    "a search function that is not there": (f"{LR} hydra.sweeper.custom_search_space=nowhere.space", "nowhere.space"),
    "neither database nor journal": (f"{LR} hydra.sweeper.storage=nonsense", "neither a database"),
    "no such database": (f"{LR} hydra.sweeper.storage=foo://bar", "the study's storage foo://bar cannot be used"),
    "a database in no folder": (f"{LR} hydra.sweeper.storage=sqlite:////nowhere/s.db", "unable to open database file"),
    "a server that does not answer": (
        f"{LR} hydra.sweeper.storage=postgresql://me:secret@127.0.0.1:9/db",
        "the study's storage postgresql://me:***@127.0.0.1:9/db cannot be used",
    ),
    "a missing text": (f"{LR} data.path=nowhere.txt", "data.path=nowhere.txt: no such file or folder"),
    "no such device": (f"{LR} device=cuda", "device=cuda is not available"),
    "an earlier study that is none": (f"{LR} sweep.start_from=nowhere", "nowhere"),
    "the folder of another study": (f"{LR} sweep.name=other model.d_model=32", "model.d_model 16 → 32"),
    "another space in its folder": ("lr=interval(1e-3,2e-3) sweep.name=other", "search lr 0.001 … 0.01 (log) →"),
    "another sampler in its folder": (
        f"{LR} sweep.name=other hydra.sweeper.sampler.n_startup_trials=5",
        "sampler n_startup_trials 10 → 5",
    ),
    "a dry run of one run": ("lr=1e-3 --dry-run", "--dry-run tells what a sweep would run: add --multirun"),
    "a dry run of a foreign sweeper": (
        f"{LR} hydra/sweeper=optuna --dry-run",
        "a dry run is of a grid or of hydra/sweeper=study",
    ),
}


@dataclass(frozen=True)
class Refusal:
    """How a case ended."""

    status: int
    out: str
    err: str
    touched: set[str]  # what is new, changed or gone in the working folder


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Refusal]:
    """Every case of REFUSED, each in a folder of its own with a text, where `other` names a study there."""
    root = tmp_path_factory.mktemp("refused")
    program = CommandLine(root)
    cases: list[tuple[str, list[str]]] = []
    for number, (name, (line, _)) in enumerate(REFUSED.items()):
        folder = root / str(number)
        folder.mkdir()
        (folder / "good.txt").write_text("the cat sat on the mat\n" * 200)
        given = [word for word in STUDY if word != "--multirun" or name != "a dry run of one run"]
        given = [word for word in given if "hydra" not in word or name != "a dry run of a foreign sweeper"]
        cases.append((str(folder), [*given, *line.split()]))
    first, *others = [Path(place) for place, words in cases if "sweep.name=other" in words]
    assert program.fork([(str(first), [*STUDY, LR, "sweep.name=other"])]) == [0]
    for place in others:
        shutil.copytree(first, place, dirs_exist_ok=True)
    before = [snapshot(Path(place)) for place, _ in cases]
    told = {}
    for name, (path, _), status, earlier in zip(REFUSED, cases, program.fork(cases), before, strict=True):
        out, err = (Path(f"{path}.{end}").read_text() for end in ("out", "err"))
        told[name] = Refusal(status, out, err, {name for name, _ in earlier.items() ^ snapshot(Path(path)).items()})
    return told


@pytest.mark.parametrize("name", REFUSED)
def test_a_sweep_that_cannot_be_is_told_in_a_line_or_two(name: str, refusals: dict[str, Refusal]) -> None:
    case = refusals[name]
    lines = case.err.splitlines()
    assert REFUSED[name][1] in case.err
    assert case.status == 2
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("lmtrain: ")
    assert "secret" not in case.out + case.err
    assert not [path for path in case.touched if not path.startswith("cache")]


# ------------------------------------------------------------------------------------------------- doubtful ones


@pytest.fixture(scope="module")
def base() -> ExperimentConfig:
    register()
    with initialize_config_dir(str(config_dir())):
        return parse_config(without_hydra(compose("lmtrain", ["sweep=lr_dropout_batch"], return_hydra_config=True)))


def plan_of(folder: Path, **changes: Any) -> StudyPlan:
    space: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-3, 1e-2)}
    settings: dict[str, Any] = {
        "name": "study",
        "storage": str(folder / "study.journal"),
        "folder": folder,
        "directions": ("minimize",),
        "space": space,
        "num_trials": 50,
    }
    return StudyPlan(**(settings | changes))


TPE = {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 10}
ASHA = {"_target_": "optuna.pruners.SuccessiveHalvingPruner"}


def warnings_of(
    caplog: pytest.LogCaptureFixture,
    plan: StudyPlan,
    base: ExperimentConfig,
    *,
    sampler: Mapping[str, Any] | None = None,
    workers: int = 1,
) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_doubts(plan, base, sampler=sampler or TPE, pruner=ASHA, workers=workers)
    return "\n".join(record.getMessage() for record in caplog.records)


def test_nothing_is_said_of_a_usual_study(
    tmp_path: Path, base: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(caplog, plan_of(tmp_path), base, workers=8) == ""


def test_a_budget_that_batch_size_changes_is_told(base: ExperimentConfig) -> None:
    steps = dataclasses.replace(base.trainer, max_steps=100, max_tokens=None)
    unfair = unfair_budget(dataclasses.replace(base, trainer=steps), ["lr", "batch_size"])
    assert unfair is not None
    assert f"trainer.max_steps=null trainer.max_tokens={100 * base.batch_size * base.data.seq_len}" in unfair
    assert unfair_budget(dataclasses.replace(base, trainer=steps), ["lr"]) is None
    assert unfair_budget(base, ["lr", "batch_size"]) is None
    rarely = dataclasses.replace(base.trainer, eval_every=10, eval_every_tokens=None)
    uneven = unfair_budget(dataclasses.replace(base, trainer=rarely), ["batch_size"])
    assert uneven is not None
    assert "trainer.eval_every_tokens=" in uneven


def test_sqlite_is_not_for_several_workers() -> None:
    assert doubts("sqlite:///study.db", workers=1) is None
    told = doubts("sqlite:///study.db", workers=2)
    assert told is not None
    assert "hydra.sweeper.storage=postgresql://" in told


def test_a_journal_on_a_network_filesystem_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [("/", "ext4"), ("/home", "nfs4"), ("/home/me/scratch", "xfs")]
    mounts = [SimpleNamespace(mountpoint=mountpoint, fstype=kind) for mountpoint, kind in table]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert filesystem_of(Path("/home/me/study.journal")) == "nfs4"
    assert filesystem_of(Path("/home/me/scratch/study.journal")) == "xfs"
    assert filesystem_of(Path("/homes/study.journal")) == "ext4"
    told = doubts("/home/me/study.journal", workers=1)
    assert told is not None
    assert "network filesystem (nfs4)" in told
    assert doubts("/home/me/scratch/study.journal", workers=8) is None


def test_samplers_say_what_they_cannot_learn_from(
    tmp_path: Path, base: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    cmaes = {"_target_": "optuna.samplers.CmaEsSampler", "n_startup_trials": 1}
    mixed = plan_of(tmp_path, space={"lr": FloatDistribution(1, 2), "optimizer": CategoricalDistribution(("a", "b"))})
    told = warnings_of(caplog, mixed, base, sampler=cmaes)
    assert "optimizer is drawn at random" in told
    assert "not from pruned ones" in told
    few = warnings_of(caplog, plan_of(tmp_path, num_trials=10), base)
    assert "first 10 points at random: all of hydra.sweeper.n_trials=10" in few
    several = warnings_of(caplog, plan_of(tmp_path, directions=("minimize", "maximize")), base)
    assert "several objectives are never pruned" in several


def test_one_process_is_not_several_workers(caplog: pytest.LogCaptureFixture) -> None:
    register()
    with initialize_config_dir(str(config_dir())):
        config = compose("lmtrain", ["hydra/launcher=basic"], return_hydra_config=True)
    assert count_workers(config, 4, None) == Workers(1, share_machine=False)
    assert "add hydra/launcher=joblib" in caplog.text
