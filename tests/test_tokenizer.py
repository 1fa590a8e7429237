"""Every tokenizer gives back the text it was given; training is deterministic, quiet and explains itself."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.config.schema import ByteConfig, CharConfig, SentencePieceBpeConfig, TokenizerConfig
from lmtrain.data import tokenizer as tokenizer_module
from lmtrain.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    token_dtype,
    train_tokenizer,
)
from lmtrain.errors import DataError

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards mix jolly potions near quiet hills".split()  # noqa: SIM905
)


def sample_text(num_words: int = 2_000) -> str:
    generator = random.Random(0)
    separators = [" "] * 12 + ["\n", "\n    ", ", ", "  ", "\n\n"]
    return "".join(generator.choice(WORDS) + generator.choice(separators) for _ in range(num_words))


def train_bpe(*texts: str, **overrides: object) -> Tokenizer:
    config: dict[str, object] = {"vocab_size": 340} | overrides
    return train_tokenizer(SentencePieceBpeConfig(**config), texts)  # type: ignore[arg-type]


BPE = train_bpe(sample_text())
TRICKY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n \n\t\t\n",
    "line\r\nline\rline\n",
    "▁",
    "▁▁ ▁ a▁b ▁\n▁",
    "<s></s><unk><pad><0x0A><|endoftext|>",
    "\u2047 \u2585 \ufeff \u200b \u00ad \u2028 \u0085 \u3000 \ufffd",
    "e\u0301 é \ufb01 ﬀ ① ａ",
    "日本語 👩‍👩‍👧 𝔘𝔫𝔦 العربية",
    "".join(map(chr, range(1, 256))),
    "\0",
    "0123456789 12.5e-7",
    "x" * 5_000,
]


# ------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["sentencepiece_bpe", "byte"])
def test_round_trip_of_tricky_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_id not in ids


@given(st.text(max_size=200))
@settings(deadline=None)
def test_bpe_round_trip_of_any_text(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


@given(st.text(alphabet=st.sampled_from("▁ \n\r\ta<s>0"), max_size=60))
@settings(deadline=None)
def test_bpe_round_trip_of_spaces_and_marks(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


@given(st.text(max_size=200))
def test_byte_round_trip_of_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary(max_size=200))
def test_byte_decodes_any_bytes_and_keeps_those_that_are_text(content: bytes) -> None:
    text = ByteTokenizer().decode(content)
    assert text == content.decode(errors="replace")
    if "\ufffd" not in text:
        assert bytes(ByteTokenizer().encode(text).tolist()) == content


@given(st.text(min_size=1, max_size=200))
def test_char_round_trip_of_any_text(text: str) -> None:
    tokenizer = train_tokenizer(CharConfig(), [text])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(set(text)) + 1


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer(), CharTokenizer("ab")], ids=lambda t: t.name)
def test_the_end_token_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ab"), tokenizer.end_id, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "abb"
    assert 0 <= tokenizer.end_id < tokenizer.vocab_size


def test_bpe_decodes_half_a_character() -> None:
    assert "\ufffd" in BPE.decode(BPE.encode("▁")[:2])


def test_a_batch_is_the_texts_one_by_one() -> None:
    texts = ["the fox", "", "▁", "a\nb▁", *TRICKY]
    for tokenizer in (BPE, ByteTokenizer(), CharTokenizer("".join(sorted(set("".join(texts)))))):
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]
        assert tokenizer.encode_batch([]) == []


@given(st.lists(st.text(alphabet="abc the\n▁", max_size=20), max_size=20))
@settings(deadline=None)
def test_bpe_blocks_change_no_id(lines: list[str]) -> None:
    text = "\n".join(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_BLOCK_CHARS", 7)
        assert len(list(tokenizer_module._blocks(text))) >= len(text) // 100
        in_blocks = BPE.encode(text)
    assert in_blocks.tolist() == BPE.encode(text).tolist()


def test_bpe_uses_what_it_learnt() -> None:
    assert len(BPE.encode(sample_text())) < 0.6 * len(sample_text())


# ------------------------------------------------------------------------------ types and errors


def test_token_type_follows_the_vocabulary() -> None:
    assert [token_dtype(size) for size in (257, 65_536, 65_537)] == [np.uint16, np.uint16, np.uint32]
    characters = "".join(chr(code) for code in range(0x20000, 0x20000 + 65_536))
    large = CharTokenizer(characters)
    assert large.encode(characters).dtype == np.uint32
    assert large.decode(large.encode(characters[-3:])) == characters[-3:]
    assert CharTokenizer(characters[:-1]).encode("𠀀").dtype == np.uint16
    assert BPE.encode("text").dtype == ByteTokenizer().encode("text").dtype == np.uint16


@pytest.mark.parametrize("unknown", ["c", "A", "𝔘", "\udc80"])
def test_char_names_a_character_it_does_not_know(unknown: str) -> None:
    with pytest.raises(DataError, match=rf"U\+{ord(unknown):04X}"):
        CharTokenizer("abd").encode(f"ab{unknown}d")


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=lambda t: t.name)
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"udc80"):
        tokenizer.encode("from a terminal that is not UTF-8: \udc80")


def test_a_vocabulary_the_text_does_not_allow() -> None:
    with pytest.raises(DataError, match=r"vocab_size=5000 is larger .*use tokenizer\.vocab_size=(\d+)") as refused:
        train_bpe(sample_text(), vocab_size=5_000)
    largest = int(str(refused.value).rsplit("=", 1)[1])
    assert train_bpe(sample_text(), vocab_size=largest).vocab_size == largest
    with pytest.raises(DataError, match="larger"):
        train_bpe(sample_text(), vocab_size=largest + 1)


def test_a_text_too_small_for_any_bpe() -> None:
    with pytest.raises(DataError, match="use tokenizer=byte"):
        train_bpe("abc", vocab_size=300)


def test_a_vocabulary_too_small_for_the_characters() -> None:
    text = "".join(chr(0x4E00 + i % 100) + " " for i in range(1_000))
    with pytest.raises(DataError, match=r"too small .*use tokenizer\.vocab_size=(\d+) or more") as refused:
        train_bpe(text, vocab_size=300, character_coverage=1.0)
    smallest = int(str(refused.value).split("vocab_size=")[2].split()[0])
    assert train_bpe(text, vocab_size=smallest, character_coverage=1.0).vocab_size == smallest


def test_text_that_leaves_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="SentencePiece cannot train"):
        train_bpe("\n\n\n")


# ------------------------------------------------------------------------------------- training


def test_training_is_deterministic() -> None:
    assert train_bpe(sample_text()).fingerprint == BPE.fingerprint
    assert train_bpe(sample_text() + "another zebra " * 50).fingerprint != BPE.fingerprint
    config = CharConfig()
    assert train_tokenizer(config, ["ab", "c"]).fingerprint == train_tokenizer(config, ["cab"]).fingerprint


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train_bpe(sample_text())
    with pytest.raises(DataError):
        train_bpe("abc", vocab_size=300)
    assert capfd.readouterr() == ("", "")


def test_long_lines_are_learnt_from() -> None:
    tokenizer = train_bpe(sample_text().replace("\n", " "))
    assert len(tokenizer.encode("quick brown wizards")) < 12


def test_the_sample_is_bounded_and_spread_evenly() -> None:
    documents = [f"{number:05d}\n{number:05d}" for number in range(10_000)]
    lines = tokenizer_module._sample_lines(documents, sample_bytes=10_000)
    assert 5_000 <= sum(map(len, lines)) <= 10_000
    numbers = [int(line) for line in lines]
    gaps = np.diff(numbers)
    assert numbers[0] == 0
    assert gaps.min() == gaps.max() == numbers[1]
    assert numbers[-1] + gaps[0] >= 10_000


def test_a_byte_tokenizer_reads_no_document() -> None:
    assert train_tokenizer(ByteConfig(), (pytest.fail("read") for _ in "x")).vocab_size == 257


def test_an_unknown_tokenizer_is_our_own_mistake() -> None:
    with pytest.raises(TypeError, match="TokenizerConfig"):
        train_tokenizer(TokenizerConfig(), [])


# ------------------------------------------------------------------------------------------ file


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer(), CharTokenizer('a"𝔘\n')], ids=lambda t: t.name)
def test_save_and_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer.model")
    loaded = load_tokenizer(tmp_path / "tokenizer.model")
    assert type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("a").tolist() == tokenizer.encode("a").tolist()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"{",
        b"{}",
        b'{"tokenizer": "char", "characters": ""}',
        b'{"tokenizer": 3}',
        b"\xff\x00",
    ]
    + [BPE.serialize()[: len(BPE.serialize()) - cut] for cut in (1, 100, 2_000)],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model is damaged"):
        load_tokenizer(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_damage_is_found_whichever_class_reads_it() -> None:
    with pytest.raises(DataError, match="SentencePiece"):
        SentencePieceTokenizer(b"garbage")
