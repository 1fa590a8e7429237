"""Tokens → pieces of text: together the decoded text, never half a character, nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmtrain.config.schema import SentencePieceBpeConfig
from lmtrain.data.tokenizer import ByteTokenizer, IdsTokenizer, Tokenizer, train_tokenizer
from lmtrain.inference.text_stream import MAX_WINDOW, REPLACEMENT, TextStream

LINES = ["the cat sat on a mat", "dogs ran; über façade → naïve", "  indented   text  "] * 20
TOKENIZERS: dict[str, Tokenizer] = {
    "byte": ByteTokenizer(),
    "ids": IdsTokenizer(500),
    "sentencepiece": train_tokenizer(SentencePieceBpeConfig(vocab_size=330), LINES, "", ["<|user|>"]),
}


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*map(stream.add, ids), stream.finish()]


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@given(text=st.text(), prompt=st.text(max_size=20))
@example(text="a€😀\ufffd b" * MAX_WINDOW, prompt=" ▁é")
def test_the_pieces_are_the_text(kind: str, text: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer.decode, tokenizer.encode(prompt).tolist())
    pieces = streamed(stream, tokenizer.encode(text).tolist())
    assert "".join(pieces) == stream.text == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.data())
@settings(max_examples=200)
def test_whatever_a_model_writes_is_what_decoding_gives(kind: str, data: st.DataObject) -> None:
    """Also bytes that are no text, end tokens and special ones, and prompts that end within a character."""
    tokenizer = TOKENIZERS[kind]
    tokens = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from([*"€😀".encode()]) | st.integers(120, 256)
    ids = data.draw(st.lists(tokens, max_size=3 * MAX_WINDOW))
    start = data.draw(st.integers(0, len(ids)))
    stream = TextStream(tokenizer.decode, ids[:start])
    whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:start])
    shown = len(before) - min(3, len(before) - len(before.rstrip(REPLACEMENT)))
    assert "".join(streamed(stream, ids[start:])) == whole[shown:]


def test_a_token_that_is_written_otherwise_at_the_beginning() -> None:
    """As in SentencePiece models with a dummy prefix: the first space of a text is none."""
    ids = list(range(3 * MAX_WINDOW))
    stream = TextStream(lambda ids: "".join(f" {token}" for token in ids)[1:], ids[:2])
    assert streamed(stream, ids[2:])[:-1] == [f" {token}" for token in ids[2:]]
    assert len(stream._window) <= MAX_WINDOW


def test_a_character_comes_when_it_is_whole() -> None:
    stream = TextStream(ByteTokenizer().decode, [])
    assert streamed(stream, [*"a😀b".encode()]) == ["a", "", "", "", "😀", "b", ""]
    broken = TextStream(ByteTokenizer().decode, [])
    assert streamed(broken, [0xF0, 0x9F, 0x98]) == ["", "", "", REPLACEMENT]


def test_what_may_be_a_stop_string_is_held_back() -> None:
    stream = TextStream(ByteTokenizer().decode, [], stops=["END", "\n\n"])
    assert streamed(stream, [*b"aEN.E\nb"]) == ["a", "", "", "EN.", "", "E", "\nb", ""]
    assert not stream.stopped
    stopped = TextStream(ByteTokenizer().decode, [], stops=["END", "\n\n"])
    assert streamed(stopped, [*b"aEENDxy"]) == ["a", "", "E", "", "", "", "", ""]
    assert (stopped.stopped, stopped.text) == (True, "aE")


def test_a_stop_string_that_began_in_the_prompt_is_none() -> None:
    stream = TextStream(ByteTokenizer().decode, [*b"what E"], stops=["END"])
    assert "".join(streamed(stream, [*b"ND"])) == "ND"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string_that_is_complete(text: str, stops: list[str]) -> None:
    stream = TextStream(ByteTokenizer().decode, [], stops=stops)
    pieces = streamed(stream, [*text.encode()])
    expected = text
    for end in range(1, len(text) + 1):  # as the characters come
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            expected = text[: min(found)]
            break
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == (expected != text or any(stop in text for stop in stops))
