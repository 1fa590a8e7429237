"""Text ↔ token ids: SentencePiece BPE, characters and bytes, trained or loaded from one file.

Every tokenizer gives back exactly the text it was given. Owns the format of `tokenizer.model`: a
SentencePiece model, or JSON for characters and bytes. Does not read corpora and does not split them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from lmtrain.config.schema import ByteConfig, CharConfig, SentencePieceBpeConfig, TokenizerConfig
from lmtrain.data.documents import TokenArray
from lmtrain.errors import DataError

# SentencePiece writes a space as U+2581 inside; that character itself is spelt by its bytes to survive.
_SPACE_MARK = "\u2581"
# Threads share a text in blocks of this many characters; one ends where a line ends, so ids do not change.
_BLOCK_CHARS = 1 << 16
# SentencePiece leaves training lines of more than 4,192 bytes out; a character has at most four.
_MAX_LINE_CHARS = 1000


class Tokenizer(Protocol):
    """What every tokenizer does. `end_id` follows a whole document and decodes to nothing."""

    name: str
    vocab_size: int
    end_id: int

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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback, as `train_tokenizer` makes it; DataError if damaged."""

    name = "sentencepiece_bpe"

    def __init__(self, model: bytes) -> None:
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError("the tokenizer is not a SentencePiece model, or damaged") from error
        self.vocab_size = self._processor.get_piece_size()
        self.end_id = self._processor.eos_id()
        self._mark_ids = np.array(
            [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()],
            token_dtype(self.vocab_size),
        )
        if self.end_id < 0 or len(set(self._mark_ids)) != len(self._mark_ids):
            raise DataError("the SentencePiece model has no end token or no byte pieces, or is damaged")

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """See `Tokenizer`; uses all cores."""
        blocks_by_text = [list(_blocks(text)) for text in texts]
        plain = [_utf8(block) for blocks in blocks_by_text for block in blocks if block != _SPACE_MARK]
        encoded = iter(self._processor.encode(plain, return_type="numpy"))
        dtype = token_dtype(self.vocab_size)
        return [
            np.concatenate(
                [self._mark_ids if block == _SPACE_MARK else next(encoded).astype(dtype) for block in blocks]
            )
            for blocks in blocks_by_text
        ]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def serialize(self) -> bytes:
        return self._model


class CharTokenizer(Tokenizer):
    """One id a character of `characters`, in their order, and one for the end."""

    name = "char"

    def __init__(self, characters: str) -> None:
        self.vocab_size = len(characters) + 1
        self.end_id = len(characters)
        self._characters = characters
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
        codes: NDArray[np.uint32] = self._codes[tokens[tokens != self.end_id]]
        return codes.tobytes().decode("utf-32-le")

    def serialize(self) -> bytes:
        return json.dumps({"tokenizer": self.name, "characters": self._characters}).encode()


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 and one id for the end."""

    name = "byte"
    vocab_size = 257
    end_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        return [np.frombuffer(_utf8(text), np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if token != self.end_id).decode(errors="replace")

    def serialize(self) -> bytes:
        return json.dumps({"tokenizer": self.name}).encode()


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type of the two that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote. Raises DataError if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    try:
        if not content.startswith(b"{"):
            return SentencePieceTokenizer(content)
        match json.loads(content):
            case {"tokenizer": "char", "characters": str(characters)} if characters:
                return CharTokenizer(characters)
            case {"tokenizer": "byte"}:
                return ByteTokenizer()
    except (DataError, ValueError) as error:
        raise DataError(f"{path} is damaged, or no tokenizer: {error}") from error
    raise DataError(f"{path} is damaged, or no tokenizer")


def train_tokenizer(config: TokenizerConfig, documents: Iterable[str]) -> Tokenizer:
    """Make the tokenizer that `config` names; the same documents always give the same one.

    A char tokenizer needs every document, as it can spell no other character; a byte tokenizer reads none.
    Raises DataError if the text does not allow the vocabulary asked for.
    """
    match config:
        case SentencePieceBpeConfig():
            return _train_sentencepiece(config, documents)
        case CharConfig():
            characters: set[str] = set()
            for text in documents:
                characters.update(text)
            return CharTokenizer("".join(sorted(characters)))
        case ByteConfig():
            return ByteTokenizer()
    raise TypeError(f"no tokenizer for {type(config).__name__}")


def _train_sentencepiece(config: SentencePieceBpeConfig, documents: Iterable[str]) -> Tokenizer:
    """Train with settings that keep every character as it is (checked in test_tokenizer.py)."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample_lines(documents, config.sample_bytes)),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],  # never merged, so lines can be encoded apart
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,  # nothing on the console; errors are raised
        )
    except RuntimeError as error:
        raise _vocabulary_error(config, str(error)) from error
    return SentencePieceTokenizer(model.getvalue())


def _vocabulary_error(config: SentencePieceBpeConfig, message: str) -> DataError:
    """Say in our terms what SentencePiece refused."""
    asked = f"tokenizer.vocab_size={config.vocab_size}"
    if found := re.search(r"set it to a value <= (\d+)", message):
        largest = int(found[1])
        remedy = f"tokenizer.vocab_size={largest}" if largest >= 300 else "tokenizer=byte or tokenizer=char"
        return DataError(f"{asked} is larger than the training text allows ({largest}); use {remedy}")
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"{asked} is too small for the {found[1]} characters and bytes of the training text; "
            f"use tokenizer.vocab_size={found[1]} or more, or a lower tokenizer.character_coverage"
        )
    return DataError(f"SentencePiece cannot train on this text with {asked}: {message}")


def _sample_lines(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """Lines spread evenly over the documents, together at most `sample_bytes` of UTF-8.

    Keeps every line at first; whenever there are too many, every second kept line is dropped and the stride
    doubled. So one pass and a bounded memory do for a corpus of any size.
    """
    kept: list[str] = []
    num_bytes, stride = 0, 1
    for number, line in enumerate(line for text in documents for line in _short_lines(text)):
        if number % stride:
            continue
        kept.append(line)
        num_bytes += len(line.encode())
        while num_bytes > sample_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            num_bytes = sum(len(line.encode()) for line in kept)
    return kept


def _short_lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, len(line), _MAX_LINE_CHARS):
            yield line[start : start + _MAX_LINE_CHARS]


def _blocks(text: str) -> Iterator[str]:
    """Cut `text` after line ends into blocks of about _BLOCK_CHARS, and around each _SPACE_MARK."""
    for part in re.split(f"({_SPACE_MARK})", text):
        start = 0
        while len(part) - start > _BLOCK_CHARS:
            end = part.rfind("\n", start, start + _BLOCK_CHARS) + 1
            end = end or part.find("\n", start + _BLOCK_CHARS) + 1 or len(part)
            yield part[start:end]
            start = end
        yield part[start:]


def _code_points(text: str) -> NDArray[np.uint32]:
    # "surrogatepass": a lone surrogate is no character of any text and is refused as an unknown one.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds {text[error.start]!r}, which is no Unicode character (input that was not UTF-8?)"
        ) from error
