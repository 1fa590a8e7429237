"""The Python API: what the commands do, asked for by a program."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, CommandLine
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import lmtrain as api
from lmtrain.config.changed import changed_values
from lmtrain.config.compose import config_dir
from lmtrain.config.schema import ExperimentConfig
from lmtrain.errors import ConfigError, LmtrainError, RunFolderError
from lmtrain.run_dir import RunDir

WORDS = ("tracking.close_timeout=9", "trainer.eval_every=2", "trainer.max_steps=4")


@pytest.fixture(scope="module")
def config(corpus: Path) -> ExperimentConfig:
    return api.compose(*TINY, f"data.path={corpus}", *WORDS)


@pytest.fixture(scope="module")
def made(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run in the folder that a command would have chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("working"))
        patch.setenv("LMTRAIN_CACHE", str(folder / "cache"))
        result = api.run_experiment(config)
        return dataclasses.replace(result, folder=result.folder.absolute())


def test_the_names_are_there_without_what_they_need() -> None:
    """A package that takes seconds to import is in the way of those who want a part of it."""
    heavy = "torch mlflow datasets optuna pandas numpy hydra"
    script = f"""
        import sys, time
        begun = time.perf_counter()
        import lmtrain
        assert time.perf_counter() - begun < 0.5
        assert not set("{heavy}".split()) & set(sys.modules)
        assert set(lmtrain.__all__) <= set(dir(lmtrain))
        from lmtrain import compose
        compose("lr=1e-3")
        assert not {{"torch", "mlflow"}} & set(sys.modules)
        for name in lmtrain.__all__:
            assert getattr(lmtrain, name).__doc__, name
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    with pytest.raises(AttributeError, match="module 'lmtrain' has no attribute 'train'"):
        _ = api.train


# ---------------------------------------------------------------------------------------------- settings


def test_words_and_lists_of_words_make_settings() -> None:
    one = api.compose("model=tiny", "lr=1e-3", "sweep.name=x")
    assert (one.lr, one.dropout) == (1e-3, 0.0)
    assert api.compose(["model=tiny", "lr=1e-3", "sweep.name=x"]) == one
    assert api.compose("model=tiny", ["lr=1e-3", "sweep.name=x"]) == one


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.d_modle=1", "there is no setting 'model.d_modle'; did you mean model.d_model?"),
        ("model=tinny", "model has no option 'tinny'; did you mean tiny?"),
        ("lr=-1", "lr must be positive, got -1.0"),
        ("lr=1,2", "lr=1,2 names several values: add --multirun for a run of each; a list is written key=[a,b]"),
        ("data=text", "data.path must be set: add data.path=VALUE"),
        ("resume=nowhere", "resume=nowhere: there is no run folder nowhere (it would hold config.yaml)"),
        ("hydra.run.dir=x", "hydra.run.dir=x is for the command line: run_experiment has its folder as run_dir"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_told_as_by_the_command_and_spoils_nothing(word: str, message: str) -> None:
    with pytest.raises(LmtrainError) as told:
        api.compose(word)
    assert str(told.value) == message
    assert api.compose("seed=3").seed == 3


def test_settings_are_composed_inside_a_hydra_application_too() -> None:
    with initialize_config_dir(str(config_dir()), job_name="theirs"):
        theirs = GlobalHydra.instance().hydra
        assert theirs is not None
        assert api.compose("seed=3").seed == 3
        with pytest.raises(ConfigError):
            api.compose("sed=3")
        assert GlobalHydra.instance().hydra is theirs


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["lr=1e-3", "tracking=none", "trainer.max_steps=7"], {"lr": 1e-3, "trainer.max_steps": 7}),
        (["model=tiny", "model.d_ff=512"], {"model": "tiny", "model.d_ff": 512}),
        (["data=text", "data.path=a", "tokenizer=byte"], {"data": "text", "tokenizer": "byte", "data.path": "a"}),
        (["optimizer=adamw", "optimizer.betas=[0.8,0.9]"], {"optimizer": "adamw", "optimizer.betas": [0.8, 0.9]}),
        (["model=seq2seq_nano", "data=multi30k"], {"model": "seq2seq_nano", "data": "multi30k"}),
    ],
)  # fmt: skip
def test_mirrors_hear_what_differs_from_the_options(words: list[str], changed: dict[str, Any]) -> None:
    assert changed_values(api.compose(words)) == changed


# -------------------------------------------------------------------------------------------------- runs


def test_a_run_is_made_where_a_command_makes_it(made: Any) -> None:
    assert (made.status, made.step) == ("completed", 4)
    assert made.folder.parent.parent.name == "outputs"
    run = api.read_run(made.folder)
    assert repr(run).endswith(f"{made.folder.name}: completed>")
    assert run.metrics["val/loss"].dropna().iloc[-1] == made.metrics["val/loss"]
    assert "folder" not in json.loads((made.folder / "result.json").read_text())


def test_a_run_has_the_params_of_the_same_run_by_the_command(made: Any, corpus: Path, lmtrain: CommandLine) -> None:
    lmtrain(*TINY, f"data.path={corpus}", *WORDS, "hydra.run.dir=run")
    by_command = json.loads((lmtrain.folder / "run/run.json").read_text())["params"]
    assert json.loads((made.folder / "run.json").read_text())["params"] == by_command


def test_runs_that_follow_within_a_second_have_folders_of_their_own(
    config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = iter(["outputs/a", "outputs/a", "outputs/b"])
    monkeypatch.setattr("lmtrain.api.default_run_dir", lambda resume: Path(next(names)))
    short = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=1, sample_tokens=0))
    assert [str(api.run_experiment(short).folder) for _ in range(2)] == ["outputs/a", "outputs/b"]


def test_a_run_goes_on_where_resume_says(made: Any, tmp_path: Path) -> None:
    more = api.compose(f"resume={made.folder}", "trainer.max_steps=6")
    result = api.run_experiment(more)
    assert (result.folder, result.step) == (made.folder, 6)
    (made.folder.parent / "study.yaml").touch()
    with pytest.raises(RunFolderError, match="is a trial of a study"):
        api.run_experiment(more)
    with pytest.raises(RunFolderError, match="already holds a run"):
        api.run_experiment(api.compose(run=made.folder), str(made.folder))


def test_messages_go_to_those_who_listen(made: Any, config: ExperimentConfig, tmp_path: Path) -> None:
    before = logging.getLogger("lmtrain").handlers[:], logging.getLogger("lmtrain").level
    with pytest.raises(RunFolderError):
        api.run_experiment(config, made.folder)
    assert (logging.getLogger("lmtrain").handlers, logging.getLogger("lmtrain").level) == before


def test_a_program_sees_messages_and_is_stopped_after_a_checkpoint(corpus: Path, lmtrain: CommandLine) -> None:
    """The same as in a notebook, whose kernel is interrupted by SIGINT."""
    script = f"""
        import logging
        from lmtrain import compose, run_experiment
        from lmtrain.errors import Interrupted
        config = compose({list(TINY)}, "data.path={corpus}", "trainer.max_steps=100000", "trainer.eval_every=20")
        try:
            run_experiment(config, "run")
        except Interrupted as stopped:
            print("stopped:", stopped)
        assert not logging.getLogger("lmtrain").handlers
    """
    with subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(script)],
        cwd=lmtrain.folder,
        env=lmtrain.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        told = [program.stdout.readline()]
        while "val loss" not in told[-1]:
            assert told[-1], (told, program.stderr.read())
            told.append(program.stdout.readline())
        program.send_signal(signal.SIGINT)
        told += program.stdout.read().splitlines()
        complaints = program.stderr.read()
    assert program.returncode == 0, complaints
    assert complaints == ""
    assert {"data", "model", "folder", "step"} <= {line.split()[0] for line in told if line.strip()}
    step = json.loads((lmtrain.folder / "run/result.json").read_text())["step"]
    assert told[-1] == f"stopped: stopped by SIGINT at step {step}; go on with resume=run"
    assert (RunDir(lmtrain.folder / "run").checkpoints / f"step_{step:08d}").is_dir()
