"""Studies as a user starts them: real commands, killed and started again."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from command_line import TINY, CommandLine
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

STUDY = (
    *("--multirun", "sweep=lr_dropout_batch", "sweep.name=study", "trainer.eval_batches=null"),
    *("trainer.max_tokens=6400", "trainer.eval_every_tokens=640", "hydra.sweeper.n_trials=5"),
    *("batch_size=choice(2,4)", "schedule.warmup_steps=0"),
)
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.fixture
def words(corpus: Path) -> list[str]:
    """A tiny study over lr, dropout and batch size."""
    return [*(word for word in TINY if not word.startswith("batch_size")), f"data.path={corpus}", *STUDY]


def trials_of(folder: Path) -> list[FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name="study", storage=storage).get_trials()


def story(folder: Path) -> list[Any]:
    """What a study found out, without times."""
    return [(t.number, t.state.name, t.params, t.values, t.intermediate_values) for t in trials_of(folder)]


def weights_of(run: Path) -> str:
    """The sum of a run's last weights."""
    manifest = json.loads((run / "checkpoints/last/manifest.json").read_text())
    return str(manifest["sha256"]["model.safetensors"])


def wait_until(condition: Any, process: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def undisturbed(corpus: Path, words: list[str], root: Path) -> Path:
    """The folder of the same study, left alone."""
    alone = CommandLine(root / "alone")
    alone.folder.mkdir()
    alone(*words)
    return alone.folder / "multirun/study"


def test_a_study_tells_every_trial_and_the_same_command_goes_on(lmtrain: CommandLine, words: list[str]) -> None:
    lmtrain(*words)
    folder = lmtrain.folder / "multirun/study"
    trials = trials_of(folder)
    assert len(trials) == 5
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert {"lr": 0.006, "dropout": 0.0}.items() <= trials[0].params.items(), "the defaults come first, where in range"
    results = [json.loads((folder / f"{trial.number:04d}/result.json").read_text()) for trial in trials]
    assert [r["status"] for r in results] == [trial.user_attrs["outcome"]["status"] for trial in trials]
    for trial, result in zip(trials, results, strict=True):
        assert trial.value == (result["objective"] if trial.state == TrialState.COMPLETE else result["last_score"])
        assert set(trial.intermediate_values) <= set(range(640, 6401, 640)), (
            "every batch size reports at the same tokens"
        )
    assert not (folder / ".workers").exists()

    before = story(folder)
    lmtrain(*words)
    assert story(folder) == before, "nothing is done twice"
    refused = lmtrain(f"resume={folder}/0001", "trainer.max_tokens=7000", status=2)
    assert "is a trial of a study" in refused.stderr
    lmtrain(*words, "hydra.sweeper.n_trials=6")
    assert story(folder)[:5] == before
    assert len(story(folder)) == 6


def test_another_study_in_the_folder_is_refused_with_what_differs(lmtrain: CommandLine, words: list[str]) -> None:
    lmtrain(*words, "hydra.sweeper.n_trials=1")
    refused = lmtrain(*words, "hydra.sweeper.n_trials=1", "model.d_model=32", "lr=interval(1,2)", status=2)
    assert "model.d_model 16 → 32" in refused.stderr
    assert "search lr 0.001 … 0.02 (log) → 1 … 2" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2
    assert len(trials_of(lmtrain.folder / "multirun/study")) == 1


def test_a_study_killed_at_any_instant_ends_as_the_undisturbed_one(
    lmtrain: CommandLine, words: list[str], corpus: Path, tmp_path: Path
) -> None:
    expected = undisturbed(corpus, words, tmp_path)
    folder, chance = lmtrain.folder / "multirun/study", random.Random(1)
    for number in range(2):
        with lmtrain.start(*words) as process:
            reached = lambda number=number: (folder / f"{number:04d}/metrics.jsonl").exists()  # noqa: E731
            wait_until(reached, process)
            time.sleep(chance.uniform(0.0, 0.5))
            process.kill()
    lmtrain(*words)
    assert story(folder) == story(expected)
    for trial in trials_of(folder):
        sums = [
            json.loads((f / f"{trial.number:04d}/checkpoints/last/manifest.json").read_text())
            for f in (folder, expected)
        ]
        assert sums[0]["sha256"]["model.safetensors"] == sums[1]["sha256"]["model.safetensors"]


def test_an_interrupted_study_saves_and_goes_on(
    lmtrain: CommandLine, words: list[str], corpus: Path, tmp_path: Path
) -> None:
    folder = lmtrain.folder / "multirun/study"
    long = [*words, "trainer.max_tokens=64000", "hydra/sweeper/pruner=none", "hydra.sweeper.n_trials=2"]
    with lmtrain.start(*long) as process:
        wait_until(lambda: (folder / "0000/metrics.jsonl").exists(), process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    assert [trial.state for trial in trials_of(folder)] == [TrialState.WAITING] * 2
    assert json.loads((folder / "0000/result.json").read_text())["status"] == "interrupted"
    done = lmtrain(*long, "trainer.log_every=5")
    assert [trial.state for trial in trials_of(folder)] == [TrialState.COMPLETE] * 2, done.stdout
    assert len(trials_of(folder)[0].user_attrs["attempts"]) == 2


@pytest.mark.slow
def test_a_trial_goes_on_with_the_threads_it_was_begun_with(lmtrain: CommandLine, words: list[str]) -> None:
    """Begun by one of two workers, of one thread each; continued by a single one, which has all cores."""
    folder = lmtrain.folder / "multirun/study"
    shared = [word for word in words if not word.startswith("parallel.")]
    long = [*shared, "trainer.max_tokens=64000", "hydra/sweeper/pruner=none", "hydra.sweeper.n_trials=1"]
    with lmtrain.start(*long, *JOBLIB) as process:
        wait_until(lambda: (folder / "0000/checkpoints/last").exists(), process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    begun = (folder / "0000/config.yaml").read_text()
    lmtrain(*long)
    (trial,) = trials_of(folder)
    assert trial.state == TrialState.COMPLETE, trial.user_attrs["outcome"]
    assert len(trial.user_attrs["attempts"]) == 2
    assert (folder / "0000/config.yaml").read_text() == begun


def test_trials_in_one_process_leak_nothing_into_each_other(lmtrain: CommandLine, words: list[str]) -> None:
    """The last trial of a study, made alone in a process of its own, is the same to the bit."""
    lmtrain(*words, "hydra.sweeper.n_trials=3", "hydra/sweeper/pruner=none")
    trial = lmtrain.folder / "multirun/study/0002"
    lmtrain("--config-dir", str(trial), "--config-name", "config", "hydra.run.dir=again")
    assert weights_of(trial) == weights_of(lmtrain.folder / "again")


# ----------------------------------------------------------------------------------------------- several workers


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", ["worker", "coordinator", "everything"])
def test_several_workers_lose_no_trial_when_one_is_killed(lmtrain: CommandLine, words: list[str], victim: str) -> None:
    folder = lmtrain.folder / "multirun/study"
    unpruned = [*words, *JOBLIB, "hydra/sweeper/pruner=none"]
    lmtrain(*unpruned, "sweep.name=alone", "hydra.sweeper.study_name=study")
    expected = story(lmtrain.folder / "multirun/alone")
    with lmtrain.start(*unpruned) as process:
        wait_until(lambda: (folder / "0002/metrics.jsonl").exists(), process)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "popen_loky" in " ".join(child.cmdline())]
        assert len(workers) == 2
        if victim in ("worker", "everything"):
            for worker in workers[: 1 if victim == "worker" else 2]:
                worker.kill()
        if victim in ("coordinator", "everything"):
            process.kill()
        process.communicate(timeout=300)
    if victim != "worker":
        assert process.returncode == -signal.SIGKILL
        psutil.wait_procs(workers, timeout=60)
        assert not any(worker.is_running() for worker in workers), "orphans stop at their next evaluation"
        lmtrain(*unpruned)
    values = [(number, state, values) for number, state, _, values, _ in story(folder)]
    assert [(number, state) for number, state, _ in values] == [(n, "COMPLETE") for n in range(5)]
    # The starting phase of the sampler is random search: every point follows from its number alone.
    assert story(folder) == expected


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_same_command_elsewhere_joins_in_through_a_database(
    lmtrain: CommandLine, words: list[str], postgresql: str, tmp_path: Path
) -> None:
    """Two machines, in effect: two folders that see nothing of each other, one database."""
    machines = [CommandLine(tmp_path / name) for name in ("here", "there")]
    shared = [*words, f"hydra.sweeper.storage={postgresql}", "hydra.sweeper.n_trials=8", "hydra/sweeper/pruner=none"]
    processes = []
    for machine in machines:
        machine.folder.mkdir()
        processes.append(machine.start(*shared))
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        assert "secret" not in out + err
    study = optuna.load_study(study_name="study", storage=postgresql)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 8
    made = [sorted(path.name for path in (machine.folder / "multirun/study").glob("0*")) for machine in machines]
    assert sorted(made[0] + made[1]) == [f"{number:04d}" for number in range(8)], "each trial was made once"
    assert all(made), "both took part"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), f"{path} has the password"
