"""Files of every kind, their settings, and accidents that happen to files."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

from lmtrain.config.schema import ChatConfig, FilesConfig, PairsConfig, RecordsConfig, TextConfig, TokensConfig

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
