"""`lmtrain data inspect --step`: every kind of batch as it is trained on, its documents and its targets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY

from lmtrain.commands import data as data_command
from lmtrain.config.compose import compose_config
from lmtrain.data.batches import IGNORED
from lmtrain.data.documents import Documents
from lmtrain.data.prepared import PreparedData, PreparedSource, PreparedSplit
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.feeding import train_batches

QUESTIONS = [(f"What is {number} and {number}?\n", f"It is {2 * number}.") for number in range(40)]
STORIES = [f"Story {number}: " + "once " * (number % 5) for number in range(30)]


def documents(texts: list[tuple[str, str]]) -> Documents:
    """What is read, what is answered, and the end of the document."""
    tokenizer = ByteTokenizer()
    pieces = [[tokenizer.encode(text) for text in pair] for pair in texts]
    ids = [np.concatenate([read, answer, [tokenizer.end_id]]) for read, answer in pieces]
    counted = [np.arange(len(one)) >= len(read) for one, (read, _) in zip(ids, pieces, strict=True)]
    return Documents(
        np.concatenate(ids),
        np.cumsum([len(one) for one in ids]),
        np.concatenate(counted),
        np.array([len(read) for read, _ in pieces]),
    )


def source(name: str, of: Documents, weight: float = 1.0) -> PreparedSource:
    split = PreparedSplit(documents=of, num_bytes=1)
    return PreparedSource(
        name=name,
        weight=weight,
        splits={"train": split, "val": split},
        left_out={},
        duplicates=0,
        deduplicated=False,
        content=name,
        fingerprint=name,
        folder=Path(),
        built=False,
    )


STORIES_DOCUMENTS = documents([("", story) for story in STORIES])
PLAIN = Documents(STORIES_DOCUMENTS.tokens, STORIES_DOCUMENTS.ends)
QUIZ = source("quiz", documents(QUESTIONS))
MIXED = PreparedData(sources=(QUIZ, source("stories", PLAIN, weight=3.0)), tokenizer=ByteTokenizer())
ALONE = PreparedData(sources=(QUIZ,), tokenizer=ByteTokenizer())


def show(
    data: PreparedData, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(data_command, "prepare", lambda *arguments, **options: data)
    data_command.main(["inspect", "--full", "--step", "3", *TINY, "data.path=none", *words])
    return capsys.readouterr().out


KINDS = {
    "packed": ["data.seq_len=32"],
    "packed_documents": ["data.seq_len=32", "data.batches=packed_documents"],
    "padded": ["data.seq_len=32", "data.batches=padded"],
}


@pytest.mark.parametrize("data", [ALONE, MIXED])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_shown_are_those_trained_on(
    data: PreparedData, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = show(data, KINDS[kind], monkeypatch, capsys)
    batch = train_batches(compose_config([*TINY, "data.path=none", *KINDS[kind]]), data)[2]
    rows = re.split(r"^row \d+: ", out, flags=re.MULTILINE)[1:]
    assert len(rows) == len(batch.inputs)
    for row, inputs, targets in zip(rows, batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        heading, *lines = row.splitlines()
        marked = [match.groups() for line in lines if (match := re.match(r"^ +\d* ([|>]) (.*)$", line))]
        decode = ByteTokenizer().decode
        length = max((place + 1 for place, target in enumerate(targets) if target != IGNORED), default=0)
        text = decode([*inputs[:length], targets[length - 1]])
        if kind == "padded":
            assert "".join(part for _, part in marked) == text.replace("\n", "")
        answers = decode([target for target in targets if target != IGNORED])
        shown = "".join(part for mark, part in marked if mark == ">")
        assert shown.endswith(answers.replace("\n", "")), "the first token of a row may count, and is an input only"
        assert len(shown) <= len(answers.replace("\n", "")) + 1
        assert heading.startswith(("quiz, ", "stories, ")) == (data is MIXED)


def test_a_padded_step_by_eye(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "of 40 training documents, cut to data.seq_len=25: 35" in show(
        ALONE, ["data.batches=padded", "data.seq_len=25"], monkeypatch, capsys
    )
    out = show(ALONE, KINDS["padded"], monkeypatch, capsys)
    assert "quiz: 40 training documents, 1," in out
    assert re.search(r"^step 3 of [\d,]+: 4 rows of \d+ tokens, epoch 1$", out, re.MULTILINE)
    assert "have no target" not in out, "there is nothing to tell"
    assert "Text after > is what the model learns to say" in out
    assert re.search(r"^row \d: document (\d+), tokens [\d,]+ to [\d,]+, \d+ of them different$", out, re.MULTILINE)
    assert re.search(r"^   ?\d+ \| What is (\d+) and \1\?\n +\| \n +> It is \d+\.$", out, re.MULTILINE)
