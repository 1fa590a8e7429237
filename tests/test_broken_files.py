"""Damaged files of every kind are read, or refused in a line: nothing else happens, whatever the damage."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lmtrain.config.schema import ChatConfig, FilesConfig, PairsConfig, RecordsConfig, TextConfig, TokensConfig
from lmtrain.data.records import Conversation, Fragment, Pair
from lmtrain.data.sources import open_corpus
from lmtrain.errors import DataError

CASES = int(os.environ.get("BROKEN_FILES", "40"))
"""Damaged files of each kind."""

TEXTS = [
    f"Record {number}: grüße, 日本語 and plain words, {'more of them, ' * (number % 5)}\tend" for number in range(30)
]
TEXT = "\n".join(line if number % 4 else f"\n{line}" for number, line in enumerate(TEXTS)).encode()


def json_lines() -> bytes:
    return "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()


def table(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(TEXTS)])
    return out.getvalue().encode()


def parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(30)), "text": TEXTS}), out, row_group_size=7)
    return out.getvalue()


def arrow() -> bytes:
    out = io.BytesIO()
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    return out.getvalue()


def chat() -> bytes:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in TEXTS]
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in turns).encode()


def pairs() -> bytes:
    return "".join(json.dumps({"question": text, "answers": [text[:5]]}) + "\n" for text in TEXTS).encode()


def array(save: Callable[..., None]) -> bytes:
    out = io.BytesIO()
    save(out, np.arange(600, dtype=np.int32) % 50)
    return out.getvalue()


def text(path: str) -> FilesConfig:
    return TextConfig(seq_len=8, path=path)


def lines(path: str) -> FilesConfig:
    return TextConfig(seq_len=8, path=path, document="line")


def paragraphs(path: str) -> FilesConfig:
    return TextConfig(seq_len=8, path=path, document="paragraph")


def records(path: str) -> FilesConfig:
    return RecordsConfig(seq_len=8, path=path)


def conversations(path: str) -> FilesConfig:
    return ChatConfig(seq_len=8, path=path)


def templates(path: str) -> FilesConfig:
    return PairsConfig(seq_len=8, path=path, source="{question}", target="{answers[0]}")


def aligned(path: str) -> FilesConfig:
    beside = Path(path).with_name("beside.en")
    beside.write_text("a line\n" * len(TEXTS))
    return PairsConfig(seq_len=8, path=path, source="de", target="en", target_path=str(beside))


def tokens(path: str) -> FilesConfig:
    return TokensConfig(seq_len=8, path=path, end_id=7, dtype="int32")


Config = Callable[[str], FilesConfig]
KINDS: dict[str, tuple[bytes, Config]] = {
    "a.txt": (TEXT, text),
    "lines.txt": (TEXT, lines),
    "paragraphs.txt": (TEXT, paragraphs),
    "a.py": (b"# -*- coding: latin-1 -*-\n" + TEXT.decode().encode("latin-1", "replace"), text),
    "a.txt.gz": (gzip.compress(TEXT), lines),
    "a.txt.bz2": (bz2.compress(TEXT), lines),
    "a.txt.xz": (lzma.compress(TEXT), lines),
    "a.txt.zst": (zstandard.compress(TEXT) + zstandard.compress(TEXT), lines),
    "a.jsonl": (json_lines(), records),
    "a.jsonl.zst": (zstandard.compress(json_lines()), records),
    "lines.json": (json_lines(), records),
    "list.json": (json.dumps([{"text": text} for text in TEXTS], indent=1).encode(), records),
    "a.csv": (table(","), records),
    "a.csv.gz": (gzip.compress(table(",")), records),
    "a.tsv": (table("\t"), records),
    "a.parquet": (parquet(), records),
    "a.parquet.gz": (gzip.compress(parquet()), records),
    "a.arrow": (arrow(), records),
    "chat.jsonl": (chat(), conversations),
    "pairs.jsonl": (pairs(), templates),
    "a.de": ("".join(f"{text}\n" for text in TEXTS).encode(), aligned),
    "a.npy": (array(np.save), tokens),
    "a.npz": (array(np.savez), tokens),
    "compressed.npz": (array(np.savez_compressed), tokens),
    "a.bin": ((np.arange(600, dtype=np.int32) % 50).tobytes(), tokens),
}


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The content with one to three accidents."""
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(content) + 1)
        length = generator.choice([1, 1, 1, 2, 4, 30, 300])
        match generator.randrange(7):
            case 0:
                content = content[:place]
            case 1:
                content = content[:place] + content[place + length :]
            case 2:
                content = content[:place] + generator.randbytes(length) + content[place:]
            case 3:
                content = content[:place] + generator.randbytes(length) + content[place + length :]
            case 4 if content:
                at = min(place, len(content) - 1)
                content = content[:at] + bytes([content[at] ^ (1 << generator.randrange(8))]) + content[at + 1 :]
            case 5:
                special = [
                    b"\0",
                    b'"',
                    b"\n",
                    b"\r",
                    b"{",
                    b"[" * 3000,
                    b"\xff\xfe",
                    b"\xed\xa0\x80",
                    b"\\ud800",
                    b",",
                    b"9" * 5000,
                ]
                content = content[:place] + generator.choice(special) + content[place:]
            case 6:
                content = content[:place] + content[max(0, place - length) : place] + content[place:]
    return content


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
