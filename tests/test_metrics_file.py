"""The metrics file: what is written is read back, and a crash costs at most the record being written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lmtrain.errors import RunFolderError
from lmtrain.tracking.metrics_file import MetricsFile, read_metrics, truncate_after


def write(path: Path, steps: range) -> None:
    file = MetricsFile(path)
    for step in steps:
        file.append({"step": step, "tokens": step * 8, "train/loss": 1 / (step + 1)})
    file.close()


def test_records_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    records = read_metrics(path)
    assert records == [{"step": s, "tokens": s * 8, "train/loss": 1 / (s + 1)} for s in range(3)]
    assert isinstance(records[0]["step"], int)


def test_a_record_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys; from pathlib import Path; from lmtrain.tracking.metrics_file import MetricsFile\n"
        "MetricsFile(Path(sys.argv[1])).append({'step': 7}); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert read_metrics(path) == [{"step": 7}]


def test_numbers_that_are_not_finite_survive_in_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})
    file.append({"step": np.int64(2), "a": np.float32(0.5), "b": 1e-300, "c": 0.1})
    file.close()

    first, second = read_metrics(path)
    assert math.isnan(first["a"])
    assert (first["b"], first["c"]) == (math.inf, -math.inf)
    assert second == {"step": 2, "a": 0.5, "b": 1e-300, "c": 0.1}

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)

    frame = pd.read_json(path, lines=True)
    assert math.isnan(frame["a"][0])
    assert list(frame["b"]) == [math.inf, 1e-300]
    assert list(frame["step"]) == [1, 2]


def test_every_torn_end_is_left_out_when_read_and_cut_when_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tmp_path / "whole.jsonl"
    write(whole, range(2))
    content = whole.read_bytes()
    first_line = content.index(b"\n") + 1
    path = tmp_path / "metrics.jsonl"
    for length in range(first_line + 1, len(content)):
        path.write_bytes(content[:length])
        caplog.clear()
        assert [record["step"] for record in read_metrics(path)] == [0]
        assert "last record is left out" in caplog.text
        write(path, range(5, 6))
        assert [record["step"] for record in read_metrics(path)] == [0, 5]


def test_a_damaged_line_within_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match="line 2"):
        read_metrics(path)
    with pytest.raises(RunFolderError, match="cannot read"):
        read_metrics(tmp_path / "missing.jsonl")


def test_truncate_after_keeps_the_lines_up_to_the_step_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(10))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + b'{"step": 10, "tr')
    truncate_after(path, 6)
    assert path.read_bytes() == b"".join(lines[:7])
    assert list(tmp_path.iterdir()) == [path]
    truncate_after(path, 6)
    assert path.read_bytes() == b"".join(lines[:7])
    truncate_after(tmp_path / "missing.jsonl", 6)
    assert not (tmp_path / "missing.jsonl").exists()


def test_a_full_disk_is_reported_and_leaves_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from lmtrain.tracking.metrics_file import MetricsFile\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
        "file = MetricsFile(Path(sys.argv[1]))\n"
        "file.append({'step': 1, 'a': 0.25})\n"
        "try: file.append({'step': 2, 'a': 0.123456789})\n"
        "except OSError as error: sys.exit(error.filename)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert str(path) in done.stderr
    assert read_metrics(path) == [{"step": 1, "a": 0.25}]
