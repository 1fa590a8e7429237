"""What a person reads at the end of a run, and what `hydra.verbose` adds."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TINY, CommandLine

from lmtrain.console import show_end
from lmtrain.run import RunResult
from lmtrain.run_dir import RunDir


def result(**changes: object) -> RunResult:
    ended = {
        "status": "early_stopped",
        "objective": 2.9,
        "objectives": {"val/loss": 2.9},
        "last_score": 2.95,
        "best_step": 750,
        "step": 1000,
        "tokens": 2_048_000,
        "metrics": {"val/loss": 2.95, "val/perplexity": 19.1059, "val/bits_per_byte": 1.5318, "train/loss": 3.0},
        "seconds": 147.0,
    }
    return RunResult(**(ended | changes))  # type: ignore[arg-type]


def shown(caplog: pytest.LogCaptureFixture, folder: Path, ended: RunResult, objective: str = "val/loss") -> list[str]:
    with caplog.at_level(logging.INFO):
        show_end(RunDir(folder), ended, objective, 139.0)
    return caplog.messages[-1].splitlines()


def test_a_run_ends_in_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert shown(caplog, tmp_path, result()) == [
        "",  # so that the columns stay under each other in a log file, whose first line has time and name
        "early stopped              last  best",
        "  val/loss               2.9500  2.9000 at step 750",
        "  val/perplexity          19.11",
        "  val/bits_per_byte      1.5318",
        "  steps                    1000",
        "  tokens                 2.05 M",
        "  time               2 min 27 s  2 min 19 s of them training",
    ]


def test_what_was_not_measured_is_left_out_and_another_objective_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"val/loss": 2.0, "val/perplexity": 7.389, "train/loss": 2.5}
    lines = shown(caplog, tmp_path, result(metrics=ids, objective=2.4), "train/loss")
    assert [line.split()[0] for line in lines[2:6]] == ["val/loss", "val/perplexity", "train/loss", "steps"]
    assert lines[4].split() == ["train/loss", "2.5000", "2.4000", "at", "step", "750"]
    without = shown(caplog, tmp_path, result(objective=None))
    assert "at step" not in "".join(without)


# ------------------------------------------------------------------------------------------ a real run


@pytest.fixture
def words(corpus: Path) -> list[str]:
    mirrored = [word for word in TINY if word != "tracking=none"]
    return [f"data.path={corpus}", *mirrored, "trainer.max_steps=20", "trainer.eval_every=10", "hydra.run.dir=run"]


KNOWN = (
    r"data  |model  |format  |auto  |folder  |left out of |step |sample: |  \| |completed |  (val/|steps|tokens|time)"
)


@pytest.mark.slow
def test_a_terminal_shows_nothing_that_nobody_asked_for(lmtrain: CommandLine, words: list[str]) -> None:
    """With MLflow's database made on the way, whose libraries would have much to say."""
    lmtrain(*words, "trainer.max_steps=1", "hydra.run.dir=before")  # prepares the text, which is told once
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "lmtrain", *words, "tracking.uri=sqlite:///new.db"],
        cwd=lmtrain.folder,
        env=lmtrain.environment(TERM="xterm", COLUMNS="100"),
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
    ):
        os.close(follower)
        text = read_all(leader)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    printed = [line for line in lines if line and "/20 |" not in line]  # without the progress line
    assert [line for line in printed if not re.match(KNOWN, line)] == []
    assert printed[-1].startswith("  time")
    logged = (lmtrain.folder / "run/lmtrain.log").read_text()
    assert "\n  val/loss  " in logged
    assert {line.split()[2] for line in logged.splitlines() if line.startswith("20")} == {"INFO"}


def read_all(descriptor: int) -> str:
    content = b""
    try:
        while part := os.read(descriptor, 65536):
            content += part
    except OSError:  # the other side is closed
        pass
    os.close(descriptor)
    return content.decode()


@pytest.mark.slow
@pytest.mark.parametrize("verbose", ["true", "lmtrain.tracking"])
def test_verbose_shows_more_of_ours(lmtrain: CommandLine, words: list[str], verbose: str) -> None:
    lmtrain(*words, "tracking=none", f"hydra.verbose={verbose}")
    logged = (lmtrain.folder / "run/lmtrain.log").read_text().splitlines()
    speakers = {line.split()[3].rstrip(":") for line in logged if re.match(r"20\S+ \S+ DEBUG ", line)}
    assert "lmtrain.tracking.plots" in speakers
    assert all(speaker.startswith("lmtrain.") for speaker in speakers)
    assert ("lmtrain.training.checkpoint" in speakers) == (verbose == "true")
