"""What is shown of a study while it runs: on a terminal, in a log, and when its storage is away."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import pty
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
from optuna.trial import FrozenTrial
from rich.console import Console
from studies import begun, end, plan_in

from lmtrain.sweep import tables, view
from lmtrain.sweep.reading import ReadStudy, StudyReader, read_study, reader_of
from lmtrain.sweep.tables import results_table, running_table, seconds_left, standing, summary, trial_line
from lmtrain.sweep.terminal import output
from lmtrain.sweep.view import StudyView


def printed(renderable: object, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


# ------------------------------------------------------------------------------------------- in words


def test_each_kind_of_end_has_its_words(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "completed", 5.0, 3.25)
    end(study, "pruned", 4.5, 3.91)
    end(study, "out_of_memory", reason="one sequence does not fit")
    end(study, "failed", reason="KeyError: 'x'")
    end(study, "early_stopped", 3.5)
    end(study, "diverged", 1.0)
    read = read_study(tmp_path)
    heads = [re.sub(r" \(lr .*", "", trial_line(read, trial)) for trial in read.ended]
    assert heads == [
        "trial 0 completed at 20k tokens, val/loss 3.2500",
        "trial 1 pruned at 20k tokens, val/loss 3.9100",
        "trial 2 out of memory: one sequence does not fit",
        "trial 3 failed: KeyError: 'x'",
        "trial 4 early stopped at 10k tokens, val/loss 3.5000",
        "trial 5 diverged at 10k tokens, val/loss 1.0000",
    ]
    kinds = "2 completed, 1 pruned, 1 infeasible, 1 diverged, 1 failed"
    # What diverged is never the best, however low its last finite value.
    assert summary(read) == f"6 of 10 done: {kinds} · best 3.2500 (trial 0) · {tables.NOBODY}"


def test_parameters_are_short_and_never_taken_for_markup(tmp_path: Path) -> None:
    study = begun(tmp_path, starting_points=[{"optimizer.lr": 0.00312345, "tokenizer": "[red]"}])
    end(study, "completed", 3.0)
    read = read_study(tmp_path)
    assert trial_line(read, read.trials[0]).endswith("(lr 0.003123, tokenizer [red])")
    heading, row = [line.split() for line in lines_of(printed(results_table(read, width=100), 100))[1::2]]
    assert heading == ["trial", "status", "lr", "tokenizer", "val/loss", "tokens", "seconds"]
    assert row[:5] == ["0", "completed", "0.003123", "[red]", "3.0000"]
    assert "parameters" in printed(results_table(read, width=60), 60), "one column where several do not fit"


def test_results_are_sorted_by_kind_and_objective(tmp_path: Path) -> None:
    study = begun(tmp_path)
    for status, score in [("pruned", 1.0), ("completed", 3.0), ("failed", 0.5), ("completed", 2.0), ("pruned", 0.9)]:
        end(study, status, score)
    rows = lines_of(printed(results_table(read_study(tmp_path), width=120), 120))[3:]
    assert [int(row.split()[0]) for row in rows] == [3, 1, 4, 0, 2]


def test_several_objectives_show_their_front(tmp_path: Path) -> None:
    study = begun(tmp_path, directions=("minimize", "maximize"), objectives=("val/loss", "speed"))
    for scores in [(3.0, 1.0), (2.0, 5.0), (1.0, 4.0), (2.0, 4.5)]:
        end(study, "completed", *scores)
    read = read_study(tmp_path)
    assert [trial.number for trial in read.pareto] == [2, 1]
    rows = lines_of(printed(results_table(read, width=120), 120))
    assert [row.split()[:2] for row in rows[3:7]] == [["2", "*"], ["1", "*"], ["3", "completed"], ["0", "completed"]]


# ------------------------------------------------------------------------------------------- time left


def aged(trial: FrozenTrial, seconds: float) -> FrozenTrial:
    """The trial as if a worker had been at it for so long."""
    if trial.state.is_finished():
        return _with(trial, attempts=[{"worker": 0, "host": "here", "begun": 0.0, "ended": seconds}])
    return _with(trial, lease=trial.user_attrs["lease"] | {"begun": time.time() - seconds})


def _with(trial: FrozenTrial, **attributes: object) -> FrozenTrial:
    trial.user_attrs = trial.user_attrs | attributes
    return trial


def test_time_left_follows_from_what_trials_took(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "completed", 3.0)
    end(study, "pruned", 3.0)
    running = [study.claim(worker) for worker in range(2)]
    running[0].report(3.0, 25_000)  # type: ignore[union-attr]  # a quarter of its budget
    read = read_study(tmp_path)
    ages = (100.0, 20.0, 30.0, 10.0)
    read = dataclasses.replace(
        read, trials=(*(aged(t, s) for t, s in zip(read.trials[:4], ages, strict=True)), *read.trials[4:])
    )
    # Trials take 60 s on average. 6 wait; one runs 90 s more at its pace, one that has not reported 50 s.
    assert seconds_left(read, workers=2) == pytest.approx((6 * 60 + 90 + 50) / 2, abs=1)
    assert seconds_left(read, workers=50) == pytest.approx(90, abs=1), "no shorter than the longest that runs"
    assert standing(read) == "best 3.0000 (trial 0) · 2 of 10, about 4 min left"
    assert standing(read, workers=1) == "best 3.0000 (trial 0) · 2 of 10, about 8 min left"


def test_time_left_is_not_made_up(tmp_path: Path) -> None:
    study = begun(tmp_path)
    read = read_study(tmp_path)
    assert summary(read) == f"0 of 10 done · {tables.NOBODY}"
    assert summary(read, workers=2) == "0 of 10 done · workers are starting"
    study.claim()
    assert summary(read_study(tmp_path)) == "0 of 10 done"


@pytest.mark.parametrize(
    ("seconds", "words"), [(2, "10 s"), (44, "40 s"), (100, "2 min"), (3600, "60 min"), (9000, "2 h 30 min")]
)
def test_times_are_rounded(seconds: float, words: str) -> None:
    assert tables._rounded(seconds) == words


# ------------------------------------------------------------------------------------------- running


def test_progress_is_read_from_the_run_between_evaluations(tmp_path: Path) -> None:
    study = begun(tmp_path)
    trial = study.claim(3)
    assert trial is not None
    trial.report(4.0, 10_000)
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000/metrics.jsonl").write_text('{"step": 1, "tokens": 5}\n{"step": 9, "tokens": 52000}\n{"step": 1')
    read = read_study(tmp_path)
    row = lines_of(printed(running_table(read, width=80), 80))[3].split()
    assert (row[0], row[1], *row[-2:]) == ("0", "3", "52k", "4.0000")


def test_a_low_terminal_keeps_the_summary_in_sight(tmp_path: Path) -> None:
    study = begun(tmp_path)
    for worker in range(5):
        study.claim(worker)
    text = lines_of(printed(running_table(read_study(tmp_path), width=80, max_rows=2), 80))
    assert text[-1].strip() == "… and 3 more"
    assert len(text) == 3 + 2 + 1


# ------------------------------------------------------------------------------------------- the view


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(view, "MAX_SHARE", 1.0)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_log_hears_once_of_each_trial_that_ends(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    study = begun(tmp_path, num_trials=3)
    end(study, "completed", 3.0)
    with StudyView(lambda: reader_of(study.plan), min_workers=1):
        time.sleep(0.1)
        end(study, "pruned", 4.0)
        time.sleep(0.1)
        end(study, "completed", 2.0)  # and no time to notice
    captured = capsys.readouterr()
    before, pruned, last = captured.err.splitlines()
    assert before.startswith("1 of 3 done: 1 completed · best 3.0000 (trial 0) · about")
    assert re.fullmatch(r"trial 1 pruned at 10k .* · best 3\.0000 \(trial 0\) · 2 of 3, about 10 s left", pruned)
    assert re.fullmatch(r"trial 2 completed at .* · best 2\.0000 \(trial 2\) · 3 of 3", last)
    out = lines_of(captured.out)
    assert out[0] == "made: 3 trials by val/loss"
    assert out[-2:] == ["3 of 3 done: 2 completed, 1 pruned · best 2.0000 (trial 2)", f"sweep folder {tmp_path}"]


def test_a_storage_that_is_away_is_told_once(
    tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begun(tmp_path, num_trials=2)
    reads = 0
    read = StudyReader.read

    def unreliable(self: StudyReader) -> ReadStudy:
        nonlocal reads
        reads += 1
        if 2 <= reads <= 5:
            raise ConnectionError("the server is away\nfor now")
        return read(self)

    monkeypatch.setattr(StudyReader, "read", unreliable)
    with StudyView(lambda: reader_of(study.plan)):
        wait_for(lambda: reads > 8)
        end(study, "completed", 2.0)
    assert [record.getMessage() for record in caplog.records] == [
        "the study cannot be shown for now, it goes on: the server is away"
    ]


def test_a_view_that_cannot_open_its_study_does_not_stop_it(
    tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with StudyView(lambda: reader_of(plan_in(tmp_path))):
        time.sleep(0.1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert list(tmp_path.iterdir()) == [], "to look creates nothing"


class Terminal:
    """A terminal of 100 columns as standard output and error, and what was written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._master, slave = pty.openpty()
        self._text = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.stream = os.fdopen(slave, "w", buffering=1)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(f"sys.{name}", self.stream)
        for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}.items():
            monkeypatch.setenv(name, value)

    def _read(self) -> None:
        try:
            while block := os.read(self._master, 4096):
                self._text += block
        except OSError:
            pass

    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._text.decode(errors="replace")).replace("\r", "\n")

    def close(self) -> None:
        self.stream.close()
        self._reader.join(5)
        os.close(self._master)


def test_a_terminal_shows_what_runs_and_messages_above_it(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begun(tmp_path, num_trials=3)
    terminal = Terminal(monkeypatch)  # not a fixture: pytest sets standard output and error after those
    early: logging.StreamHandler[TextIO] = logging.StreamHandler(terminal.stream)
    root, log = logging.getLogger(), logging.getLogger("somebody")
    root.addHandler(early)
    late = early
    try:
        with StudyView(lambda: reader_of(study.plan), min_workers=1):
            first = study.claim()
            wait_for(lambda: "progress" in terminal.text())
            log.warning("a message of 1 line")
            late = logging.StreamHandler()  # as a launcher makes them: of what standard error is now
            root.addHandler(late)
            root.removeHandler(early)
            log.warning("a later message")
            end(study, "failed", trial=first, reason="OSError: no")
            end(study, "completed", 2.0)
            wait_for(lambda: "trial 0 failed: OSError: no (lr" in terminal.text())
            assert late.stream is not terminal.stream
        assert late.stream is terminal.stream, "handlers are given back their stream"
        log.warning("a message after it")
    finally:
        root.removeHandler(early)
        root.removeHandler(late)
    wait_for(lambda: "a message after it" in terminal.text())
    monkeypatch.undo()
    terminal.close()
    lines = [line.rstrip() for line in terminal.text().splitlines()]
    assert {"a message of 1 line", "a later message", "a message after it"} <= set(lines), "each a line of its own"
    assert not any(line.startswith("trial 1 completed") for line in lines), "the table tells"
    assert "made: 2 trials by val/loss" in lines


def test_what_is_no_terminal_gets_wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a notebook, which asks for colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert output().width == 120
