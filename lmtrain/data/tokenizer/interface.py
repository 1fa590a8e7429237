"""What every tokenizer does, and the names of the special tokens. Trains and reads nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lmtrain.data.documents import TokenArray
from lmtrain.errors import DataError

PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
TOOL = "<|tool|>"
TURN_END = "<|turn_end|>"

SPECIAL = (PAD, SYSTEM, USER, ASSISTANT, TOOL, TURN_END)
"""Tokens that a vocabulary has only if they were asked for. The end of a document is `Tokenizer.end_id`."""


class Tokenizer(Protocol):
    """What every tokenizer does.

    `end_id` follows a whole document. It and the special tokens never come out of encoding, even where a text holds
    their names, and decode to nothing.
    """

    vocab_size: int
    end_id: int
    special: Mapping[str, int]  # name → id, of those in SPECIAL that it has

    @property
    def name(self) -> str:
        """The kind of tokenizer."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """One array of ids a text, of type `token_dtype(vocab_size)`; DataError for what has no id."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...

    def serialize(self) -> bytes:
        """The content of `tokenizer.model`."""
        ...

    def encode(self, text: str) -> TokenArray:
        """The ids of one text, without `end_id`."""
        return self.encode_batch([text])[0]

    def save(self, path: Path) -> None:
        """Write the one file `load_tokenizer` reads."""
        path.write_bytes(self.serialize())

    @property
    def fingerprint(self) -> str:
        """The sha256 of what `save` writes."""
        return hashlib.sha256(self.serialize()).hexdigest()


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type of the two that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def utf8(text: str) -> bytes:
    """The bytes of a text. Raises DataError for a lone surrogate, which is no character of any text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds {text[error.start]!r}, which is no Unicode character (input that was not UTF-8?)"
        ) from error
