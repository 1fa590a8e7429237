"""Tokenizers made elsewhere: what they get, what they lose and say so, and what is refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import sentencepiece
from small_tokenizers import foreign_huggingface, foreign_sentencepiece, sample_text, train_bpe, written
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from lmtrain.config.schema import HuggingFaceConfig, SavedTokenizerConfig, SentencePieceModelConfig
from lmtrain.data.tokenizer import (
    ASSISTANT,
    PAD,
    SPECIAL,
    USER,
    ByteTokenizer,
    CharTokenizer,
    IdsTokenizer,
    Tokenizer,
    load_tokenizer_bytes,
    tokenizer_file,
    train_tokenizer,
)
from lmtrain.data.tokenizer.huggingface import adopt_huggingface
from lmtrain.errors import DataError


def take(path: Path, content: bytes | Library, *special: str, end_token: str | None = None) -> Tokenizer:
    if isinstance(content, bytes):
        return train_tokenizer(SentencePieceModelConfig(path=written(path, content)), [], "", special)
    return train_tokenizer(HuggingFaceConfig(path=written(path, content), end_token=end_token), [], "", special)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "given"


# ------------------------------------------------------------------------------------ SentencePiece


def test_a_model_that_has_everything_is_left_as_it_is(path: Path) -> None:
    content = foreign_sentencepiece()
    assert take(path, content).serialize() == content
    own = train_bpe(sample_text(), special=SPECIAL).serialize()
    assert take(path, own, *SPECIAL).serialize() == own


def test_what_a_model_lacks_is_appended(path: Path) -> None:
    content = foreign_sentencepiece(eos_id=-1)
    before = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = take(path, content, USER, PAD)
    size = before.get_piece_size()
    assert tokenizer.end_id == size
    assert tokenizer.special == {PAD: size + 1, USER: size + 2}
    assert tokenizer.vocab_size == size + 3
    text = "the quick brown </s> fox<|user|>\n"
    assert tokenizer.encode(text).tolist() == before.encode(text)
    opened = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.serialize())  # as other tools do
    assert opened.eos_id() == size
    assert opened.encode(text) == before.encode(text)


def test_text_pieces_of_these_names_become_special(path: Path) -> None:
    content = foreign_sentencepiece(eos_id=-1, user_defined_symbols=(USER, "</s>"))
    before = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = take(path, content, USER)
    assert tokenizer.vocab_size == before.get_piece_size()
    assert tokenizer.special == {USER: before.piece_to_id(USER)}
    assert tokenizer.end_id == before.piece_to_id("</s>")
    text = f"the {USER} fox</s>"
    assert not {tokenizer.end_id, *tokenizer.special.values()} & set(tokenizer.encode(text).tolist())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_model_that_changes_text_is_taken_with_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = foreign_sentencepiece(
        model_type="unigram", normalization_rule_name="nmt_nfkc_cf", remove_extra_whitespaces=True
    )
    tokenizer = take(path, content)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.message
    for change in ("spaces at the start", "runs of spaces", "line ends", "tabs", "capital letters", "forms of a char"):
        assert change in record.message
    assert tokenizer.decode(tokenizer.encode("  The   FOX ")) == "the fox"
    load_tokenizer_bytes(tokenizer.serialize()).encode("  The ")
    assert len(caplog.records) == 1


def test_an_exact_model_is_taken_without_a_word(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in (foreign_sentencepiece(), foreign_sentencepiece(model_type="unigram", add_dummy_prefix=False)):
        take(path, content)
    take(path, foreign_huggingface())
    assert not caplog.records


def test_an_unknown_character_is_refused(path: Path) -> None:
    tokenizer = take(path, foreign_sentencepiece(byte_fallback=False, vocab_size=60))
    assert tokenizer.decode(tokenizer.encode("the lazy fox")) == "the lazy fox"
    for text, code in [("the é", "00E9"), ("a▁b", "2581")]:
        with pytest.raises(DataError, match=rf"U\+{code}\) has no piece"):
            tokenizer.encode(text)


# ------------------------------------------------------------------------------------- Hugging Face


def test_nothing_is_added_to_a_text(path: Path) -> None:
    library = Library.from_str(foreign_huggingface().to_str())
    library.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    library.enable_truncation(3)
    library.enable_padding(length=50)
    tokenizer = take(path, library)
    assert tokenizer.encode("the quick brown fox").tolist() == foreign_huggingface().encode("the quick brown fox").ids
    assert load_tokenizer_bytes(tokenizer.serialize()).encode("the").tolist() == tokenizer.encode("the").tolist()


def test_a_library_file_stays_one(path: Path) -> None:
    tokenizer = take(path, foreign_huggingface(), USER)
    opened = Library.from_str(tokenizer.serialize().decode())
    assert opened.token_to_id(USER) == tokenizer.special[USER] == foreign_huggingface().get_vocab_size()
    assert take(path, opened, USER).fingerprint == tokenizer.fingerprint


def test_the_end_token_is_found_or_named(path: Path) -> None:
    assert take(path, foreign_huggingface()).end_id == 0
    strange = foreign_huggingface(end_token="<fin>")
    with pytest.raises(DataError, match=r"none of the usual end tokens .*name one by tokenizer\.end_token"):
        take(path, strange)
    with pytest.raises(DataError, match=r"no token '<end>' \(tokenizer\.end_token\)"):
        take(path, strange, end_token="<end>")
    for library, name in [(strange, "<fin>"), (foreign_huggingface(), "the")]:
        tokenizer = take(path, library, end_token=name)
        assert tokenizer.end_id == library.token_to_id(name)
        loaded = load_tokenizer_bytes(tokenizer.serialize())
        assert loaded.end_id == tokenizer.end_id
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.decode([loaded.end_id]) == ""
        assert loaded.decode(loaded.encode(f"a{name} b")) == f"a{name} b"


def unigram() -> Library:
    """In such models the names of special tokens are pieces like others."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "</s>ab|user")]
    library = Library(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # type: ignore[assignment]
    library.decoder = decoders.Metaspace(prepend_scheme="never")  # type: ignore[assignment]
    library.add_special_tokens([AddedToken("</s>", special=True)])
    return library


def test_names_in_a_text_are_spelt_out_whatever_the_model(path: Path) -> None:
    tokenizer = take(path, unigram(), USER)
    for text in ("a</s>b", "</s></s>", f"</s>{USER} b</s>", "<</s>s>"):
        ids = tokenizer.encode(text)
        assert not {tokenizer.end_id, *tokenizer.special.values()} & set(ids.tolist())
        assert tokenizer.decode(ids) == text


def test_a_name_that_cannot_be_spelt_out_is_refused(path: Path) -> None:
    library = unigram()
    library.normalizer = normalizers.Replace("§", "</s>")  # type: ignore[assignment]
    tokenizer = take(path, library)
    with pytest.raises(DataError, match="holds '</s>', which the tokenizer cannot spell out"):
        tokenizer.encode("a § b")


def test_a_tokenizer_that_changes_text_is_taken_with_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = Library(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    library.decoder = decoders.WordPiece()  # type: ignore[assignment]
    assert take(path, library).end_id == 1
    (record,) = caplog.records
    assert "capital letters" in record.message
    assert "spaces beside punctuation" in record.message


def test_ids_with_gaps_leave_no_room(path: Path) -> None:
    library = Library(models.WordLevel({"</s>": 0, "[UNK]": 1, "a": 3}, unk_token="[UNK]"))
    assert take(path, library).vocab_size == 4
    with pytest.raises(DataError, match="ids have gaps"):
        take(path, library, PAD)


def test_special_tokens_of_the_library_s_own_are_spelt_out_too(path: Path) -> None:
    library = Library.from_str(foreign_huggingface().to_str())
    library.add_special_tokens(["<|fim|>"])
    tokenizer = take(path, library)
    text = "the<|fim|> fox<|endoftext|>"
    assert library.token_to_id("<|fim|>") not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("own", [None, "true"])
def test_the_library_uses_one_thread_unless_told_otherwise(
    path: Path, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if own is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", own)
    take(path, foreign_huggingface()).encode("a")
    assert os.environ["TOKENIZERS_PARALLELISM"] == (own or "false")


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"{}", foreign_sentencepiece()[:-100], foreign_sentencepiece()[:2_000]]
)
def test_a_damaged_model_is_refused(path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=rf"tokenizer\.path={path}: not a SentencePiece model, or damaged"):
        take(path, content)


@pytest.mark.parametrize("content", ["", "garbage", "{}", '{"model": 3}', '{"end_token": "a"}', "[]", "\xff"])
def test_a_damaged_json_is_refused(path: Path, content: str) -> None:
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=rf"tokenizer\.path={path}: not a tokenizer\.json") as refused:
        train_tokenizer(HuggingFaceConfig(path=str(path)), [], "", [])
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*tokenizer\.json"):
        train_tokenizer(HuggingFaceConfig(path=str(tmp_path)), [], "", [])


# ----------------------------------------------------------------------------------------- of another run


@pytest.mark.parametrize(
    "tokenizer",
    [
        train_bpe(sample_text(), special=SPECIAL),
        CharTokenizer("abc", [USER]),
        ByteTokenizer(SPECIAL),
        IdsTokenizer(40, 3),
        adopt_huggingface(foreign_huggingface().to_str().encode(), "the", [USER]),
    ],
    ids=lambda tokenizer: tokenizer.name,
)
def test_a_saved_tokenizer_is_taken_as_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    tokenizer.save(file)
    for path in (file, tmp_path):
        config = SavedTokenizerConfig(path=str(path))
        assert tokenizer_file(config) == file
        taken = train_tokenizer(config, [], "", [USER] if USER in tokenizer.special else [])
        assert (taken.fingerprint, taken.end_id) == (tokenizer.fingerprint, tokenizer.end_id)


def test_a_saved_tokenizer_gets_no_more_tokens(tmp_path: Path) -> None:
    ByteTokenizer([USER]).save(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match=r"it has no token <\|assistant\|>, which conversations need, and gets none"):
        train_tokenizer(SavedTokenizerConfig(path=str(tmp_path)), [], "", [USER, ASSISTANT])
    with pytest.raises(DataError, match=r"no token <\|pad\|>"):
        train_tokenizer(SavedTokenizerConfig(path=str(tmp_path), special_tokens="all"), [], "", [])


def test_what_holds_no_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"tokenizer.path={tmp_path}: there is no file {tmp_path}/tokenizer.model"):
        train_tokenizer(SavedTokenizerConfig(path=str(tmp_path)), [], "", [])
    (tmp_path / "tokenizer.model").write_text("{}")
    with pytest.raises(DataError, match="is damaged, or no tokenizer"):
        train_tokenizer(SavedTokenizerConfig(path=str(tmp_path)), [], "", [])
