"""Damaged files of every kind are prepared, or refused without a trace: no other error, no half-written entry."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from broken_files import KINDS, damaged

from lmtrain.config.schema import (
    ByteConfig,
    FilesConfig,
    IdsConfig,
    MixtureConfig,
    RecordsConfig,
    TextConfig,
    TokensConfig,
)
from lmtrain.data.prepare import prepare
from lmtrain.data.prepared import PreparedData
from lmtrain.data.records import Conversation, Pair, Record
from lmtrain.data.sources import open_corpus
from lmtrain.data.survey import size_of, texts_of
from lmtrain.errors import DataError

FEW, MANY = 20, 400
"""Damaged files of each kind."""

SKIPPED = " (data.on_bad_record=skip)"


def prepared_or_refused(config: FilesConfig | MixtureConfig, tokens: bool) -> PreparedData | str:
    """The prepared data, or the message of a refusal; either way the cache holds whole entries only."""
    assert config.cache_dir is not None
    folder = Path(config.cache_dir) / "prepared"
    before = entries(folder)
    try:
        found = prepare(config, IdsConfig(vocab_size=50) if tokens else ByteConfig())
    except DataError as error:
        refusal = str(error)
    else:
        assert entries(folder) == before | {source.folder.name for source in found.sources}
        return found
    assert len(refusal.splitlines()) <= 2, refusal
    assert entries(folder) == before, refusal
    return refusal


def entries(folder: Path) -> set[str]:
    """What lies there beside locks: drafts too, if one was left."""
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


def documents_in(data: PreparedData) -> list[int]:
    """How many documents and tokens the source has, all splits together."""
    (source,) = data.sources
    return [
        sum(len(split.documents) for split in source.splits.values()),
        sum(len(split.documents.tokens) for split in source.splits.values()),
    ]


def expected_tokens(record: Record, end_tokens: int) -> int:
    """Of a document without a cut: bytes or ids, and what stands between and after them."""
    if isinstance(record, Conversation):
        return sum(len(text.encode()) + 2 for text in texts_of(record)) + end_tokens
    if isinstance(record, Pair):
        return sum(len(text.encode()) for text in texts_of(record)) + 1 + end_tokens
    texts = texts_of(record)
    return (sum(len(text.encode()) for text in texts) if texts else size_of(record)) + end_tokens


def check(config: FilesConfig, *, tokens: bool) -> bool:
    """Prepare one damaged file under both policies; whether it was refused as it is."""
    strict = prepared_or_refused(config, tokens)
    config = replace(config, on_bad_record="skip")
    lenient = prepared_or_refused(config, tokens)
    if isinstance(lenient, str):
        assert isinstance(strict, str), "what is sound is sound when records may be skipped"
        return True
    skipped: list[str] = []
    records = list(open_corpus(config).records(on_skip=skipped.append))
    (source,) = lenient.sources
    counted = {reason.removesuffix(SKIPPED): n for reason, n in source.left_out.items() if reason.endswith(SKIPPED)}
    assert counted == Counter(skipped)
    assert isinstance(strict, str) == bool(skipped)
    num_documents, num_tokens = documents_in(lenient)
    assert num_documents >= len(records)
    assert num_tokens == sum(expected_tokens(record, end_tokens=1) for record in records)
    if not isinstance(strict, str):
        assert documents_in(strict) == [num_documents, num_tokens]
    return isinstance(strict, str)


def fuzz(folder: Path, kind: str, cases: int) -> int:
    """Prepare so many damaged files, each with two policies; returns how many were refused."""
    content, config_of = KINDS[kind]
    path = folder / kind
    generator = random.Random(f"prepare {kind}")
    refused = 0
    for number in range(cases):
        path.write_bytes(damaged(content, generator))
        config = replace(config_of(str(path)), cache_dir=str(folder / f"cache{number // 10}"))
        if number % 4 == 3:  # as one of two sources, which share an entry
            (folder / "sound.txt").write_text("a sound text\n" * 20)
            sound = TextConfig(seq_len=8, path=str(folder / "sound.txt"))
            tokens = isinstance(config, TokensConfig)
            sources = {"broken": config, "sound": replace(config, path=str(folder / "sound.bin")) if tokens else sound}
            (folder / "sound.bin").write_bytes(bytes([3, 0, 0, 0] * 60))
            mixture = MixtureConfig(seq_len=8, cache_dir=config.cache_dir, sources=dict(reversed(sources.items())))
            refused += isinstance(prepared_or_refused(mixture, tokens), str)
        else:
            refused += check(config, tokens=isinstance(config, TokensConfig))
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_prepared_or_leaves_nothing(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fuzz(tmp_path, kind, FEW) > 0
    assert capfd.readouterr() == ("", ""), "no library says more of it than we do"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_damaged_files(tmp_path: Path, kind: str) -> None:
    assert fuzz(tmp_path, kind, MANY) > MANY / 20


def test_a_damaged_byte_in_a_field_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "bad", "note": "\xfc"}\n{"text": "fine"}\n')
    config = RecordsConfig(seq_len=8, path=str(path), cache_dir=str(tmp_path / "cache"))
    refusal = prepared_or_refused(config, tokens=False)
    assert isinstance(refusal, str)
    assert "line 2" in refusal
    found = prepared_or_refused(replace(config, on_bad_record="skip"), tokens=False)
    assert isinstance(found, PreparedData)
    assert found.sources[0].left_out[f"not UTF-8{SKIPPED}"] == 1
