"""Tokenizers written for Hugging Face give the ids and the text that ours give, or are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as schema
from small_tokenizers import (
    foreign_huggingface,
    foreign_sentencepiece,
    repetitive_unigram,
    sample_text,
    train_bpe,
    train_unigram,
    unigram_with,
    written,
)
from tokenizer_kinds import EVERY_KIND, KINDS, TRICKY, Kind, make
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from lmtrain.config.schema import HuggingFaceConfig
from lmtrain.data.encoding import Encoder
from lmtrain.data.records import Conversation, Message
from lmtrain.data.survey import Stretch
from lmtrain.data.tokenizer import (
    ASSISTANT,
    PAD,
    SPECIAL,
    USER,
    ByteTokenizer,
    IdsTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    huggingface_files,
    train_tokenizer,
)
from lmtrain.errors import UsageError

NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of SentencePiece's pieces
NAMES = ("<unk>", "</s>", "<s>", "<0x0A>", "<0xE2>", "<|endoftext|>", *SPECIAL)


def opened(tokenizer: Tokenizer) -> Library:
    """What is written, as the library opens it."""
    return Library.from_str(huggingface_files(tokenizer, model_max_length=64)["tokenizer.json"].decode())


@cache
def spelling_out(kind: Kind, special: Sequence[str] = SPECIAL) -> Library:
    """As with split_special_tokens=True."""
    library = opened(make(kind, special))
    library.encode_special_tokens = True
    return library


def ids_of(library: Library, text: str) -> list[int]:
    ids: list[int] = library.encode(text).ids
    return ids


def assert_same(tokenizer: Tokenizer, library: Library, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    assert ids_of(library, text) == ids
    assert library.decode(ids) == tokenizer.decode(ids)


# -------------------------------------------------------------------------------- every tokenizer


@EVERY_KIND
@pytest.mark.parametrize("special", [(), SPECIAL], ids=["plain", "special"])
def test_tricky_text(kind: Kind, special: Sequence[str]) -> None:
    library = spelling_out(kind, special)
    for text in (*TRICKY, *NAMES, "a".join(NAMES), "<0x0A> the <unk>fox</s>"):
        if kind.knows(text):
            assert_same(make(kind, special), library, text)


@EVERY_KIND
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_text(kind: Kind, data: st.DataObject) -> None:
    parts = st.one_of(kind.texts, st.sampled_from([name for name in NAMES if kind.knows(name)]))
    assert_same(make(kind, SPECIAL), spelling_out(kind), data.draw(st.lists(parts, max_size=4).map("".join)))


@EVERY_KIND
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_names_of_special_tokens_are_those_tokens(kind: Kind, data: st.DataObject) -> None:
    """As usual there: the texts between them are encoded one by one."""
    tokenizer, library = make(kind, SPECIAL), opened_once(kind)
    names = st.sampled_from(sorted(tokenizer.special))
    row = data.draw(st.lists(st.tuples(kind.texts.filter(lambda text: "<" not in text), names), max_size=4))
    expected = [token for text, name in row for token in [*tokenizer.encode(text).tolist(), tokenizer.special[name]]]
    assert ids_of(library, "".join(text + name for text, name in row)) == expected
    assert library.decode(expected, skip_special_tokens=True) == tokenizer.decode(expected)


@cache
def opened_once(kind: Kind) -> Library:
    return opened(make(kind, SPECIAL))


@EVERY_KIND
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_ids(kind: Kind, data: st.DataObject) -> None:
    """What a model may say: special tokens, pieces in any order, bytes that are UTF-8."""
    tokenizer, library = make(kind, SPECIAL), opened_once(kind)
    spelt = {number for byte in range(256) if (number := library.token_to_id(f"<0x{byte:02X}>")) is not None}
    pieces = st.sampled_from([token for token in range(tokenizer.vocab_size) if token not in spelt])
    characters = kind.texts.map(lambda text: tokenizer.encode(text).tolist())
    ids = [token for part in data.draw(st.lists(pieces.map(lambda token: [token]) | characters)) for token in part]
    if tokenizer.decode(ids).startswith(" \u2047"):
        return  # the unknown token: behind a space that is put before texts, the library takes its own
    assert library.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@EVERY_KIND
@pytest.mark.parametrize("special", [(), SPECIAL, (PAD,)], ids=["plain", "special", "padding"])
def test_the_vocabulary_and_the_settings(kind: Kind, special: Sequence[str]) -> None:
    tokenizer = make(kind, special)
    files = huggingface_files(tokenizer, model_max_length=77)
    library = Library.from_str(files["tokenizer.json"].decode())
    config = json.loads(files["tokenizer_config.json"])
    assert library.get_vocab_size() == tokenizer.vocab_size
    assert library.token_to_id(config["eos_token"]) == tokenizer.end_id
    assert {name: library.token_to_id(name) for name in special} == dict(tokenizer.special)
    assert config["pad_token"] == (PAD if PAD in special else config["eos_token"])
    assert config["model_max_length"] == 77
    assert ("chat_template" in config) == (special == SPECIAL)
    if isinstance(tokenizer, SentencePieceTokenizer):
        assert files["tokenizer.model"] == tokenizer.serialize()


# ----------------------------------------------------------------------------------- SentencePiece


def assert_spells_out(tokenizer: Tokenizer, *texts: str) -> None:
    library = opened(tokenizer)
    library.encode_special_tokens = True
    for text in texts:
        assert_same(tokenizer, library, text)
        assert not {tokenizer.end_id, *tokenizer.special.values()} & set(ids_of(library, text))


@pytest.mark.parametrize("train", [train_bpe, train_unigram])
def test_symbols_that_look_like_special_tokens(train) -> None:  # type: ignore[no-untyped-def]
    symbols = ["</s", "<|user", "r|><", "t_end", "x y", "\n\n", "<0x"]
    tokenizer = train(sample_text() + "|>_<" * 9, vocab_size=340, user_symbols=symbols, special=SPECIAL)
    texts = ["</s><|user|><|turn_end|>", "a</s></s>", "<|user|><0x0A>\n\n\n", "x y<|user<|user|>x  y", "<0x0A><|use"]
    assert_spells_out(tokenizer, *texts)
    assert ids_of(opened(tokenizer), f"x y{USER}x y")[1] == tokenizer.special[USER]


def test_pieces_of_which_the_names_are_made() -> None:
    """As in pages of HTML: every two letters of </s> and of the others are in some piece."""
    names = ("</s>", "<s>", "<unk>", "<0x0A>")
    pieces = {letter: -9.5 for name in names for letter in name} | {
        left + right: -8.25 for name in names for left, right in pairwise(name)
    }
    tokenizer = SentencePieceTokenizer(unigram_with(pieces, add_dummy_prefix=False))
    assert len(tokenizer.encode("</s>")) == 2
    assert_spells_out(tokenizer, "</s>", "the <s>fox</s><unk>", "a</s", "日</s>本", "<0x0A></s>", "s></s><0x0A")


@st.composite
def merging(draw: st.DrawFn) -> SentencePieceTokenizer:
    """A BPE model of few letters and any ranks, in which pieces overlap as much as they can."""
    pieces = ["a", "b"]
    for _ in range(draw(st.integers(1, 12))):
        made = draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces))
        if made not in pieces and len(made) < 9:
            pieces.append(made)
    proto = schema.ModelProto.FromString(foreign_sentencepiece(add_dummy_prefix=False))  # type: ignore[attr-defined]
    for piece in [piece for piece in proto.pieces if piece.type == NORMAL]:
        proto.pieces.remove(piece)
    for rank, text in enumerate([*draw(st.permutations(pieces[2:])), *pieces[:2]]):
        proto.pieces.add(piece=text, score=-rank, type=NORMAL)
    return SentencePieceTokenizer(proto.SerializeToString())


@settings(deadline=None, max_examples=60)
@given(merging(), st.lists(st.text("ab", max_size=40) | st.integers(1, 40).map("a".__mul__), min_size=20, max_size=20))
def test_one_piece_is_made_in_many_ways(tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    library = opened(tokenizer)
    for text in texts:
        assert_same(tokenizer, library, text)


def test_runs_that_can_be_split_in_several_ways() -> None:
    """Where sums of scores are rounded, or scores read from a file are not those written, equal sums differ."""
    tokenizer = SentencePieceTokenizer(repetitive_unigram())
    library = opened(tokenizer)
    for part, length in product(["o", "ha", "ah", " ", "  h", "ooh"], range(3, 40)):
        assert_same(tokenizer, library, part * length)
    for words in range(0, 1_500, 100):
        assert_same(tokenizer, library, f"{'the quick fox, ' * words}xooooooooo hahahaha{' ' * 30}y    {' ' * 13}")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_space_before_every_text(model_type: str) -> None:
    tokenizer = SentencePieceTokenizer(foreign_sentencepiece(model_type=model_type))
    assert_spells_out(tokenizer, "", "the", " the", "▁the", "▁", " ▁the", "a▁b▁ c", "\nthe\nthe", "\n▁\n", "the</s>the")


# ---------------------------------------------------------------------------------- characters, bytes


@given(st.binary(max_size=60))
@example(b"\xe6\x97\xe6\x97\xa5\xf0\x9f\x91\xc0\x80\xed\xa0\x80")
def test_bytes_that_are_not_text(content: bytes) -> None:
    assert opened(ByteTokenizer()).decode(list(content)) == ByteTokenizer().decode(content)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.characters], ids=lambda kind: kind.name)
def test_an_unknown_character_is_an_error(kind: Kind) -> None:
    for text in ("日", "the 日 fox", "▁"):
        with pytest.raises(Exception, match=r"a character that the tokenizer does not know|unknown token"):
            opened_once(kind).encode(text)


# ------------------------------------------------------------------------------------- Hugging Face


def given_library(tmp_path: Path, library: Library, *special: str, end_token: str | None = None) -> Tokenizer:
    path = written(tmp_path / "tokenizer.json", library)
    return train_tokenizer(HuggingFaceConfig(path=path, end_token=end_token), [], "", special)


def test_nothing_is_added_to_a_text(tmp_path: Path) -> None:
    library = Library.from_str(foreign_huggingface().to_str())
    library.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert_same(given_library(tmp_path, library), opened(given_library(tmp_path, library)), "the quick fox")


def test_an_end_token_of_any_name(tmp_path: Path) -> None:
    tokenizer = given_library(tmp_path, foreign_huggingface(end_token="<fin>"), end_token="<fin>")
    config = json.loads(huggingface_files(tokenizer, model_max_length=64)["tokenizer_config.json"])
    assert config["eos_token"] == config["pad_token"] == "<fin>"
    assert_same(tokenizer, opened(tokenizer), "the quick fox")


def spaced(*tokens: AddedToken) -> Library:
    """A tokenizer that puts a space before the first part of a text."""
    pieces = {letter: number for number, letter in enumerate(["</s>", "▁", *'abcdehiknotuw{}:1?\n"', "▁a", "▁h"])}
    library = Library(models.BPE(pieces, [("▁", "a"), ("▁", "h")]))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    library.add_tokens(list(tokens))
    return library


@pytest.mark.parametrize("messages", [[("user", "hi")], [("system", "a"), ("user", " a"), ("assistant", "ha")]])
def test_each_message_begins_as_a_text_does(messages: list[tuple[str, str]], tmp_path: Path) -> None:
    tokenizer = given_library(tmp_path, spaced(), *SPECIAL)
    assert ids_of(opened(tokenizer), rendered(tokenizer, messages)) == spoken(tokenizer, messages)
    assert_same(tokenizer, opened(tokenizer), "hi a  ha")


def test_messages_that_would_not_begin_as_texts_do(tmp_path: Path) -> None:
    library = spaced(AddedToken("ha", special=False))
    assert_same(given_library(tmp_path, library), opened(given_library(tmp_path, library)), "hi ha a")
    message = refusal(given_library(tmp_path, library, *SPECIAL))
    assert "prepend_scheme=first" in message


# ----------------------------------------------------------------------------------- conversations


CONVERSATIONS = [
    [],
    [("user", "hi")],
    [("system", "be kind"), ("user", " what?\n"), ("assistant", ""), ("tool", '{"a": 1}'), ("assistant", "a  b ")],
]


def spoken(tokenizer: Tokenizer, messages: list[tuple[str, str]]) -> list[int]:
    """The tokens of training."""
    if not messages:
        return []
    conversation = Conversation(tuple(Message(role, content) for role, content in messages))  # type: ignore[arg-type]
    encoded = Encoder(tokenizer, prompts=False)([Stretch("train", conversation, closes=True, ends=False)])
    return list(map(int, encoded["train"].tokens))


def rendered(tokenizer: Tokenizer, messages: list[tuple[str, str]], **words: object) -> str:
    """As transformers does."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    config = json.loads(huggingface_files(tokenizer, model_max_length=64)["tokenizer_config.json"])
    template = environment.from_string(config["chat_template"])
    return template.render(messages=[{"role": role, "content": content} for role, content in messages], **words)


def speaking(kind: Kind) -> bool:
    return kind.knows('{"a": 1}')


@EVERY_KIND
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["none", "one", "all roles"])
def test_the_chat_template_writes_what_training_reads(kind: Kind, messages: list[tuple[str, str]]) -> None:
    tokenizer, library = make(kind, SPECIAL), opened_once(kind)
    assert ids_of(library, rendered(tokenizer, messages)) == spoken(tokenizer, messages)
    expected = [*spoken(tokenizer, messages), tokenizer.special[ASSISTANT]]
    assert ids_of(library, rendered(tokenizer, messages, add_generation_prompt=True)) == expected


def test_a_role_that_training_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="one of system, user, assistant, tool; got developer"):
        rendered(ByteTokenizer(SPECIAL), [("developer", "a")])


# ----------------------------------------------------------------------------------------- refusals


def refusal(tokenizer: Tokenizer) -> str:
    with pytest.raises(UsageError) as refused:
        huggingface_files(tokenizer, model_max_length=64)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_ids_are_no_text() -> None:
    assert "(ids) cannot be written for Hugging Face" in refusal(IdsTokenizer(10))
    assert "only ids, and no text" in refusal(IdsTokenizer(10))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "the normalisation nmt_nfkc"),
        ({"normalization_rule_name": "nfkc_cf", "model_type": "unigram"}, "the normalisation nfkc_cf"),
        ({"remove_extra_whitespaces": True}, "the removal of spaces"),
        ({"treat_whitespace_as_suffix": True}, "the treatment of spaces"),
        ({"model_type": "word"}, "models of type word"),
        ({"model_type": "char"}, "models of type char"),
        ({"user_defined_symbols": ("a b",), "add_dummy_prefix": False}, "a space in a piece that is not written as U"),
        ({"user_defined_symbols": ("<b>",)}, "the symbol '<b>' behind a space that is put before every text"),
    ],
)
def test_what_a_sentencepiece_model_does_and_the_library_cannot(settings: dict[str, Any], why: str) -> None:
    message = refusal(SentencePieceTokenizer(foreign_sentencepiece(**settings)))
    assert f"cannot do {why}" in message


def changed(model: bytes, **pieces: tuple[int, float, int]) -> SentencePieceTokenizer:
    """The model with pieces that are other ones: number, score and type of each."""
    proto = schema.ModelProto.FromString(model)  # type: ignore[attr-defined]
    for text, (number, score, kind) in pieces.items():
        proto.pieces[number].piece, proto.pieces[number].score, proto.pieces[number].type = text, score, kind
    return SentencePieceTokenizer(proto.SerializeToString())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_pieces_that_the_library_does_not_have(model_type: str) -> None:
    model = foreign_sentencepiece(model_type=model_type)
    last = SentencePieceTokenizer(model).vocab_size - 1
    assert "unused pieces ('zqx')" in refusal(changed(model, zqx=(270, -1.0, UNUSED)))
    assert "the character 'ß', which is in pieces" in refusal(changed(model, aß=(270, -1.0, NORMAL)))
    assert "a special token of one character ('§')" in refusal(changed(model, **{"§": (last, 0.0, CONTROL)}))


def test_pieces_of_one_rank() -> None:
    proto = SentencePieceTokenizer(foreign_sentencepiece()).proto
    merged = [piece for piece in proto.pieces if len(piece.piece) > 1 and piece.type == NORMAL]
    merged[1].score = merged[0].score
    assert "pieces of the same rank" in refusal(SentencePieceTokenizer(proto.SerializeToString()))


def test_symbols_in_which_the_name_of_a_token_hides() -> None:
    tokenizer = train_unigram(sample_text(), user_symbols=["<|us", "user|>"], special=SPECIAL)
    assert "symbols that hold parts of '<|user|>'" in refusal(tokenizer)
    assert tokenizer.decode(tokenizer.encode("a<|user|>")) == "a<|user|>"


# ------------------------------------------------------------------------------------- transformers


def saved(folder: Path, tokenizer: Tokenizer, model_type: str | None = None) -> Path:
    folder.mkdir()
    for name, content in huggingface_files(tokenizer, model_max_length=64).items():
        (folder / name).write_bytes(content)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.slow
@EVERY_KIND
@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_transformers_opens_it(kind: Kind, model_type: str | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = make(kind, SPECIAL)
    theirs = transformers.AutoTokenizer.from_pretrained(saved(tmp_path / "a", tokenizer, model_type))
    assert theirs.is_fast
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.end_id
    assert theirs.pad_token_id == tokenizer.special[PAD]
    assert theirs.bos_token is None
    assert theirs.model_max_length == 64
    assert set(theirs.all_special_ids) >= {tokenizer.end_id, *tokenizer.special.values()}
    for text in (*TRICKY, *NAMES):
        if kind.knows(text):
            ids = tokenizer.encode(text).tolist()
            assert theirs(text, split_special_tokens=True)["input_ids"] == ids
            assert theirs.decode([*ids, tokenizer.end_id], skip_special_tokens=True) == tokenizer.decode(ids)
    for pairs in CONVERSATIONS[1:]:
        messages = [{"role": role, "content": content} for role, content in pairs]
        assert theirs.apply_chat_template(messages)["input_ids"] == spoken(tokenizer, pairs)
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == [*spoken(tokenizer, pairs), tokenizer.special[ASSISTANT]]
    again = theirs.save_pretrained(tmp_path / "b") and transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    text = next(text for text in TRICKY[1:] if kind.knows(text))
    assert again(text)["input_ids"] == tokenizer.encode(text).tolist()


@pytest.mark.slow
def test_names_in_messages_can_be_spelt_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = ByteTokenizer(SPECIAL)
    theirs = transformers.AutoTokenizer.from_pretrained(saved(tmp_path / "a", tokenizer))
    messages = [{"role": "user", "content": "a<|user|>b"}]
    ids = theirs.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    assert ids == spoken(tokenizer, [("user", "a<|user|>b")])
