"""What every tokenizer promises: exact round trips, an end, special tokens apart from text, one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    sample_text,
    train_bpe,
    written,
)
from tokenizer_kinds import EVERY_KIND, KINDS, TRICKY, Kind, make

from lmtrain.config.schema import (
    ByteConfig,
    CharConfig,
    HuggingFaceConfig,
    IdsConfig,
    SentencePieceModelConfig,
    TokenizerConfig,
)
from lmtrain.data.tokenizer import (
    PAD,
    SPECIAL,
    TURN_END,
    USER,
    ByteTokenizer,
    CharTokenizer,
    IdsTokenizer,
    load_tokenizer,
    load_tokenizer_bytes,
    token_dtype,
    tokenizer_file,
    train_tokenizer,
)
from lmtrain.errors import DataError

# -------------------------------------------------------------------------------- every tokenizer


@EVERY_KIND
@pytest.mark.parametrize("special", [(), SPECIAL], ids=["plain", "special"])
def test_round_trip_of_tricky_text(kind: Kind, special: Sequence[str]) -> None:
    tokenizer = make(kind, special)
    texts = [text for text in TRICKY if kind.knows(text)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text
        assert not {tokenizer.end_id, *tokenizer.special.values()} & set(ids.tolist())
        assert ids.dtype == token_dtype(tokenizer.vocab_size)
        assert ids.tolist() == tokenizer.encode(text).tolist(), "alone as in a batch"
    assert tokenizer.encode_batch([]) == []


@EVERY_KIND
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_round_trip_of_any_text(kind: Kind, data: st.DataObject) -> None:
    tokenizer = make(kind, SPECIAL)
    text = data.draw(kind.texts)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@EVERY_KIND
def test_the_end_and_special_tokens_decode_to_nothing(kind: Kind) -> None:
    tokenizer = make(kind, SPECIAL)
    assert tuple(tokenizer.special) == SPECIAL
    own = [tokenizer.end_id, *tokenizer.special.values()]
    assert len(set(own)) == len(own)
    assert all(0 <= token < tokenizer.vocab_size for token in own)
    ids = [*own, *tokenizer.encode("ab").tolist(), *own, *tokenizer.encode("b").tolist(), tokenizer.end_id]
    assert tokenizer.decode(ids).replace(" ", "") == "abb"
    assert tokenizer.decode(own) == ""


@EVERY_KIND
def test_special_tokens_are_there_only_if_asked_for(kind: Kind) -> None:
    plain, some = make(kind), make(kind, (TURN_END, USER))
    assert plain.special == {}
    assert set(some.special) == {USER, TURN_END}
    text = "the fox" if kind.knows("the fox") else ""
    names = "".join(SPECIAL)
    assert some.decode(some.encode(text + names)) == text + names


@EVERY_KIND
def test_save_and_load(kind: Kind, tmp_path: Path) -> None:
    tokenizer = make(kind, (PAD,))
    tokenizer.save(tmp_path / "tokenizer.model")
    for loaded in (load_tokenizer(tmp_path / "tokenizer.model"), load_tokenizer_bytes(tokenizer.serialize())):
        assert type(loaded) is type(tokenizer)
        assert loaded.name == tokenizer.name
        assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
        assert loaded.special == tokenizer.special
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("a</s>" + PAD).tolist() == tokenizer.encode("a</s>" + PAD).tolist()


@EVERY_KIND
def test_the_fingerprint_follows_the_vocabulary(kind: Kind) -> None:
    prints = [kind.make(special).fingerprint for special in ((), (), (PAD,))]
    assert prints[0] == prints[1] != prints[2]


@EVERY_KIND
def test_a_lone_surrogate_is_refused(kind: Kind) -> None:
    with pytest.raises(DataError, match=r"udc80"):
        make(kind).encode("from a terminal that is not UTF-8: \udc80")


def test_all_special_tokens_can_be_asked_for() -> None:
    every = train_tokenizer(ByteConfig(special_tokens="all"), [], "", [])
    assert every.special == {name: 257 + number for number, name in enumerate(SPECIAL)}
    assert every.vocab_size == 263
    assert tuple(train_bpe(sample_text(), special_tokens="all").special) == SPECIAL


def test_what_was_stored_before_there_were_special_tokens_stays_the_same() -> None:
    assert CharTokenizer("ab\n").serialize() == b'{"tokenizer": "char", "characters": "ab\\n"}'
    assert ByteTokenizer().serialize() == b'{"tokenizer": "byte"}'
    bpe = train_bpe(sample_text())
    expected = [288, 266, 308, 312, 280, 312, 287, 2, 259, 329, 279, 229, 153, 132, 312, 52, 53, 312, 198, 172]
    assert bpe.encode("the quick brown fox\n  jumps▁ 12 é").tolist() == expected
    # With SentencePiece 0.2.3. Another version may write its files differently; the ids above must stay.
    assert bpe.fingerprint == "70612674a00a9992ab550c4e3053827dc1fe22dfdf34f085a2f5c796154c676a"


def test_token_type_follows_the_vocabulary() -> None:
    assert [token_dtype(size) for size in (257, 65_536, 65_537)] == [np.uint16, np.uint16, np.uint32]
    characters = "".join(chr(code) for code in range(0x20000, 0x20000 + 65_536))
    large = CharTokenizer(characters)
    assert large.encode(characters).dtype == np.uint32
    assert large.decode(large.encode(characters[-3:])) == characters[-3:]
    assert CharTokenizer(characters[:-1]).encode("𠀀").dtype == np.uint16


# ------------------------------------------------------------------------ characters, bytes, ids


@given(st.text(max_size=200))
def test_byte_ids_are_utf8(text: str) -> None:
    assert ByteTokenizer().encode(text).tolist() == list(text.encode())


@given(st.binary(max_size=200))
def test_byte_decodes_any_bytes_and_keeps_those_that_are_text(content: bytes) -> None:
    text = ByteTokenizer().decode(content)
    assert text == content.decode(errors="replace")
    if "\ufffd" not in text:
        assert bytes(ByteTokenizer().encode(text).tolist()) == content


@given(st.text(min_size=1, max_size=200))
def test_char_has_an_id_a_character(text: str) -> None:
    tokenizer = CharTokenizer("".join(sorted(set(text))), (PAD,))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.end_id) == (len(set(text)) + 2, len(set(text)))


@pytest.mark.parametrize("unknown", ["c", "A", "𝔘", "\udc80"])
def test_char_names_a_character_it_does_not_know(unknown: str) -> None:
    with pytest.raises(DataError, match=rf"U\+{ord(unknown):04X}"):
        CharTokenizer("abd").encode(f"ab{unknown}d")


@pytest.mark.parametrize("end_id", [None, 3])
def test_ids_are_shown_and_nothing_is_encoded(end_id: int | None, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(IdsConfig(vocab_size=50, end_id=end_id), [], "", [PAD])
    assert (tokenizer.end_id, tokenizer.vocab_size) == ((50, 52) if end_id is None else (3, 51))
    assert tokenizer.special == {PAD: tokenizer.vocab_size - 1}
    assert tokenizer.decode(np.array([7, 49, tokenizer.end_id, tokenizer.special[PAD], 0])) == "7 49 0"
    with pytest.raises(DataError, match="knows no text"):
        tokenizer.encode_batch(["text"])
    tokenizer.save(tmp_path / "ids")
    loaded = load_tokenizer(tmp_path / "ids")
    assert isinstance(loaded, IdsTokenizer)
    assert (loaded.end_id, loaded.vocab_size, loaded.special) == (
        tokenizer.end_id,
        tokenizer.vocab_size,
        tokenizer.special,
    )


# ------------------------------------------------------------------------------------------ file


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\xff\x00",
        b"{",
        b"{}",
        b"[]",
        b'{"tokenizer": "char", "characters": ""}',
        b'{"tokenizer": "char", "characters": "ab", "special": ["<|nobody|>"]}',
        b'{"tokenizer": "char", "characters": "ab", "special": 3}',
        b'{"tokenizer": "byte", "special": [["<|user|>"]]}',
        b'{"tokenizer": "ids", "vocab_size": 3, "end_id": 3}',
        b'{"tokenizer": 3}',
        b'{"tokenizer": "char", "chara',
        b'{"model": 3}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model is damaged"):
        load_tokenizer(path)


@pytest.mark.parametrize("cut", [1, 100, 2_000])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[7]], ids=["bpe", "huggingface"])
def test_a_truncated_file_is_refused(kind: Kind, cut: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(make(kind).serialize()[:-cut])
    with pytest.raises(DataError, match=r"tokenizer\.model is damaged"):
        load_tokenizer(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_only_given_tokenizers_have_a_file(tmp_path: Path) -> None:
    assert tokenizer_file(CharConfig()) is None
    path = written(tmp_path / "tokenizer.json", b"{}")
    assert tokenizer_file(HuggingFaceConfig(path=path)) == Path(path)
    assert tokenizer_file(HuggingFaceConfig(path=str(tmp_path))) == Path(path)
    assert tokenizer_file(SentencePieceModelConfig(path=path)) == Path(path)
    for config in (HuggingFaceConfig(path="absent"), SentencePieceModelConfig(path=str(tmp_path))):
        with pytest.raises(DataError, match=f"tokenizer.path={config.path}: there is no file"):
            tokenizer_file(config)


def test_an_unknown_tokenizer_is_our_own_mistake() -> None:
    with pytest.raises(TypeError, match="TokenizerConfig"):
        train_tokenizer(TokenizerConfig(), [], "", [])
