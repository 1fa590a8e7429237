"""Tokenizers without a model: one id a character, one a byte, or ids only. Each is a small JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.documents import TokenArray
from lmtrain.data.tokenizer.interface import SPECIAL, Tokenizer, token_dtype, utf8
from lmtrain.errors import DataError


class CharTokenizer(Tokenizer):
    """One id a character of `characters`, in their order, one for the end, then those of special tokens."""

    name = "char"

    def __init__(self, characters: str, special: Sequence[str] = ()) -> None:
        self.end_id = len(characters)
        self.special = _numbered(special, self.end_id + 1)
        self.vocab_size = self.end_id + 1 + len(special)
        self.characters = characters
        self._codes = _code_points(characters)
        # Code point → id, where an unknown character maps to the end token, which text never holds.
        self._ids = np.full(int(self._codes.max()) + 1, self.end_id, token_dtype(self.vocab_size))
        self._ids[self._codes] = np.arange(self.end_id)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> TokenArray:
        codes = _code_points(text)
        ids: TokenArray = self._ids.take(codes, mode="clip")
        unknown = (ids == self.end_id) | (codes >= len(self._ids))
        if unknown.any():
            character = text[int(unknown.argmax())]
            raise DataError(
                f"the character {character!r} (U+{ord(character):04X}) does not occur in the text the char "
                "tokenizer was made from; leave it out or use tokenizer=byte"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        tokens = np.fromiter(ids, np.int64)
        codes: NDArray[np.uint32] = self._codes[tokens[tokens < self.end_id]]
        return codes.tobytes().decode("utf-32-le")

    def serialize(self) -> bytes:
        return _content(self, characters=self.characters)


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, one id for the end, then those of special tokens."""

    name = "byte"
    end_id = 256

    def __init__(self, special: Sequence[str] = ()) -> None:
        self.special = _numbered(special, self.end_id + 1)
        self.vocab_size = self.end_id + 1 + len(special)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if token < self.end_id).decode(errors="replace")

    def serialize(self) -> bytes:
        return _content(self)


class IdsTokenizer(Tokenizer):
    """Ids whose tokenizer is not at hand: nothing can be encoded, and decoding shows the numbers."""

    name = "ids"

    def __init__(self, num_ids: int, end_id: int | None = None, special: Sequence[str] = ()) -> None:
        """Ids below `num_ids`; `end_id` is one of them, or one more (None)."""
        own_end = 1 if end_id is None else 0
        self.num_ids = num_ids  # without those added here
        self.end_id = num_ids if end_id is None else end_id
        self.special = _numbered(special, num_ids + own_end)
        self.vocab_size = num_ids + own_end + len(special)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        raise DataError(
            "tokenizer=ids knows no text, only ids: name the tokenizer that the ids were made with, "
            "such as tokenizer=huggingface tokenizer.path=..."
        )

    def decode(self, ids: Iterable[int]) -> str:
        hidden = {self.end_id, *self.special.values()}
        return " ".join(str(int(token)) for token in ids if token not in hidden)

    def serialize(self) -> bytes:
        num_ids = self.vocab_size - len(self.special)
        return _content(self, vocab_size=num_ids, end_id=self.end_id)


def load_elementary(content: bytes) -> Tokenizer:
    """The tokenizer whose `serialize` gave `content`. Raises DataError for anything else."""
    try:
        values = json.loads(content)
    except ValueError as error:
        raise DataError(str(error)) from error
    special = values.get("special", [])
    if isinstance(special, list) and all(name in SPECIAL for name in special):
        match values:
            case {"tokenizer": "char", "characters": str(characters)} if characters:
                return CharTokenizer(characters, special)
            case {"tokenizer": "byte"}:
                return ByteTokenizer(special)
            case {"tokenizer": "ids", "vocab_size": int(size), "end_id": int(end_id)} if 0 <= end_id < size:
                return IdsTokenizer(size, end_id, special)
    raise DataError("there is no tokenizer in it")


def _content(tokenizer: Tokenizer, **values: str | int) -> bytes:
    special = {"special": list(tokenizer.special)} if tokenizer.special else {}
    return json.dumps({"tokenizer": tokenizer.name} | values | special).encode()


def _numbered(special: Sequence[str], first: int) -> dict[str, int]:
    return {name: first + number for number, name in enumerate(special)}


def _code_points(text: str) -> NDArray[np.uint32]:
    # "surrogatepass": a lone surrogate is no character of any text and is refused as an unknown one.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
