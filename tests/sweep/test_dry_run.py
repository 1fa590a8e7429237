"""What a dry run tells of a sweep, and that it does nothing else."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from command_line import TINY, CommandLine
from hydra import compose, initialize_config_dir

from lmtrain.config.compose import config_dir, group_options, parse_config, register, without_hydra
from lmtrain.config.schema import ExperimentConfig
from lmtrain.planning.duration import Machine
from lmtrain.planning.estimate import estimate
from lmtrain.run_dir import RunDir
from lmtrain.sweep.reading import read_study

BUDGET = (
    *("trainer.max_steps=null", "trainer.max_tokens=1280", "trainer.eval_every=null", "trainer.eval_every_tokens=640"),
    "hydra/sweeper=study",
)
SPACE = ("lr=tag(log,interval(1e-3,1e-2))", "batch_size=choice(2,4)", "optimizer=choice(adamw,muon)")
CUSTOM = """
def suggest(config, trial):
    trial.suggest_float("dropout", 0.0, 0.1 * trial.params["batch_size"] / config.data.seq_len)


def twice(config, trial):
    trial.suggest_categorical("seed", [1, 2])
"""


@pytest.fixture
def words(corpus: Path) -> list[str]:
    return ["--multirun", f"data.path={corpus}", *(word for word in TINY if not word.startswith("batch_size"))]


def rows_of(out: str) -> dict[str, list[str]]:
    """The lines below each heading."""
    rows: dict[str, list[str]] = {}
    heading = ""
    for line in out.splitlines():
        found = re.match(r"(\w+) {2,}(.*)|( {4,})(.*)", line)
        if found is not None:
            heading = found[1] or heading
            rows.setdefault(heading, []).append((found[2] or found[4]).strip())
    return rows


def short(setting: tuple[str, object]) -> str:
    name, value = setting
    return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"


def test_a_study_is_told_and_not_begun_and_then_is_as_told(lmtrain: CommandLine, words: list[str]) -> None:
    (lmtrain.folder / "spaces.py").write_text(CUSTOM)
    study = [*words, *BUDGET, *SPACE, "sweep.name=s", "hydra.sweeper.n_trials=3"]
    study.append("hydra.sweeper.custom_search_space=spaces.suggest")
    told = lmtrain(*study, "--dry-run", COLUMNS="200")
    assert told.stderr == ""
    assert [path.name for path in lmtrain.folder.iterdir() if path.name != "__pycache__"] == ["spaces.py"]
    rows = rows_of(told.stdout)
    assert rows["study"] == ["s: minimize val/loss"]
    assert [re.split(r" {2,}", line) for line in rows["space"][:3]] == [
        ["lr", "0.001 … 0.01 (log), default 0.006"],
        ["batch_size", "2 | 4, default outside"],
        ["optimizer", "adamw | muon, default muon"],
    ]
    assert "custom_search_space" in rows["space"][3]
    assert rows["sampler"][0].startswith("TPESampler, n_startup_trials 10")
    assert rows["trials"] == ["3 by 1 worker, 1,280 tokens each, evaluated every 640"]
    assert rows["storage"] == ["multirun/s/study.journal"]
    assert "about" in rows["time"][0]
    assert "GFLOP/s in matrix products" in " ".join(rows["time"])
    assert "GiB" in rows["memory"][0]
    assert "draws its first 10 points at random: all of hydra.sweeper.n_trials=3" in told.stdout

    lmtrain(*study)
    trials = read_study(lmtrain.folder / "multirun/s").trials
    asked = [" ".join(map(short, trial.params.items())) for trial in trials]
    assert [line.split("  ")[1] for line in rows["first"]] == asked, "the study asked what was told"
    assert all(trial.params["dropout"] <= 0.1 * trial.params["batch_size"] / 16 for trial in trials)
    again = rows_of(lmtrain(*study, "--dry-run", COLUMNS="200").stdout)
    assert again["trials"][0].endswith("the study is there, 3 of them have ended")

    refused = lmtrain(*words, *BUDGET, *SPACE, "seed=3", "hydra.sweeper.custom_search_space=spaces.twice", status=2)
    assert "seed is suggested by the search function, so that seed=3 is not possible" in refused.stderr


def test_a_grid_is_told_run_by_run(lmtrain: CommandLine, words: list[str]) -> None:
    grid = [*words, "trainer.max_steps=10", "batch_size=4", "model.num_heads=2,3", "lr=1e-3,3e-3"]
    told = lmtrain(*grid, "sweep.dry_run=true", COLUMNS="200")
    assert told.stderr == ""
    assert not list(lmtrain.folder.iterdir())
    rows = rows_of(told.stdout)
    assert rows["grid"] == ["4 runs, 640 tokens each, evaluated every 16,000"]
    wrong = "cannot be run: model.d_model (16) must be divisible by model.num_heads (3)"
    assert rows["runs"] == [
        "0000  model.num_heads=2 lr=0.001",
        "0001  model.num_heads=2 lr=0.003",
        f"0002  model.num_heads=3 lr=0.001  {wrong}",
        f"0003  model.num_heads=3 lr=0.003  {wrong}",
    ]
    assert "if all 2 go to the end" in " ".join(rows["time"])


@pytest.mark.slow
@pytest.mark.parametrize("option", [name for name in group_options("sweep") if name != "grid"])
def test_every_shipped_study_can_be_told(lmtrain: CommandLine, option: str) -> None:
    told = lmtrain("--multirun", f"sweep={option}", "--dry-run", COLUMNS="200")
    rows = rows_of(told.stdout)
    assert told.stderr == ""
    assert rows["study"][0].startswith(option)
    assert all("default outside" not in line for line in rows["space"]), "it begins with what is usual"
    assert rows["first"]
    assert not [line for line in rows["first"] if "cannot be run" in line]
    assert "warning" not in told.stdout
    assert not list(lmtrain.folder.iterdir())


# ---------------------------------------------------------------------------------------------------- estimates


@pytest.fixture(scope="module")
def base() -> ExperimentConfig:
    register()
    with initialize_config_dir(str(config_dir())):
        return parse_config(without_hydra(compose("lmtrain", ["sweep=lr"], return_hydra_config=True)))


@pytest.fixture(scope="module")
def machine() -> Machine:
    import torch

    return Machine(device=torch.device("cpu"), peak=1e11, measured=True, free_memory=1e9, threads=1)


def seconds_of(config: ExperimentConfig, machine: Machine) -> float | None:
    taken = estimate(config, machine=machine).duration
    return None if taken is None else taken.seconds


def test_time_goes_with_tokens_and_speed(base: ExperimentConfig, machine: Machine) -> None:
    seconds = seconds_of(base, machine)
    assert seconds is not None
    assert 60 < seconds < 120, "500,000 tokens of 7.1 MFLOP and ten evaluations at 50 GFLOP/s"
    faster = seconds_of(base, dataclasses.replace(machine, peak=2e11))
    assert faster == pytest.approx(seconds / 2)
    steps = dataclasses.replace(base.trainer, max_tokens=None, max_steps=10, eval_every=10, eval_every_tokens=None)
    longer = dataclasses.replace(steps, max_steps=20)
    short, long = (seconds_of(dataclasses.replace(base, trainer=trainer), machine) for trainer in (steps, longer))
    assert short is not None
    assert long == pytest.approx(2 * short)
    epochs = dataclasses.replace(base.trainer, max_tokens=None, max_epochs=1.0)
    assert seconds_of(dataclasses.replace(base, trainer=epochs), machine) is None


def test_memory_goes_with_the_microbatch(base: ExperimentConfig, machine: Machine) -> None:
    def memory_of(config: ExperimentConfig) -> float:
        return estimate(config, machine=machine).peak

    whole = memory_of(base)
    assert 0.4 * 2**30 < whole < 1.2 * 2**30
    single = dataclasses.replace(base, trainer=dataclasses.replace(base.trainer, micro_batch_size=1))
    assert memory_of(single) < whole < memory_of(dataclasses.replace(base, batch_size=64))


@pytest.mark.slow
def test_memory_is_right_to_a_factor_of_two(lmtrain: CommandLine) -> None:
    """On the default model. Time, which depends on what else the machine does, is compared by hand."""
    run = ("trainer.max_steps=3", "trainer.eval_batches=1", "trainer.sample_tokens=0", "parallel.num_threads=1")
    lmtrain(*run, "hydra.run.dir=run")
    told = lmtrain("--multirun", *run, "seed=1,2", "--dry-run", COLUMNS="300")
    result = RunDir(lmtrain.folder / "run").read_result()
    assert result is not None
    memory = re.search(r"about ([\d.]+) GiB", told.stdout)
    assert memory is not None
    assert 1 / 2 < float(memory[1]) / result["metrics"]["train/memory_gib"] < 2
