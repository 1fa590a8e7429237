"""What a document becomes: special tokens, targets, prompts and bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lmtrain.config.schema import ChatConfig, PairsConfig, TextConfig
from lmtrain.data.encoding import ROLE_TOKENS, Encoder, has_prompts, special_tokens
from lmtrain.data.records import Conversation, Message, Pair
from lmtrain.data.survey import Stretch
from lmtrain.data.tokenizer import TURN_END, ByteTokenizer, IdsTokenizer
from lmtrain.errors import DataError

TOKENIZER = ByteTokenizer([*ROLE_TOKENS.values(), TURN_END])
END, TURN = TOKENIZER.end_id, TOKENIZER.special[TURN_END]
SYSTEM, USER, ASSISTANT = (TOKENIZER.special[ROLE_TOKENS[role]] for role in ("system", "user", "assistant"))  # type: ignore[index]
CHAT = Conversation(
    (Message("system", "Be é."), Message("user", "Hi"), Message("assistant", "Yö"), Message("user", "?"))
)


def whole(record: object) -> Stretch:
    return Stretch("train", record, closes=True, ends=True)  # type: ignore[arg-type]


def test_a_text_is_followed_by_the_end_token() -> None:
    encoded = Encoder(TOKENIZER, prompts=False)([whole("aé"), whole("b")])["train"]
    assert encoded.tokens.tolist() == [*"aé".encode(), END, *b"b", END]
    assert encoded.tokens.dtype == np.uint16
    assert encoded.ends.tolist() == [4, 6]
    assert encoded.counted is None
    assert encoded.prompts is None
    assert encoded.num_bytes == 4


def test_stretches_of_a_document_and_of_several_splits() -> None:
    batch = [
        Stretch("train", "ab", closes=False, ends=False),
        Stretch("train", "c", closes=True, ends=False),
        Stretch("val", "d", closes=True, ends=True),
        whole("e"),
    ]
    encoded = Encoder(TOKENIZER, prompts=False)(batch)
    assert encoded["train"].tokens.tolist() == [*b"abce", END]
    assert encoded["train"].ends.tolist() == [3, 5]
    assert encoded["val"].tokens.tolist() == [*b"d", END]


def test_a_conversation_teaches_what_the_assistant_says() -> None:
    encoded = Encoder(TOKENIZER, prompts=True)([whole(CHAT), whole(CHAT)])["train"]
    one = [SYSTEM, *"Be é.".encode(), TURN, USER, *b"Hi", TURN, ASSISTANT, *"Yö".encode(), TURN, USER, *b"?", TURN, END]
    assert encoded.tokens.tolist() == one * 2
    assert encoded.counted is not None
    targets = [token for token, counts in zip(one, encoded.counted, strict=False) if counts]
    assert targets == [*"Yö".encode(), TURN]
    assert encoded.prompts is not None
    assert encoded.prompts.tolist() == [one.index(ASSISTANT) + 1] * 2
    assert encoded.ends.tolist() == [len(one), 2 * len(one)]
    assert encoded.num_bytes == 2 * len("Yö".encode())
    everything = Encoder(TOKENIZER, prompts=False)([whole(CHAT)])["train"]
    assert everything.tokens.tolist() == one
    assert everything.num_bytes == sum(len(message.content.encode()) for message in CHAT.messages)


def test_a_pair_teaches_its_target() -> None:
    encoded = Encoder(TOKENIZER, prompts=True)([whole(Pair("ab", "c")), whole(Pair("d", "ef"))])["train"]
    assert encoded.tokens.tolist() == [*b"ab", END, *b"c", END, *b"d", END, *b"ef", END]
    assert encoded.counted is not None
    assert encoded.counted.tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 3
    assert encoded.prompts is not None
    assert encoded.prompts.tolist() == [3, 2]
    assert encoded.num_bytes == 3


def test_ids_are_taken_as_they_are_if_the_tokenizer_knows_them() -> None:
    encoded = Encoder(TOKENIZER, prompts=False)([whole(np.array([97, 195, 169], np.int64))])["train"]
    assert encoded.tokens.tolist() == [97, 195, 169, END]
    assert encoded.num_bytes == 3
    with pytest.raises(
        DataError, match=rf"id {TOKENIZER.vocab_size}, beyond the vocabulary of {TOKENIZER.vocab_size} "
    ):
        Encoder(TOKENIZER, prompts=False)([whole(np.array([TOKENIZER.vocab_size]))])
    ids = Encoder(IdsTokenizer(99), prompts=False)
    assert ids([whole(np.array([98]))])["train"].tokens.tolist() == [98, 99]
    with pytest.raises(DataError, match=r"id 99, beyond the vocabulary of 99 \(ids\)"):
        ids([whole(np.array([99]))])  # which only ends a document


def test_settings_tell_what_is_needed() -> None:
    chat, text = ChatConfig(seq_len=8, path="x"), TextConfig(seq_len=8, path="x")
    pairs = PairsConfig(seq_len=8, path="x", source="a", target="b")
    assert special_tokens(chat) == [*ROLE_TOKENS.values(), TURN_END]
    assert special_tokens(text) == special_tokens(pairs) == []
    assert has_prompts(chat)
    assert has_prompts(pairs)
    assert not has_prompts(text)
    assert not has_prompts(dataclasses.replace(chat, targets="all"))
