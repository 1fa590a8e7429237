"""How many workers a multirun has: asked for, by GPUs, by threads, or by a probe that is made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, CommandLine
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from trained_runs import settings

from lmtrain.config import launch
from lmtrain.config.compose import config_dir, register
from lmtrain.config.launch import Workers, count_workers
from lmtrain.config.schema import ExperimentConfig
from lmtrain.sweep import core_division
from lmtrain.sweep.core_division import candidates, choose, divide_cores
from lmtrain.sweep.core_probe import Trainees


def multirun(*words: str) -> DictConfig:
    register()
    with initialize_config_dir(str(config_dir())):
        return compose("lmtrain", ["hydra/launcher=joblib", *words], return_hydra_config=True)


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("joblib.effective_n_jobs", lambda wanted: 4 if wanted == -1 else wanted)
    for module in (launch, core_division):
        monkeypatch.setattr(module, "available_cores", lambda: 4)


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("words", "wanted", "visible", "expected"),
    [
        ([], None, "", Workers(4, share_machine=True, undecided=True)),
        ([], 3, "", Workers(3, share_machine=True)),
        (["hydra.launcher.n_jobs=2"], None, "", Workers(2, share_machine=True)),
        (["hydra.launcher.n_jobs=-1"], None, "", Workers(4, share_machine=True)),
        (["parallel.num_threads=2"], None, "", Workers(2, share_machine=True)),
        ([], None, "0,1,2", Workers(3, share_machine=True)),
        ([], 4, "0,1,2", Workers(4, share_machine=True)),
        (["device=cpu"], None, "0,1,2", Workers(4, share_machine=True, undecided=True)),
    ],
)
def test_a_probe_decides_only_what_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch, words: list[str], wanted: int | None, visible: str, expected: Workers
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    own = [word for word in words if not word.startswith("hydra.")]
    run = settings(*(own if any("num_threads" in word for word in own) else [*own, "parallel.num_threads=null"]))
    assert count_workers(multirun(*words), wanted, run) == expected


@pytest.mark.parametrize(
    ("cores", "most", "expected"),
    [(1, 8, [1]), (2, 8, [1, 2]), (6, 6, [1, 2, 6]), (12, 5, [1, 2, 4]), (64, 64, [1, 2, 4, 8, 16]), (7, 7, [1, 7])],
)
def test_divisions_leave_no_core_idle(cores: int, most: int, expected: list[int]) -> None:
    assert candidates(cores, most) == expected


def test_more_workers_must_be_worth_it() -> None:
    assert choose([(1, 10.0), (2, 10.5)]) == 1
    assert choose([(1, 10.0), (2, 12.0), (4, 12.5)]) == 2
    assert choose([(1, 10.0), (2, 9.0), (4, 15.0)]) == 4


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 200)
    return settings("parallel.num_threads=null", f"data.path={text}")


Measure = Callable[[list[tuple[int, float]] | Exception], list[Sequence[int]]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Says what a probe finds; returns the divisions of each probe that was made."""

    def say(speeds: list[tuple[int, float]] | Exception) -> list[Sequence[int]]:
        probes: list[Sequence[int]] = []

        def measure(config: ExperimentConfig, divisions: Sequence[int], cores: int) -> Any:
            probes.append(divisions)
            if isinstance(speeds, Exception):
                raise speeds
            return speeds

        monkeypatch.setattr(core_division, "_measure", measure)
        return probes

    return say


@pytest.mark.usefixtures("four_cores")
def test_a_probe_is_made_once_for_a_model_on_a_machine(
    run: ExperimentConfig, measured: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    probes = measured([(1, 10.0), (2, 14.0), (4, 13.0)])
    assert divide_cores(run, 4, probe=False) == 4  # a dry run times nothing
    assert probes == []
    assert divide_cores(run, 4) == 2
    assert "workers 2 × 2 threads" in caplog.text
    other_seed = replace(run, seed=3, lr=0.1)
    assert [divide_cores(other_seed, 4), divide_cores(other_seed, 4, probe=False)] == [2, 2]
    assert probes == [[1, 2, 4]]
    divide_cores(replace(run, batch_size=8), 4)
    divide_cores(run, 2)  # two trials have two workers at the most
    assert probes == [[1, 2, 4], [1, 2, 4], [1, 2]]


@pytest.mark.usefixtures("four_cores")
def test_a_probe_that_fails_decides_nothing(
    run: ExperimentConfig, measured: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    probes = measured(OSError("a process that was to be timed has ended"))
    assert [divide_cores(run, 4), divide_cores(run, 4)] == [4, 4]
    assert len(probes) == 2
    assert "cannot time" in caplog.text


@pytest.mark.usefixtures("four_cores")
def test_no_more_workers_than_fit_into_memory(
    run: ExperimentConfig, measured: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = measured([(1, 1.0)])
    monkeypatch.setattr(core_division, "_room_for", lambda config: 2)
    divide_cores(run, 4)
    assert probes == [[1, 2]]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_real_processes_are_timed_and_gone_afterwards(run: ExperimentConfig) -> None:
    with Trainees(run, 2, time_limit=300) as trainees:
        alone, both = (trainees.steps_per_second(workers, 1, 0.2) for workers in (1, 2))
        processes = list(trainees._processes)
    assert alone > 0
    assert both > 0
    assert all(process.returncode is not None for process in processes)


@pytest.mark.multiprocess
def test_processes_that_cannot_train_are_no_reason_to_wait(run: ExperimentConfig) -> None:
    lost = replace(run, data=replace(run.data, path="nowhere.txt"))  # type: ignore[call-arg]
    with pytest.raises(OSError, match="has ended"), Trainees(lost, 1, time_limit=300):
        pass


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grid", "study"])
def test_a_multirun_is_divided_by_what_a_probe_found(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    tiny = [word for word in TINY if not word.startswith("parallel")]
    words = [*tiny, "data.path=text.txt", "trainer.max_steps=4", "trainer.eval_every=2", "hydra/launcher=joblib"]
    chosen = {
        "grid": ["lr=1e-3,2e-3"],
        "study": ["hydra/sweeper=study", "lr=interval(1e-3,2e-3)", "hydra.sweeper.n_trials=2"],
    }[kind]
    lmtrain = CommandLine(tmp_path)
    told = [lmtrain("--multirun", *words, *chosen, f"sweep.name={name}") for name in ("one", "two")]
    for name, out, source in zip(("one", "two"), told, ("measured in", "measured before"), strict=True):
        lines = [line for line in out.stdout.splitlines() if line.startswith("workers ")]
        if not lines:  # one core
            continue
        assert len(lines) == 1
        assert source in lines[0]
        threads = lines[0].split(" × ")[1].split()[0]
        for number in range(2):
            config = (tmp_path / "multirun" / name / f"{number:04d}" / "config.yaml").read_text()
            assert f"num_threads: {threads}\n" in config
