"""Prepared data: the split loses and leaks nothing, the cache is built once and never half."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmtrain.config.schema import (
    ByteConfig,
    CharConfig,
    PythonStdlibConfig,
    SentencePieceBpeConfig,
    TextConfig,
    TokenizerConfig,
)
from lmtrain.data import prepare as prepare_module
from lmtrain.data.cache import cache_folder
from lmtrain.data.prepare import PreparedData, prepare
from lmtrain.data.split import split_documents
from lmtrain.errors import DataError


def some_lines(num_lines: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()  # noqa: SIM905
    return [f"{number} " + " ".join(generator.choices(words, k=6)) for number in range(num_lines)]


@pytest.fixture
def config(tmp_path: Path) -> TextConfig:
    """A corpus of 100 different one-line documents."""
    (tmp_path / "text.txt").write_text("\n".join(some_lines(100)))
    return TextConfig(seq_len=8, path=str(tmp_path / "text.txt"), document="line", cache_dir=str(tmp_path / "cache"))


def documents_in(prepared: PreparedData, tokens: np.ndarray) -> list[str]:
    """Decode what lies between end tokens; the last piece is empty if the array ends with one."""
    ends = np.flatnonzero(tokens == prepared.tokenizer.end_id)
    return [
        prepared.tokenizer.decode(piece[piece != prepared.tokenizer.end_id]) for piece in np.split(tokens, ends + 1)
    ]


def entries(config: TextConfig) -> list[str]:
    assert config.cache_dir is not None
    return sorted(path.name for path in (Path(config.cache_dir) / "prepared").iterdir() if path.is_dir())


# ----------------------------------------------------------------------------------------- split


@pytest.mark.parametrize(
    "tokenizer",
    [ByteConfig(), CharConfig(), SentencePieceBpeConfig(vocab_size=300)],
    ids=lambda t: type(t).__name__,
)
def test_nothing_is_lost_and_nothing_leaks(config: TextConfig, tokenizer: TokenizerConfig) -> None:
    prepared = prepare(config, tokenizer)
    train, val = documents_in(prepared, prepared.train), documents_in(prepared, prepared.val)
    assert train.pop() == val.pop() == ""  # both end with an end token
    assert sorted(train + val) == sorted(some_lines(100))
    assert not set(train) & set(val)
    assert (len(train), len(val)) == (prepared.train_documents, prepared.val_documents) == (90, 10)
    assert prepared.train_bytes == sum(len(text.encode()) for text in train)
    assert prepared.val_bytes == sum(len(text.encode()) for text in val)
    assert (prepared.duplicates, prepared.dropped) == (0, 0)
    assert prepared.val_bytes_per_token == prepared.val_bytes / len(prepared.val)
    assert prepared.train.dtype == prepared.val.dtype == np.uint16


def test_duplicates_stay_on_one_side(config: TextConfig) -> None:
    Path(config.path).write_text("\n".join(some_lines(50) + some_lines(50) + some_lines(10)))
    prepared = prepare(replace(config, val_fraction=0.3), ByteConfig())
    train, val = documents_in(prepared, prepared.train)[:-1], documents_in(prepared, prepared.val)[:-1]
    assert Counter(train + val) == Counter(some_lines(50) + some_lines(50) + some_lines(10))
    assert not set(train) & set(val)
    assert len(set(val)) == 15
    assert prepared.duplicates == 60


def test_the_document_split_does_not_depend_on_the_order() -> None:
    lines = some_lines(100)
    split = split_documents(lines, "document", 0.2)
    shuffled = split_documents(random.Random(1).sample(lines, 100), "document", 0.2)
    assert split.train_chars == shuffled.train_chars
    held_out = {line for line in lines if split.parts(line)[1]}
    assert len(held_out) == 20
    assert all(split.parts(line) == ("", line) for line in held_out)
    larger = split_documents([*lines, "one more"], "document", 0.2)
    moved = held_out ^ {line for line in lines if larger.parts(line)[1]}
    assert len(moved) <= 1


def test_auto_splits_by_document_from_twenty_different_ones() -> None:
    few, enough = some_lines(19), some_lines(20)
    assert split_documents(few * 2, "auto", 0.1) == split_documents(few * 2, "tail", 0.1)
    assert split_documents(enough, "auto", 0.1) == split_documents(enough, "document", 0.1)


def test_the_tail_of_one_document_is_its_last_characters(config: TextConfig) -> None:
    text = "".join(some_lines(300)) + "äöü€" * 25
    Path(config.path).write_text(text)
    prepared = prepare(replace(config, document="file"), CharConfig())
    cut = int(len(text) * 0.9)
    assert prepared.tokenizer.decode(prepared.train) == text[:cut]
    assert prepared.tokenizer.decode(prepared.val) == text[cut:]
    assert prepared.train[-1] != prepared.tokenizer.end_id  # the document goes on in the validation text
    assert prepared.val[-1] == prepared.tokenizer.end_id
    assert prepared.val_bytes == len(text[cut:].encode())
    assert (prepared.train_documents, prepared.val_documents) == (1, 1)


def test_the_tail_of_several_documents_keeps_their_order(tmp_path: Path, config: TextConfig) -> None:
    texts = ["a" * 50, "b" * 30, "c" * 20, "d" * 100]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.in").write_text(text)
    several = replace(config, path=str(tmp_path / "*.in"), document="file", val_fraction=0.55)
    prepared = prepare(several, ByteConfig())
    assert documents_in(prepared, prepared.train) == ["a" * 50, "b" * 30, "c" * 10]
    assert documents_in(prepared, prepared.val) == ["c" * 10, "d" * 100, ""]


def test_the_tail_leaks_no_copy_of_a_document() -> None:
    one, other = "abcdefghij", "klmnopqrst"
    split = split_documents([one, other, other, one], "tail", 0.25)
    assert split.parts(one) == (one, "")
    assert split.parts(other) == (other[:5], other[5:])
    assert split.duplicates == 2


def test_neither_side_is_ever_empty() -> None:
    for fraction in (0.001, 0.999):
        assert split_documents(["ab"], "tail", fraction).parts("ab") == ("a", "b")
        sides = [split_documents(["a", "b"], "document", fraction).parts(text) for text in "ab"]
        assert sorted(sides) == [("", "a"), ("b", "")] or sorted(sides) == [("", "b"), ("a", "")]
    with pytest.raises(DataError, match=r"use data\.split=tail"):
        split_documents(["same", "same"], "document", 0.1)
    with pytest.raises(DataError, match="too little"):
        split_documents(["x"], "tail", 0.1)


def test_short_documents_are_counted_as_dropped(config: TextConfig) -> None:
    Path(config.path).write_text("\n".join([*some_lines(30), "x", "", "yy"]))
    prepared = prepare(replace(config, min_chars=3, max_documents=40), ByteConfig())
    assert prepared.dropped == 2
    assert prepared.train_documents + prepared.val_documents == 30


def test_the_bpe_tokenizer_sees_training_text_only(config: TextConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {}

    def spy(tokenizer: TokenizerConfig, documents: object) -> object:
        seen[type(tokenizer).__name__] = list(documents)  # type: ignore[call-overload]
        return train(tokenizer, seen[type(tokenizer).__name__])

    train = prepare_module.train_tokenizer
    monkeypatch.setattr(prepare_module, "train_tokenizer", spy)
    prepared = prepare(config, SentencePieceBpeConfig(vocab_size=300))
    assert seen["SentencePieceBpeConfig"] == documents_in(prepared, prepared.train)[:-1]
    prepare(config, CharConfig())
    assert seen["CharConfig"] == some_lines(100)


def test_a_large_vocabulary_is_stored_in_32_bits(config: TextConfig) -> None:
    Path(config.path).write_text("".join(chr(0x20000 + number) for number in range(66_000)), encoding="utf-8")
    prepared = prepare(replace(config, document="file"), CharConfig())
    assert prepared.train.dtype == np.uint32
    assert prepared.train.max() > 1 << 15
    assert len(prepared.train) + len(prepared.val) == 66_001


# ----------------------------------------------------------------------------------------- cache


def test_the_second_call_finds_the_first_ones_data(config: TextConfig) -> None:
    messages: list[str] = []
    first = prepare(config, ByteConfig(), messages.append)
    assert first.built
    assert messages[0].startswith("reading ")
    assert messages[-1] == "tokenising: 100%"
    messages.clear()
    second = prepare(config, ByteConfig(), messages.append)
    assert not second.built
    assert not messages
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train, first.train)
    assert np.array_equal(second.val, first.val)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    counts = ("train_bytes", "val_bytes", "train_documents", "val_documents", "duplicates", "dropped")
    assert all(getattr(first, name) == getattr(second, name) for name in counts)


def test_a_key_follows_what_changes_the_tokens(
    tmp_path: Path, config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints = [
        prepare(other, tokenizer).fingerprint
        for other, tokenizer in [
            (config, ByteConfig()),
            (config, CharConfig()),
            (replace(config, val_fraction=0.2), ByteConfig()),
            (replace(config, split="tail"), ByteConfig()),
            (replace(config, min_chars=2), ByteConfig()),
            (replace(config, max_documents=50), ByteConfig()),
            (replace(config, document="paragraph"), ByteConfig()),
        ]
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert prepare(replace(config, seq_len=99), ByteConfig()).fingerprint == fingerprints[0]
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(config.path).read_bytes())
    assert not prepare(replace(config, path=str(copy)), ByteConfig()).built
    copy.write_text(copy.read_text() + "\nmore")
    assert prepare(replace(config, path=str(copy)), ByteConfig()).built
    monkeypatch.setattr(prepare_module, "PREPARE_VERSION", -1)
    assert prepare(config, ByteConfig()).built


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "named"))
    assert cache_folder(PythonStdlibConfig(seq_len=8)) == tmp_path / "named"
    assert cache_folder(PythonStdlibConfig(seq_len=8, cache_dir="~/mine")) == Path.home() / "mine"
    monkeypatch.delenv("LMTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "lmtrain" in cache_folder(PythonStdlibConfig(seq_len=8)).parts


def test_a_damaged_entry_is_built_again(config: TextConfig, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare(config, CharConfig())
    expected = first.train.copy()
    for name in ("train.bin", "val.bin", "tokenizer.model", "manifest.json"):
        path = first.folder / name
        path.write_bytes(path.read_bytes()[:-4])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = prepare(config, CharConfig())
        assert again.built
        assert "damaged" in caplog.text
        assert np.array_equal(again.train, expected)
        (first.folder / name).unlink()
        assert prepare(config, CharConfig()).built
    assert not prepare(config, CharConfig()).built


@pytest.mark.parametrize("tokenizer", [SentencePieceBpeConfig(vocab_size=60_000), ByteConfig()])
def test_a_failed_build_leaves_nothing(config: TextConfig, tokenizer: TokenizerConfig) -> None:
    def fail(message: str) -> None:
        if message.startswith("tokenising"):
            raise DataError("larger")

    with pytest.raises(DataError, match="larger"):
        prepare(config, tokenizer, fail)
    assert entries(config) == []


def test_an_unwritable_cache(tmp_path: Path, config: TextConfig) -> None:
    with pytest.raises(DataError, match=r"cannot write prepared data to .*data\.cache_dir"):
        prepare(replace(config, cache_dir=str(tmp_path / "text.txt" / "below")), ByteConfig())


def test_text_that_changes_meanwhile_is_noticed(config: TextConfig) -> None:
    def change(message: str) -> None:
        if message.startswith("training"):
            Path(config.path).write_text("\n".join(some_lines(90, seed=1)))

    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare(config, ByteConfig(), change)
    assert entries(config) == []


def test_a_warm_start_on_the_standard_library_is_fast(tmp_path: Path) -> None:
    config = PythonStdlibConfig(seq_len=8, max_documents=30, cache_dir=str(tmp_path))
    prepare(config, ByteConfig())
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert not prepare(config, ByteConfig()).built
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


# ------------------------------------------------------------------------------- several processes

SCRIPT = textwrap.dedent("""
    import os, signal, sys
    from lmtrain.config.schema import SentencePieceBpeConfig, TextConfig
    from lmtrain.data.prepare import prepare

    path, cache, dies = sys.argv[1:]

    def on_progress(message):
        if dies == "dies" and message.startswith("tokenising"):
            os.kill(os.getpid(), signal.SIGKILL)

    data = TextConfig(seq_len=8, path=path, document="line", cache_dir=cache)
    prepared = prepare(data, SentencePieceBpeConfig(vocab_size=300), on_progress)
    print(prepared.built, prepared.fingerprint, len(prepared.train), int(prepared.train.sum()))
""")


def start(config: TextConfig, dies: str = "lives") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, config.path, str(config.cache_dir), dies]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.multiprocess
def test_eight_processes_build_once(config: TextConfig) -> None:
    Path(config.path).write_text("\n".join(some_lines(20_000)))
    processes = [start(config) for _ in range(8)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert Counter(built for built, *_ in answers) == {"True": 1, "False": 7}
    assert len({tuple(rest) for _, *rest in answers}) == 1
    assert len(entries(config)) == 1


@pytest.mark.multiprocess
def test_a_killed_build_is_cleared_away_by_the_next(config: TextConfig) -> None:
    process = start(config, "dies")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (draft,) = entries(config)
    assert draft.endswith(".draft")
    prepared = prepare(config, SentencePieceBpeConfig(vocab_size=300))
    assert prepared.built
    assert entries(config) == [prepared.fingerprint]
    assert len(list(prepared.folder.iterdir())) == 4
