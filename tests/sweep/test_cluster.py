"""Sweeps through the launchers of clusters: Slurm's, its stand-in on one machine, and Ray's."""

from __future__ import annotations

import importlib.util
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from command_line import TINY, CommandLine
from fake_slurm import FakeSlurm
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lmtrain.config.compose import config_dir, register

has_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs lmtrain[submitit]")
has_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs lmtrain[ray]")

STUDY = (
    "hydra/sweeper=study",
    "hydra/sweeper/pruner=none",
    "lr=interval(1e-3,2e-3)",
    "hydra.sweeper.n_trials=3",
    "hydra.sweeper.n_jobs=2",
)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    return ["--multirun", *TINY, "data.path=text.txt", "trainer.max_steps=4", "trainer.eval_every=2", "sweep.name=s"]


def statuses(folder: Path) -> list[str]:
    return [json.loads(path.read_text())["status"] for path in sorted(folder.glob("[0-9]*/result.json"))]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@has_submitit
def test_slurm_is_asked_for_what_a_run_needs() -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    register()
    with initialize_config_dir(str(config_dir())):
        words = ["hydra/launcher=slurm", "sweep.name=night", "hydra.launcher.mem_gb=64"]
        config = compose("lmtrain", words, return_hydra_config=True)
    asked = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(asked, dict)
    assert asked["_target_"].endswith("SlurmLauncher")
    assert (asked["name"], asked["mem_gb"], asked["gpus_per_node"]) == ("night", 64, 1)
    script = _make_sbatch_string(
        "python",
        "logs",
        signal_delay_s=asked["signal_delay_s"],
        additional_parameters=asked["additional_parameters"],
    )
    assert "#SBATCH --signal=USR2@120" in script
    assert "#SBATCH --requeue\n" in script


@has_submitit
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("sweep", [STUDY, ("lr=1e-3,2e-3,3e-3",)], ids=["study", "grid"])
def test_a_sweep_runs_as_jobs_of_slurm(tmp_path: Path, words: list[str], sweep: tuple[str, ...]) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    CommandLine(tmp_path)(*words, *sweep, "hydra/launcher=slurm", PATH=slurm.path)
    assert statuses(tmp_path / "multirun" / "s") == ["completed"] * 3
    (script,) = slurm.scripts
    jobs = 2 if sweep is STUDY else 3
    for asked in (f"array=0-{jobs - 1}%{jobs}", "gpus-per-node=1", "cpus-per-task=8", "mem=32GB", "time=240"):
        assert f"#SBATCH --{asked}\n" in script
    assert "#SBATCH --job-name=s\n" in script


@has_submitit
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("sweep", [STUDY, ("lr=1e-3",)], ids=["study", "grid"])
def test_a_job_that_is_warned_saves_and_goes_on_when_it_is_queued_again(
    tmp_path: Path, words: list[str], sweep: tuple[str, ...]
) -> None:
    """As at its time limit, and when its node is wanted back."""
    slurm = FakeSlurm(tmp_path / "slurm")
    one = ["hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1"] if sweep is STUDY else []
    long = ["trainer.max_steps=3000", "trainer.eval_every=1000", "trainer.log_every=1"]
    run = tmp_path / "multirun" / "s" / "0000"

    def steps() -> int:
        return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0

    with CommandLine(tmp_path).start(*words, *sweep, *one, *long, "hydra/launcher=slurm", PATH=slurm.path) as command:
        wait_for(lambda: steps() > 50)
        (job,) = slurm.processes
        (worker,) = psutil.Process(job).children(recursive=True) or [psutil.Process(job)]
        worker.send_signal(signal.SIGUSR2)
        out, err = command.communicate(timeout=200)
    assert command.returncode == 0, out + err
    assert slurm.told == ["requeue 100"]
    assert statuses(run.parent) == ["completed"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [(record["attempt"], record["step"]) for record in records if "train/loss" in record]
    assert [step for _, step in trained] == list(range(1, 3001))  # no step was lost, none made twice
    assert {attempt for attempt, _ in trained} == {0, 1}
    assert trained[50][0] == 0


@has_submitit
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_study_is_tried_without_slurm(tmp_path: Path, words: list[str]) -> None:
    CommandLine(tmp_path)(*words, *STUDY, "hydra/launcher=slurm_local")
    assert statuses(tmp_path / "multirun" / "s") == ["completed"] * 3


@has_ray
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("sweep", [STUDY, ("lr=1e-3,2e-3",)], ids=["study", "grid"])
def test_a_sweep_runs_on_ray(tmp_path: Path, words: list[str], sweep: tuple[str, ...]) -> None:
    CommandLine(tmp_path)(*words, *sweep, "hydra/launcher=ray_local")
    assert set(statuses(tmp_path / "multirun" / "s")) == {"completed"}


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_a_launcher_that_is_not_installed_is_told_with_the_command(tmp_path: Path) -> None:
    told = CommandLine(tmp_path)("--multirun", "hydra/launcher=ray_local", "lr=1,2", status=2).stderr
    assert told == "lmtrain: hydra/launcher/ray needs a plugin that is not installed: pip install 'lmtrain[ray]'\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.slow
def test_a_run_that_a_batch_system_warns_saves_and_says_so(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    words = [*TINY, "data.path=text.txt", "trainer.max_steps=100000", "trainer.log_every=1", "hydra.run.dir=run"]
    with CommandLine(tmp_path).start(*words) as command:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
        command.send_signal(number)
        _, err = command.communicate(timeout=60)
    assert command.returncode == 128 + number
    assert f"stopped by {number.name}" in err
    assert (tmp_path / "run" / "checkpoints" / "last").exists()
