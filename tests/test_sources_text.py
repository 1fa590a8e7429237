"""Large text files: the same documents as when the file is read at once, in pieces that fit into memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from itertools import groupby
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.config.schema import TextConfig
from lmtrain.data.records import Fragment
from lmtrain.data.sources import blocks, open_corpus, text
from lmtrain.errors import DataError

PIECES = [
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    " ",
    "\t \n",
    "a",
    "é",
    "日本",
    "𝄞",
    "word ",
    "a longer line of words",
    "\u2028",
    "\x1c",
    "x" * 70,
]


def texts(path: Path, document: str, **more: object) -> list[str]:
    """The documents, put together again."""
    config = TextConfig(seq_len=8, path=str(path), document=document, **more)  # type: ignore[arg-type]
    found: list[str] = []
    whole = True
    for record in open_corpus(config).records():
        if isinstance(record, Fragment):
            assert record.first is whole
            whole = record.last
            assert len(record.text) <= text.BLOCK_BYTES
            found[len(found) - (not record.first) :] = [("" if record.first else found[-1]) + record.text]
        else:
            assert whole
            assert isinstance(record, str)
            assert record
            found.append(record)
    assert whole
    return found


def reference(content: str, document: str) -> list[str]:
    """The documents of a text that is held whole."""
    if document == "file":
        return [content] if content else []
    lines = content.split("\n")
    ends = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
    if document == "line":
        return [line.removesuffix("\r") for line in lines if line.strip()]
    together = ["".join(group) for blank, group in groupby(ends, key=lambda line: not line.strip()) if not blank]
    return [paragraph.removesuffix("\n").removesuffix("\r") for paragraph in together]


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
@settings(max_examples=150)
@given(parts=st.lists(st.sampled_from(PIECES), max_size=60), block=st.integers(8, 200))
def test_documents_do_not_depend_on_the_blocks(
    document: str, parts: list[str], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = "".join(parts)
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block)
        patch.setattr(text, "BLOCK_BYTES", block)
        # A line of blanks that is larger than a block is not seen to be blank.
        found = [one for one in texts(path, document) if one.strip() or document == "file"]
    assert found == reference(content, document)


def test_a_large_file_comes_in_fragments_cut_after_lines(tmp_path: Path) -> None:
    generator = random.Random(0)
    lines = ["".join(generator.choices("abc é日 ", k=generator.randrange(100))) + "\n" for _ in range(120_000)]
    path = tmp_path / "a.txt"
    path.write_text("".join(lines))
    found = list(open_corpus(TextConfig(seq_len=8, path=str(path))).records())
    assert len(found) > 2
    assert all(isinstance(one, Fragment) and one.text.endswith("\n") for one in found)
    assert texts(path, "file") == ["".join(lines)]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
        (".GZ", lambda content: gzip.compress(content[:3000]) + gzip.compress(content[3000:])),
        (".zst", lambda content: zstandard.compress(content[:3000]) + zstandard.compress(content[3000:])),
    ],
)
def test_compressed_files_are_read_and_cut_off_ones_refused(tmp_path: Path, suffix: str, compress: object) -> None:
    content = "".join(f"line {number} with some words\n" for number in range(2_000))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(content.encode()))  # type: ignore[operator]
    assert texts(path, "file") == [content]
    assert len(texts(tmp_path, "line")) == 2_000
    path.write_bytes(path.read_bytes()[:-20])
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match=r"a\.txt\.\w+ is damaged or cut off: "):
            texts(path, "line", on_bad_record=policy)


def test_what_cannot_be_decoded_is_left_out_under_skip(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\nZ\xfcrich\nits\n\nN\0\n\nmore")
    (tmp_path / "b.txt").write_bytes(b"fine")
    left_out: list[str] = []

    def read(document: str) -> list[object]:
        left_out.clear()
        config = TextConfig(seq_len=8, path=str(tmp_path), document=document, on_bad_record="skip")  # type: ignore[arg-type]
        return list(open_corpus(config).records(on_skip=left_out.append))

    assert read("line") == ["good", "its", "more", "fine"]
    assert len(left_out) == 2
    assert read("paragraph") == ["good", "more", "fine"]
    assert len(left_out) == 2
    assert read("file") == ["fine"]
    assert len(left_out) == 1


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_a_fragment_that_cannot_be_decoded_is_refused(
    tmp_path: Path, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others of its document have been handed out, so it cannot be left out any more."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(text, "BLOCK_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(b"x" * 200 + b"\xfc" + b"x" * 50)
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xfc at offset 200, line 1"):
        texts(tmp_path / "a.txt", document, on_bad_record="skip")
