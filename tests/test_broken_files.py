"""Damaged files of every kind are read, or refused in a line: nothing else happens, whatever the damage."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from broken_files import KINDS, damaged

from lmtrain.config.schema import FilesConfig
from lmtrain.data.records import Conversation, Fragment, Pair
from lmtrain.data.sources import open_corpus
from lmtrain.errors import DataError

CASES = int(os.environ.get("BROKEN_FILES", "40"))
"""Damaged files of each kind."""


def outcome(config: FilesConfig, policy: str) -> list[object] | str:
    """The records, which must be sound, or the message of a refusal."""
    config.on_bad_record = policy  # type: ignore[assignment]
    skipped: list[str] = []
    try:
        found = list(open_corpus(config).records(on_skip=skipped.append))
    except DataError as error:
        message = str(error)
        assert len(message.splitlines()) <= 2, message
        assert len(message) < 1200, message
        return message
    for record in found:
        match record:
            case str() | Fragment(text=_):
                (record if isinstance(record, str) else record.text).encode()
            case Pair():
                assert record.source.encode()
                assert record.target.encode()
            case Conversation():
                assert any(message.role == "assistant" for message in record.messages)
                "".join(message.content for message in record.messages).encode()
            case _:
                assert isinstance(record, np.ndarray)
                assert record.dtype.kind in "iu"
                assert record.ndim == 1
                assert len(record)
                assert record.min() >= 0
    assert policy == "skip" or not skipped
    return [record.tolist() if isinstance(record, np.ndarray) else record for record in found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    content, config = KINDS[kind]
    path = tmp_path / kind
    path.write_bytes(content)
    sound = outcome(config(str(path)), "error")
    assert isinstance(sound, list)
    assert len(sound) >= (12 if "npz" in kind else 1)
    generator = random.Random(kind)
    refused = 0
    for _ in range(CASES // 4 if kind == "a.arrow" else CASES):
        path.write_bytes(damaged(content, generator))
        strict, lenient = outcome(config(str(path)), "error"), outcome(config(str(path)), "skip")
        assert outcome(config(str(path)), "skip") == lenient
        # What is read without leaving anything out is the same under both policies.
        assert isinstance(strict, str) or strict == lenient
        refused += isinstance(strict, str)
    assert refused > 0
