"""The metrics file: one JSON object a line, appended as the run goes, the one truth about what happened.

Owns the format and its repair after a crash. Does not know which metrics there are, and mirrors nothing.

Every line is strict JSON, so that any reader will do (`pandas.read_json(path, lines=True)`, jq,
JavaScript). JSON has no word for a number that is not finite: NaN is written as `null`, the infinities as
`1e999` and `-1e999`, which parsers of doubles read as infinity. A line that lacks its newline was torn by a
crash and does not count.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from lmtrain.errors import RunFolderError

METRICS_FILE = "metrics.jsonl"

CLOCKS = ("time", "attempt", "train/tokens_per_second", "train/mfu", "train/memory_gib")
"""What a repetition of a run does not measure again to the bit, besides `system/…`."""

PLACE = frozenset({"step", "time", "attempt"})
"""Where a record stands, rather than what it measured."""

_log = logging.getLogger(__name__)


class MetricsFile:
    """The open metrics file of a running run.

    Opening creates the file, or cuts off the torn last line a crash left. When `append` returns, the
    operating system has the record, so that killing the process loses none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _cut_torn_line(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, record: Mapping[str, float | int]) -> None:
        """Write one record.

        Raises:
            OSError: the line could not be written whole (disk full); what was written of it is taken back.
        """
        fields = (f"{json.dumps(key)}: {_format_number(value)}" for key, value in record.items())
        line = ("{" + ", ".join(fields) + "}\n").encode()
        if os.write(self._descriptor, line) != len(line):
            _cut_torn_line(self.path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All records of a metrics file, also of a run that is still going; `null` becomes NaN.

    A torn last line is left out with a warning.

    Raises:
        RunFolderError: the file is missing, or a line within it is not a record.
    """
    try:
        complete, torn = _split_torn_line(path.read_bytes())
    except OSError as error:
        raise RunFolderError(f"cannot read the metrics in {path}: {error.strerror}") from error
    if torn:
        _log.warning("%s ends in the middle of a line; the last record is left out", path)
    return [
        {key: math.nan if value is None else value for key, value in record.items()}
        for record, _ in _parse_lines(complete, path)
    ]


def without_clocks(record: Mapping[str, float]) -> dict[str, float]:
    """What of a record is the same, to the bit, when the run is repeated on the same machine."""
    return {name: value for name, value in record.items() if name not in CLOCKS and not name.startswith("system/")}


def truncate_after(path: Path, step: int) -> None:
    """Remove the records of later steps, so that a run resumed from `step` does not log them twice.

    The file is replaced in one move: a crash leaves the old file or the new one. A missing one stays so.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    complete, _ = _split_torn_line(content)
    kept = b"".join(line for record, line in _parse_lines(complete, path) if record["step"] <= step)
    if kept == content:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _format_number(value: float | int) -> str:
    if isinstance(value, Integral):
        return str(int(value))
    value = float(value)
    if math.isnan(value):
        return "null"
    if math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return repr(value)


def _split_torn_line(content: bytes) -> tuple[bytes, bytes]:
    """The part up to and with the last newline, and the rest."""
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    complete, torn = _split_torn_line(path.read_bytes())
    if torn:
        os.truncate(path, len(complete))


def _parse_lines(content: bytes, path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each record with its line."""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise RunFolderError(f"{path}, line {number} is not a metrics record; remove the line to go on")
        yield record, line
