"""What the first reading of a corpus finds, on corpora made up here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.config.schema import DataConfig
from lmtrain.data.prepared import SplitName
from lmtrain.data.records import Conversation, Fragment, Message, Pair, Record
from lmtrain.data.survey import Survey, stretches, survey
from lmtrain.errors import DataError

LINES = [f"line {number}" for number in range(100)]
CONFIG = DataConfig(seq_len=8)


@dataclass
class MadeUp:
    """A corpus of given records."""

    given: dict[SplitName, list[Record]]
    skipped: list[str] = field(default_factory=list)
    name: str = "made up"
    num_bytes: int = 0

    @property
    def splits(self) -> tuple[SplitName, ...]:
        return tuple(self.given)

    def fingerprint(self, cache_dir: object) -> str:
        return "sum"

    def records(self, split: SplitName = "train", on_skip: Callable[[str], None] | None = None) -> Iterator[Record]:
        for reason in self.skipped if on_skip and split == "train" else ():
            on_skip(reason)  # type: ignore[misc]
        yield from self.given[split]


def texts_by_split(corpus: MadeUp, config: DataConfig) -> tuple[dict[str, list[str]], Survey]:
    """Documents of each split, their stretches put together."""
    found = survey(corpus, config, lambda message: None)
    texts: dict[str, list[str]] = {split: [] for split in found.splits}
    open_texts: dict[str, str] = {}
    for stretch in stretches(corpus, config, found):
        assert isinstance(stretch.record, str)
        open_texts[stretch.split] = open_texts.get(stretch.split, "") + stretch.record
        if stretch.closes:
            texts[stretch.split].append(open_texts.pop(stretch.split) + ("." if stretch.ends else ""))
    assert not open_texts, "every document closes"
    return texts, found


def together(texts: dict[str, list[str]]) -> list[str]:
    return [text for split in texts.values() for text in split]


def test_documents_are_divided_and_none_is_lost() -> None:
    texts, found = texts_by_split(MadeUp({"train": list(LINES)}), replace(CONFIG, val_fraction=0.1, test_fraction=0.2))
    assert [len(texts[split]) for split in ("train", "val", "test")] == [70, 10, 20]
    assert sorted(together(texts)) == sorted(line + "." for line in LINES)
    assert found.num_chars == sum(map(len, LINES))
    shuffled, _ = texts_by_split(
        MadeUp({"train": random.Random(1).sample(LINES, 100)}), replace(CONFIG, val_fraction=0.1, test_fraction=0.2)
    )
    assert {split: sorted(lines) for split, lines in shuffled.items()} == {
        split: sorted(lines) for split, lines in texts.items()
    }


def test_splits_that_the_data_have_stay() -> None:
    texts, _ = texts_by_split(MadeUp({"train": ["a", "b"], "val": ["c"]}), CONFIG)
    assert texts == {"train": ["a.", "b."], "val": ["c."]}
    texts, _ = texts_by_split(MadeUp({"train": list(LINES), "val": ["c"]}), replace(CONFIG, test_fraction=0.1))
    assert [len(texts[split]) for split in ("train", "val", "test")] == [90, 1, 10]
    texts, _ = texts_by_split(MadeUp({"train": list(LINES), "test": ["c"]}), CONFIG)
    assert [len(texts[split]) for split in ("train", "val", "test")] == [90, 10, 1]


def test_what_is_left_out_is_counted_by_its_reason() -> None:
    corpus = MadeUp({"train": [*LINES, "x", "yy"]}, skipped=["not valid JSON", "not valid JSON", "no field text"])
    texts, found = texts_by_split(corpus, replace(CONFIG, min_chars=3, max_documents=50))
    assert sum(map(len, texts.values())) == 50
    assert "x." not in together(texts)
    assert found.left_out == {
        "shorter than data.min_chars=3": 0,  # beyond data.max_documents nothing is looked at
        "not valid JSON (data.on_bad_record=skip)": 2,
        "no field text (data.on_bad_record=skip)": 1,
    }
    _, found = texts_by_split(corpus, replace(CONFIG, min_chars=3))
    assert found.left_out["shorter than data.min_chars=3"] == 2


def test_copies_stay_on_one_side_or_are_left_out() -> None:
    corpus = MadeUp({"train": [*LINES[:50], *LINES[:50], *LINES[:10]]})
    texts, found = texts_by_split(corpus, replace(CONFIG, val_fraction=0.3))
    assert len(texts["train"]) + len(texts["val"]) == 110
    assert not set(texts["train"]) & set(texts["val"])
    assert found.duplicates == 60
    texts, found = texts_by_split(corpus, replace(CONFIG, val_fraction=0.3, deduplicate=True))
    assert sorted(texts["train"] + texts["val"]) == sorted(line + "." for line in LINES[:50])
    assert found.left_out["equal to an earlier one (data.deduplicate)"] == 60


def test_a_copy_of_a_validation_document_is_not_trained_on() -> None:
    corpus = MadeUp({"train": ["a", "b", "c"], "val": ["b"], "test": ["c", "c"]})
    texts, _ = texts_by_split(corpus, replace(CONFIG, deduplicate=True))
    assert texts == {"train": ["a."], "val": ["b."], "test": ["c."]}
    with pytest.raises(DataError, match="every training document"):
        survey(MadeUp({"train": ["b"], "val": ["b"]}), replace(CONFIG, deduplicate=True), lambda message: None)


@given(st.integers(1, 60), st.integers(1, 20), st.sampled_from([0.0, 0.25]))
def test_fragments_are_one_document(length: int, size: int, test_fraction: float) -> None:
    """Cut into pieces or not: the same text in every split."""
    text = "".join(chr(ord("a") + number % 26) for number in range(length + 3))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    fragments: list[Record] = [
        Fragment(piece, first=number == 0, last=number == len(pieces) - 1) for number, piece in enumerate(pieces)
    ]
    config = replace(CONFIG, val_fraction=0.3, test_fraction=test_fraction)
    whole, found = texts_by_split(MadeUp({"train": [text]}), config)
    cut, again = texts_by_split(MadeUp({"train": fragments}), config)
    assert cut == whole
    assert again.num_chars == found.num_chars == len(text)
    several, _ = texts_by_split(MadeUp({"train": [*LINES, *fragments]}), config)
    assert text + "." in together(several), "beside others it is not cut"


def test_pairs_conversations_and_ids_are_documents_too() -> None:
    pairs: list[Record] = [Pair(str(number), "t") for number in range(6)]
    found = survey(MadeUp({"train": pairs}), CONFIG, lambda message: None)
    assert found.divisions["train"].sides.tolist() == [0, 0, 0, 0, 0, 1], "whole ones, though they are few"
    chats: list[Record] = [Conversation((Message("user", f"{n}"), Message("assistant", "yes"))) for n in range(40)]
    found = survey(MadeUp({"train": chats}), replace(CONFIG, min_chars=5), lambda message: None)
    assert sum(len(division.sides) for division in found.divisions.values()) == 30
    ids = MadeUp({"train": [np.arange(20, dtype=np.uint16)]})
    parts = list(stretches(ids, CONFIG, survey(ids, CONFIG, lambda message: None)))
    assert [part.split for part in parts] == ["train", "val"]
    assert np.array_equal(np.concatenate([part.record for part in parts]), np.arange(20))


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(DataError, match=r"made up has no document of at least 10 characters"):
        survey(MadeUp({"train": ["short"]}), replace(CONFIG, min_chars=10), lambda message: None)
    nothing = MadeUp({"train": []}, skipped=["not valid JSON"] * 3)
    with pytest.raises(DataError, match=r"left out: 3 not valid JSON \(data\.on_bad_record=skip\)"):
        survey(nothing, CONFIG, lambda message: None)
    with pytest.raises(DataError, match=r"the val split of made up has no document"):
        survey(MadeUp({"train": ["text"], "val": []}), CONFIG, lambda message: None)


def test_a_corpus_that_changed_is_noticed() -> None:
    corpus = MadeUp({"train": list(LINES)})
    found = survey(corpus, CONFIG, lambda message: None)
    for changed in (LINES[:-1], [*LINES, "more"]):
        with pytest.raises(DataError, match="changed while it was being prepared"):
            list(stretches(MadeUp({"train": list(changed)}), CONFIG, found))
