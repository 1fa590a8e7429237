"""TensorBoard and Weights & Biases by real commands: what they hold, what is said, what is refused, what is left."""

from __future__ import annotations

import importlib.util
import os
import signal
import stat
import time
from pathlib import Path

import psutil
import pytest
from command_line import TINY, CommandLine
from mlflow_server import free_port
from tracker_kinds import KINDS, Kind, wandb_records

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ConfigError
from lmtrain.tracking.metrics_file import read_metrics
from lmtrain.tracking.tracker import build_tracker

BOTH = ("tracking=[tensorboard,wandb]", "tracking.wandb_mode=offline", "tracking.system_metrics_every=null")
KEY = "0123456789abcdef0123456789abcdef01234567"
KIND = Kind({}, KINDS["tensorboard"].readers + KINDS["wandb"].readers)


@pytest.fixture(scope="module")
def words(corpus: Path) -> list[str]:
    tiny = [word for word in TINY if word != "tracking=none"]
    return [f"data.path={corpus}", *tiny, "trainer.eval_every=10", "trainer.log_every=1", "trainer.checkpoint_every=10"]


def assert_mirrored(folder: Path) -> None:
    """Both hold what the metrics file holds, but for the times of records that share a step."""
    records = read_metrics(folder / "metrics.jsonl")
    for held, wanted in zip(KIND.held(folder, ""), KIND.expected(records), strict=True):
        values = {(key, step): value for key, step, _, value in held.points}
        assert values == {(key, step): value for key, step, _, value in wanted}
        assert len(values) == len(held.points)
        assert held.succeeded


def test_a_run_mirrored_twice_says_nothing_of_it_and_can_be_resumed(lmtrain: CommandLine, words: list[str]) -> None:
    said = lmtrain(*words, *BOTH, "trainer.max_steps=20", "hydra.run.dir=run", HOME=str(lmtrain.folder))
    folder = lmtrain.folder / "run"
    assert said.stdout + said.stderr
    for word in ("wandb", "Weights", "tensorboard", "W&B"):
        assert word not in said.stdout + said.stderr
        assert word not in (folder / "lmtrain.log").read_text()
    assert_mirrored(folder)
    lmtrain("resume=run", "trainer.max_steps=30", HOME=str(lmtrain.folder))
    assert max(record["step"] for record in read_metrics(folder / "metrics.jsonl")) == 30
    assert_mirrored(folder)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")])
def test_all_runs_of_a_sweep_arrive(lmtrain: CommandLine, words: list[str], launcher: tuple[str, ...]) -> None:
    """One after the other in one process, or two at a time."""
    points = ("lr=1e-4,1e-3,1e-2", "sweep.name=rates", "trainer.max_steps=20")
    said = lmtrain("--multirun", *words, *BOTH, *points, *launcher, HOME=str(lmtrain.folder))
    assert "wandb" not in said.stdout + said.stderr
    ids = set()
    for number in range(3):
        folder = lmtrain.folder / f"multirun/rates/{number:04d}"
        assert_mirrored(folder)
        (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
        (run,) = [record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run"]
        assert (run.project, run.run_group, run.display_name) == ("lmtrain", "rates", f"rates/{number:04d}")
        ids.add(run.run_id)
    assert len(ids) == 3


@pytest.mark.multiprocess
def test_a_run_killed_leaves_no_process(lmtrain: CommandLine, words: list[str]) -> None:
    run = lmtrain.start(*words, *BOTH, "trainer.max_steps=100000", "hydra.run.dir=run", HOME=str(lmtrain.folder))
    try:
        deadline, children = time.monotonic() + 60, []
        while [child.name() for child in children] != ["wandb-core"]:
            assert time.monotonic() < deadline, children
            time.sleep(0.1)
            children = psutil.Process(run.pid).children()
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
    assert psutil.wait_procs(children, timeout=20) == (children, [])


@pytest.mark.parametrize("mode", [(), ("tracking.wandb_mode=online",)])
def test_online_without_a_key_is_refused(lmtrain: CommandLine, words: list[str], mode: tuple[str, ...]) -> None:
    """Before anything is written, and without a question or a look at the network."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    run = (*words, "tracking=wandb", *mode, "trainer.max_steps=5", "hydra.run.dir=run")
    said = lmtrain(*run, status=2, HOME=str(lmtrain.folder), WANDB_BASE_URL=nowhere)
    assert said.stderr.count("\n") == 1
    for remedy in ("wandb login", "WANDB_API_KEY", "tracking.wandb_mode=offline"):
        assert remedy in said.stderr
    assert not (lmtrain.folder / "run").exists()


def test_a_key_in_netrc_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".netrc"
    file.write_text(f"machine elsewhere.org login user password {KEY}\n")
    file.chmod(stat.S_IRUSR)
    with pytest.raises(ConfigError, match=r"a key for api\.wandb\.ai"):
        build_tracker(TrackingConfig(wandb=True))
    file.unlink()
    file.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    build_tracker(TrackingConfig(wandb=True))


def test_a_server_of_ones_own_is_found_where_wandb_login_notes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = tmp_path / ".config/wandb/settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    with pytest.raises(ConfigError, match=r"a key for wandb\.example\.org"):
        build_tracker(TrackingConfig(wandb=True))


def test_a_server_that_is_away_costs_one_warning_and_the_run_is_kept(lmtrain: CommandLine, words: list[str]) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    run = (*words, "tracking=wandb", "trainer.max_steps=20", "hydra.run.dir=run")
    said = lmtrain(*run, HOME=str(lmtrain.folder), WANDB_BASE_URL=nowhere, WANDB_API_KEY=KEY)
    warnings = [line for line in (said.stdout + said.stderr).splitlines() if "Weights & Biases" in line]
    assert len(warnings) == 1
    assert "cannot be reached" in warnings[0]
    assert "wandb sync run/wandb/*" in warnings[0]
    (held,) = KINDS["wandb"].held(lmtrain.folder / "run", "")
    assert {step for _, step, _, _ in held.points} == set(range(1, 21))


def test_the_mode_of_the_environment_counts_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    build_tracker(TrackingConfig(wandb=True))
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="WANDB_MODE is 'ofline'; it must be one of online"):
        build_tracker(TrackingConfig(wandb=True))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"tracking\.{name} needs .* pip install 'lmtrain\[{name}\]'"):
        build_tracker(TrackingConfig(tensorboard=name == "tensorboard", wandb=name == "wandb"))
