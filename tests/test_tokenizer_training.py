"""Training is deterministic and quiet, gives symbols and characters what was asked for, and explains refusals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import sample_text, train_bpe, train_unigram

from lmtrain.config.schema import (
    ByteConfig,
    CharConfig,
    IdsConfig,
    SentencePieceBpeConfig,
    SentencePieceUnigramConfig,
)
from lmtrain.data.tokenizer import USER, TextSample, sample_for, train_tokenizer
from lmtrain.errors import ConfigError, DataError

TRAINERS = pytest.mark.parametrize("train", [train_bpe, train_unigram])


def everything(key: int) -> bool:
    return True


# ------------------------------------------------------------------------------------------- sample


def sampled_at_once(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """What a sample keeps, written as plainly as possible."""
    lines = [line for text in documents for line in text.split("\n") if line]
    stride = 1
    while sum(len(line.encode()) for line in lines[::stride]) > sample_bytes and len(lines[::stride]) > 1:
        stride *= 2
    return lines[::stride]


LINES = st.lists(st.sampled_from(["a", "bc", "é", ""]), max_size=40)


@given(st.lists(LINES.map("\n".join), max_size=10), st.integers(1, 100))
def test_a_sample_in_one_pass(documents: list[str], sample_bytes: int) -> None:
    sample = TextSample(sample_bytes, characters=True)
    for number, text in enumerate(documents):
        sample.add(text, number)
    assert sample.lines(everything) == sampled_at_once(documents, sample_bytes)
    assert sample.characters == "".join(sorted(set("".join(documents))))


def test_the_sample_is_bounded_and_spread_evenly() -> None:
    sample = TextSample(10_000, characters=False)
    for number in range(10_000):
        sample.add(f"{number:05d}\n\n{number:05d}", number)
    lines = sample.lines(everything)
    assert 5_000 <= sum(map(len, lines)) <= 10_000
    numbers = [int(line) for line in lines]
    gaps = np.diff(numbers)
    assert numbers[0] == 0
    assert gaps.min() == gaps.max() == numbers[1]
    assert numbers[-1] + gaps[0] >= 10_000
    assert sample.characters == ""
    assert [int(line) for line in sample.lines(lambda key: key >= 5_000)] == [n for n in numbers if n >= 5_000]


def test_long_lines_are_cut() -> None:
    sample = TextSample(10_000, characters=False)
    sample.add("a" * 2_500 + "\nb", 0)
    assert list(map(len, sample.lines(everything))) == [1_000, 1_000, 500, 1]


def test_what_is_no_text_is_not_sampled() -> None:
    with pytest.raises(DataError, match="udc80"):
        TextSample(None, characters=True).add("a\udc80", 0)


def test_what_each_tokenizer_is_made_from() -> None:
    bpe = sample_for(SentencePieceBpeConfig(vocab_size=300))
    char = sample_for(CharConfig())
    letters = sample_for(SentencePieceUnigramConfig(vocab_size=300, byte_fallback=False))
    assert bpe is not None
    assert char is not None
    assert letters is not None
    for sample in (bpe, char, letters):
        sample.add("ba", 0)
    assert [(sample.lines(everything), sample.characters) for sample in (bpe, char, letters)] == [
        (["ba"], ""),
        ([], "ab"),
        (["ba"], "ab"),
    ]
    assert sample_for(ByteConfig()) is sample_for(IdsConfig(vocab_size=10)) is None


# ----------------------------------------------------------------------------------------- training


@TRAINERS
def test_training_is_deterministic(train) -> None:  # type: ignore[no-untyped-def]
    assert train(sample_text()).fingerprint == train(sample_text()).fingerprint
    assert train(sample_text() + "another zebra " * 50).fingerprint != train(sample_text()).fingerprint


@TRAINERS
def test_training_prints_nothing(train, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    train(sample_text())
    with pytest.raises(DataError):
        train("abc", vocab_size=300)
    assert capfd.readouterr() == ("", "")


@TRAINERS
def test_it_uses_what_it_learnt(train) -> None:  # type: ignore[no-untyped-def]
    assert len(train(sample_text()).encode(sample_text())) < 0.6 * len(sample_text())


def test_the_kind_is_told_by_the_file() -> None:
    assert train_bpe(sample_text()).name == "sentencepiece_bpe"
    assert train_unigram(sample_text()).name == "sentencepiece_unigram"


def test_long_lines_are_learnt_from() -> None:
    assert len(train_bpe(sample_text().replace("\n", " ")).encode("quick brown wizards")) < 12


def test_decoding_half_a_character() -> None:
    tokenizer = train_bpe(sample_text())
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("▁")[:2])


@TRAINERS
def test_user_symbols_are_always_one_token(train) -> None:  # type: ignore[no-untyped-def]
    symbols = ["fox", "<b>", 'a, "b"', "jumps over", "\n\n", "\n", "x y", "é"]
    tokenizer = train(sample_text(), vocab_size=325, user_symbols=[*symbols, "<b>"], special=[USER])
    for symbol in symbols:
        ids = tokenizer.encode(f"1{symbol}1")
        assert len(ids) == 3, symbol
        assert tokenizer.decode(ids) == f"1{symbol}1"


@pytest.mark.parametrize("symbol", ["<unk>", "</s>", "<0x41>", USER, "a▁b", "a\0"])
def test_a_symbol_that_cannot_be_one(symbol: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.user_symbols must not hold") as refused:
        SentencePieceBpeConfig(vocab_size=300, user_symbols=["a", symbol])
    assert "got" not in str(refused.value)


@TRAINERS
def test_text_without_a_piece_is_refused_unless_bytes_spell_it(train) -> None:  # type: ignore[no-untyped-def]
    tokenizer = train(sample_text(), vocab_size=60, byte_fallback=False)
    for text, code in [("a fox é", "00E9"), ("日本 the", "65E5"), ("a▁b", "2581"), ("a\0b", "0000"), ("\t", "0009")]:
        with pytest.raises(DataError, match=rf"U\+{code}\) has no piece .*byte_fallback=true"):
            tokenizer.encode_batch(["the quick", text])
    assert tokenizer.decode(tokenizer.encode("the lazy fox\n  jumps")) == "the lazy fox\n  jumps"


@TRAINERS
def test_full_coverage_gives_every_character_a_piece(train) -> None:  # type: ignore[no-untyped-def]
    rare = "é\t日\r\r\n,\"'"
    tokenizer = train(
        sample_text() + rare, vocab_size=60, byte_fallback=False, character_coverage=1, sample_bytes=1_000
    )
    assert tokenizer.decode(tokenizer.encode("the fox" + rare)) == "the fox" + rare


# ------------------------------------------------------------------------------------------- errors


@TRAINERS
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_vocabulary_the_text_does_not_allow(train, byte_fallback: bool) -> None:  # type: ignore[no-untyped-def]
    def refusal(size: int) -> str:
        with pytest.raises(DataError, match=rf"vocab_size={size} is larger .*use tokenizer\.vocab_size=") as refused:
            train(sample_text(), vocab_size=size, byte_fallback=byte_fallback)
        return str(refused.value)

    largest = int(refusal(5_000).rsplit("=", 1)[1])
    assert train(sample_text(), vocab_size=largest, byte_fallback=byte_fallback).vocab_size == largest
    refusal(largest + 1)


def test_a_text_too_small_for_any_vocabulary() -> None:
    with pytest.raises(DataError, match="use tokenizer=byte"):
        train_bpe("abc", vocab_size=300)


@TRAINERS
def test_a_vocabulary_too_small_for_the_characters(train) -> None:  # type: ignore[no-untyped-def]
    text = "".join(chr(0x4E00 + i % 100) + " " for i in range(1_000))
    with pytest.raises(DataError, match=r"too small .*use tokenizer\.vocab_size=(\d+) or more") as refused:
        train(text, vocab_size=300, character_coverage=1.0)
    smallest = int(str(refused.value).split("vocab_size=")[2].split()[0])
    assert train(text, vocab_size=smallest, character_coverage=1.0).vocab_size == smallest


@pytest.mark.parametrize("text", ["", "\n\n\n"])
def test_nothing_to_train_on(text: str) -> None:
    for config in (SentencePieceBpeConfig(vocab_size=300), SentencePieceUnigramConfig(vocab_size=300)):
        sample = sample_for(config)
        assert sample is not None
        sample.add(text, 0)
        with pytest.raises(DataError, match="no text to train a tokenizer on"):
            train_tokenizer(config, sample.lines(everything), "", [])
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(CharConfig(), [], "", [])
