"""Tokens on disk: the same by one process, by several, and by one that was killed and gone on with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmtrain.data import build
from lmtrain.data.build import TOKENIZER_FILE, SplitFiles, remove_marks, write_tokens
from lmtrain.data.documents import Documents
from lmtrain.data.prepared import SPLITS
from lmtrain.data.records import Pair
from lmtrain.data.survey import Stretch
from lmtrain.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
WORDS = [f"document {number} " * random.Random(number).randint(0, 9) + "end" for number in range(500)]


class Killed(BaseException):
    """Stands for a signal that nothing can catch."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH_CHARS", 200)
    monkeypatch.setattr(build, "BATCHES_PER_MARK", 3)


def some_stretches(*, pairs: bool, die_after: int | None = None) -> Iterator[Stretch]:
    for number, word in enumerate(WORDS):
        if number == die_after:
            raise Killed
        record = Pair(word, word[::-1]) if pairs else word
        yield Stretch(SPLITS[number % 7 % 2], record, closes=True, ends=True)


def write(
    folder: Path, *, pairs: bool = False, alone: bool = True, die_after: int | None = None
) -> dict[str, Documents]:
    folder.mkdir(exist_ok=True)
    TOKENIZER.save(folder / TOKENIZER_FILE)
    num_bytes = write_tokens(
        folder,
        "",
        ("train", "val"),
        some_stretches(pairs=pairs, die_after=die_after),
        prompts=pairs,
        alone=alone,
        report=lambda chars: None,
    )
    return {
        split: SplitFiles(folder, "", split, prompts=pairs).load(TOKENIZER.vocab_size, size).documents
        for split, size in num_bytes.items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_are_where_they_belong(tmp_path: Path) -> None:
    written = write(tmp_path)
    for place, split in enumerate(("train", "val")):
        documents = written[split]
        expected = [word for number, word in enumerate(WORDS) if number % 7 % 2 == place]
        assert [TOKENIZER.decode(documents[number].ids.tolist()) for number in range(len(documents))] == expected
        assert int(documents.ends[-1]) == len(documents.tokens)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, pairs: bool) -> None:
    write(tmp_path / "whole", pairs=pairs)
    for die_after in (3, 100, 250, 499):
        with pytest.raises(Killed):
            write(tmp_path / "killed", pairs=pairs, die_after=die_after)
        marks = list((tmp_path / "killed").glob(".*mark"))
        assert len(marks) == (die_after > 3), "what is whole is remembered"
    write(tmp_path / "killed", pairs=pairs)
    write(tmp_path / "killed", pairs=pairs)  # nothing is left to do
    for folder in ("killed", "whole"):
        remove_marks(tmp_path / folder)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        write(tmp_path, die_after=400)
    encoded: list[int] = []
    encode = build._encode

    def count(tokenizer: str, prompts: bool, batch: list[Stretch]) -> object:
        encoded.append(len(batch))
        return encode(tokenizer, prompts, batch)

    monkeypatch.setattr(build, "_encode", count)
    write(tmp_path)
    assert 100 <= sum(encoded) <= 130


@pytest.mark.multiprocess
def test_several_processes_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "available_cores", lambda: 2)
    write(tmp_path / "alone")
    write(tmp_path / "together", alone=False)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_prompts_and_targets_are_kept(tmp_path: Path) -> None:
    documents = write(tmp_path, pairs=True)["train"]
    assert documents.counted is not None
    assert documents.prompts is not None
    for number in (0, 5, len(documents) - 1):
        piece = documents[number]
        counted = documents.counted[piece.start : piece.start + len(piece.ids)]
        prompt = int(documents.prompts[number])
        assert not counted[:prompt].any()
        assert counted[prompt:].all()
        assert piece.ids[prompt - 1] == TOKENIZER.end_id
    assert np.count_nonzero(documents.counted) == documents.num_targets
