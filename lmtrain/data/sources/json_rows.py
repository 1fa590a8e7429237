"""Rows of JSON: an object a line, or one list of objects, which is held whole.

Python's own json reads them rather than a builder of the `datasets` library: that one infers types from the content,
fails for a whole block where one record is bad, and cannot say in which line.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from lmtrain.data.sources.bad_records import BadRecord, BadRecords
from lmtrain.data.sources.blocks import blocks, is_unicode, lines_of, told, whole_lines
from lmtrain.data.sources.fields import Rows
from lmtrain.data.sources.files import in_short
from lmtrain.errors import DataError


def json_lines(path: Path, bad: BadRecords) -> Rows:
    scan = json.JSONDecoder().raw_decode  # half the time of json.loads for short lines
    for block in told(path, whole_lines(path), bad):
        for number, line in enumerate(lines_of(block.text), block.line):
            if block.flaw and not is_unicode(line):  # in whichever field
                yield number, BadRecord("not UTF-8", "is not UTF-8")
                continue
            try:
                row, end = scan(line)
            except (ValueError, RecursionError):
                if not line or line.isspace():
                    continue
                row, end = _json_row(line), len(line)  # blanks may stand before it
            if end != len(line) and line[end:].strip():
                row = _json_row(line)
            yield number, row if type(row) is dict else _no_object(row)


def _json_row(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _not_json(error: ValueError | RecursionError) -> BadRecord:
    where = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    what = error.msg if isinstance(error, json.JSONDecodeError) else in_short(error)
    return BadRecord("not valid JSON", f"is not valid JSON: {what}{where}")


def _no_object(row: Any) -> BadRecord:
    if isinstance(row, BadRecord):
        return row
    return BadRecord("no JSON object", f"is no object with fields, but {'null' if row is None else type(row).__name__}")


def is_one_value(path: Path) -> bool:
    """Whether a file is one list or object over many lines, rather than an object a line."""
    block = next(blocks(path), None)
    if block is None:
        return False
    lines = list(islice((line for line in lines_of(block.text) if line and not line.isspace()), 2))
    if not lines or lines[0].lstrip().startswith("["):
        return bool(lines)
    return block.ends and not any(isinstance(_json_row(line), dict) for line in lines)


def json_value(path: Path) -> Rows:
    """The objects of a list, which is held whole; or the one that the file consists of."""
    parts = []
    for block in blocks(path):
        if block.flaw:
            raise DataError(f"{path} {block.flaw}") from block.flaw
        parts.append(block.text)
    try:
        value = json.loads("".join(parts))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {in_short(error)}") from error
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, row if isinstance(row, dict) else _no_object(row)
