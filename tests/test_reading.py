"""A run as its folder records it: ended, going on, dead, or damaged."""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path

import pytest
from recorded_runs import record_run, records_of

from lmtrain.errors import RunFolderError, UsageError
from lmtrain.reading import DIED, RUNNING, read_run
from lmtrain.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return record_run(tmp_path / "run", [3.0, 2.0], "lr=3e-3", "model=tiny")


def test_a_run_is_read_as_it_was_written(run: Path) -> None:
    read = read_run(run)
    assert read.status == "completed"
    assert read.result is not None
    assert read.result["objective"] == 2.0
    assert read.config["lr"] == 3e-3
    assert read.config["model"]["d_model"] == read.settings["model.d_model"]
    assert read.settings["model"] == "decoder"
    assert read.records == records_of([3.0, 2.0])


def test_metrics_are_a_table_of_records(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "tokens": 1920, "time": 1e9, "attempt": 1, "train/loss": null, "extra/new": 7}\n')
    table = read_run(str(run)).metrics
    assert list(table.columns)[:4] == ["step", "tokens", "time", "attempt"]
    assert table["step"].tolist() == [10, 20, 30]
    assert table["attempt"].tolist() == [0, 0, 1]
    assert table["val/loss"].isna().tolist() == [False, False, True], "a record without it"
    assert table["train/loss"].isna().tolist() == [False, False, True], "null stands for NaN"
    assert table["extra/new"].isna().tolist() == [True, True, False]


def test_a_run_without_records_is_an_empty_table(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert read_run(run).metrics.shape == (0, 4)


def test_a_run_without_a_result_goes_on_while_its_folder_is_locked(run: Path) -> None:
    (run / "result.json").unlink()
    assert read_run(run).status == DIED
    owner = RunDir(run)
    owner.lock()
    assert read_run(run).status == RUNNING
    owner.unlock()
    assert read_run(run).status == DIED


def test_asking_whether_a_folder_is_in_use_leaves_no_trace(run: Path) -> None:
    RunDir(run).in_use()
    assert not (run / ".lock").exists()


def test_a_folder_of_somebody_else_can_be_asked(run: Path) -> None:
    """Only root may open any file for writing, so that its mode is looked at here, not tried."""
    owner = RunDir(run)
    owner.lock()
    before = (run / ".lock").stat()
    (run / ".lock").chmod(stat.S_IRUSR)
    assert RunDir(run).in_use()
    owner.unlock()
    assert not RunDir(run).in_use()
    assert (run / ".lock").stat().st_mtime_ns == before.st_mtime_ns


def test_a_run_that_starts_while_somebody_asks_is_not_refused(run: Path) -> None:
    RunDir(run).lock_file.touch()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            RunDir(run).in_use()
            time.sleep(0.001)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(50):
            starting = RunDir(run)
            starting.lock()
            starting.unlock()
    finally:
        over.set()
        for asker in askers:
            asker.join()


def test_a_torn_last_line_is_left_out_with_a_notice(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "tok')
    assert read_run(run).records == records_of([3.0, 2.0])
    assert f"{run}/metrics.jsonl ends in the middle of a line" in caplog.text


def test_a_damaged_line_is_named(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + "{nonsense}\n" + lines[1])
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2 is not a metrics record"):
        _ = read_run(run).records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", b'{"status": "comp', "result.json cannot be read: Unterminated string"),
        ("result.json", b"\xff\xfe\x00", "result.json cannot be read"),
        ("result.json", b"[]", "result.json is damaged: it does not say how the run ended"),
        ("config.yaml", b"lr: [", "config.yaml cannot be read"),
        ("config.yaml", b"\xff", "config.yaml cannot be read"),
        ("config.yaml", b"- lr", "config.yaml is damaged: it holds no settings"),
    ],
)
def test_a_damaged_file_is_told_in_a_line(run: Path, name: str, content: bytes, message: str) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as told:
        read_run(run)
    assert len(str(told.value).splitlines()) == 1


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"there is no folder .*missing"):
        read_run(tmp_path / "missing")
    with pytest.raises(RunFolderError, match="file is a file"):
        read_run(tmp_path / "file")
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no config\.yaml"):
        read_run(tmp_path)


def test_an_older_config_lacks_what_it_did_not_know(run: Path) -> None:
    (run / "config.yaml").write_text("lr: 0.001\nmodel:\n  d_model: 8\n")
    assert read_run(run).settings == {"lr": 0.001, "model.d_model": 8}
