"""Encoding word by word gives what SentencePiece gives for whole texts, whatever is remembered."""

from __future__ import annotations

import random
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import WORDS, foreign_sentencepiece, repetitive_unigram, train_bpe

from lmtrain.data.tokenizer import SentencePieceTokenizer, sentencepiece_model, words
from lmtrain.data.tokenizer.words import WordEncoder

CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜。，"
CYRILLIC = "Съешь же ещё этих мягких французских булок, да выпей чаю"


@cache
def real_text() -> str:
    """Python source and its licence: indentation, numbers, punctuation, prose."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("argparse.py", "this.py", "decimal.py", "keyword.py")
    )


@cache
def other_scripts() -> str:
    generator = random.Random(1)
    chinese = "".join(generator.choice(CHINESE) for _ in range(5_000))
    cyrillic = " ".join(generator.choice(CYRILLIC.split()) for _ in range(1_000))
    return f"{chinese}\n{cyrillic}\n{chinese[::-1]} {cyrillic}"


@cache
def model(name: str) -> SentencePieceTokenizer:
    text = real_text() + other_scripts()
    made = {
        "trained": lambda: train_bpe(text, vocab_size=1_500),
        "symbols": lambda: train_bpe(text, vocab_size=1_500, user_symbols=["    ", "self.", "e t", "\n\n", "\n    "]),
        "no bytes": lambda: train_bpe(text, vocab_size=1_500, byte_fallback=False, character_coverage=1),
        "dummy prefix": lambda: SentencePieceTokenizer(foreign_sentencepiece()),
        "across spaces": lambda: SentencePieceTokenizer(
            foreign_sentencepiece(split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False)
        ),
        "squeezing": lambda: SentencePieceTokenizer(foreign_sentencepiece(remove_extra_whitespaces=True)),
        "normalizing": lambda: SentencePieceTokenizer(foreign_sentencepiece(normalization_rule_name="nfkc")),
        "spaces behind": lambda: SentencePieceTokenizer(foreign_sentencepiece(treat_whitespace_as_suffix=True)),
        "unigram": lambda: SentencePieceTokenizer(foreign_sentencepiece(model_type="unigram")),
        "large": lambda: train_bpe(text, vocab_size=8_000),
    }[name]()
    assert isinstance(made, SentencePieceTokenizer)
    return made


BY_WORDS = ["trained", "symbols", "no bytes", "dummy prefix", "across spaces", "large"]
AS_A_WHOLE = ["squeezing", "normalizing", "spaces behind"]
MODELS = pytest.mark.parametrize("name", BY_WORDS + AS_A_WHOLE)


def by_sentencepiece(tokenizer: SentencePieceTokenizer, texts: list[str]) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.serialize())
    return [processor.encode(text) for text in texts]


def by_words(tokenizer: SentencePieceTokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(texts)]


@MODELS
def test_real_text(name: str) -> None:
    texts = [real_text(), *real_text().splitlines(keepends=True)[:500]]
    for _ in range(2):  # new, and remembered
        assert by_words(model(name), texts) == by_sentencepiece(model(name), texts)


@pytest.mark.parametrize("name", ["trained", "large", "dummy prefix"])
def test_scripts_without_spaces(name: str) -> None:
    texts = [other_scripts(), CHINESE, CYRILLIC]
    assert by_words(model(name), texts) == by_sentencepiece(model(name), texts)


@pytest.mark.parametrize("name", [*BY_WORDS, *AS_A_WHOLE, "unigram"])
def test_which_models_can_be_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(sentencepiece_model, "WordEncoder", lambda *args: made.append(args) or WordEncoder(*args))
    SentencePieceTokenizer(model(name).serialize()).encode("a b")
    assert len(made) == (name not in AS_A_WHOLE)


PARTS = st.sampled_from(
    [
        *WORDS,
        *CYRILLIC.split(),
        *CHINESE,
        " ",
        "  ",
        "    ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "self.",
        "e t",
        "0",
        "12",
        "_",
        "\0",
        "e\u0301",
        "👩",
    ]
)


@MODELS
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_text(name: str, data: st.DataObject) -> None:
    known = (
        PARTS if name != "no bytes" else st.sampled_from([*CYRILLIC.split(), *CHINESE, *real_text()[:300], " ", "  "])
    )
    texts = data.draw(st.lists(st.lists(known, max_size=12).map("".join), max_size=6))
    if name != "no bytes":
        texts += data.draw(st.lists(st.text(max_size=30).map(lambda text: text.replace("▁", "")), max_size=2))
    assert by_words(model(name), texts) == by_sentencepiece(model(name), texts)


# ----------------------------------------------------------------------------------------- unigram


def likelihood(tokenizer: SentencePieceTokenizer, ids: list[int]) -> float:
    return sum(float(tokenizer.proto.pieces[token].score) for token in ids)


@settings(deadline=None, max_examples=60)
@given(st.lists(PARTS | st.text(max_size=10), max_size=20).map("".join).map(lambda text: text.replace("▁", "")))
def test_unigram_words_are_as_likely(text: str) -> None:
    tokenizer = model("unigram")
    [ids], [expected] = by_words(tokenizer, [text]), by_sentencepiece(tokenizer, [text])
    assert likelihood(tokenizer, ids) == pytest.approx(likelihood(tokenizer, expected), abs=1e-4)
    assert tokenizer.decode(ids) == text


def test_the_text_before_a_word_does_not_change_how_it_is_split() -> None:
    """The sums of SentencePiece are rounded, so that of equal ones another is the larger behind other text."""
    tokenizer = SentencePieceTokenizer(repetitive_unigram())
    word = f"xooooooooo hahahaha{' ' * 30}y"
    alone = tokenizer.encode(word).tolist()
    for length in range(0, 40_000, 1_500):
        text = ("the quick fox, " * 3_000)[:length] + "\n"
        assert tokenizer.encode(text + word).tolist()[-len(alone) :] == alone


# ------------------------------------------------------------------------------------------ memory


@pytest.fixture
def tiny_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little that words lose their slots and are forgotten all the time."""
    for name, value in {"_SLOTS": 16, "_MAX_WORDS": 50, "_MAX_IDS": 100, "_CHUNK": 40, "_WINDOW": 7}.items():
        monkeypatch.setattr(words, name, value)


@pytest.mark.usefixtures("tiny_memory")
def test_a_full_memory_changes_nothing() -> None:
    tokenizer = SentencePieceTokenizer(model("trained").serialize())
    lines = [*real_text()[:20_000].splitlines(keepends=True), other_scripts(), "", "a" * 300]
    assert by_words(tokenizer, lines) == by_sentencepiece(tokenizer, lines)
    assert by_words(tokenizer, lines[::-1]) == by_sentencepiece(tokenizer, lines[::-1])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 1_000)
    seen: list[bytes] = []

    def encode(texts: list[bytes]) -> list[np.ndarray]:  # type: ignore[type-arg]
        seen.extend(texts)
        return [np.frombuffer(text, np.uint8).astype(np.uint16) for text in texts]

    encoder = WordEncoder([b" a", b"ab"], encode, np.uint16)
    texts = [b" ab", b"", b"b ab", b"ab" * 5_000]
    for _ in range(2):
        assert [ids.tolist() for ids in encoder.encode_batch(texts)] == [list(text) for text in texts]
    assert len(seen) == len(set(seen)), "each word is encoded once"
    for number in range(5_000):
        encoder.encode_batch([f"{number:08x}".encode()])
    assert len(encoder._known) <= 2_000
    assert len(encoder._ids) < 100_000


def test_texts_that_are_only_nul_differ() -> None:
    encoder = WordEncoder([b"\0\0"], lambda texts: [np.array([len(text)], np.uint16) for text in texts], np.uint16)
    texts = [b"\0" * length for length in range(1, 20)]
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == [[length] for length in range(1, 20)]
