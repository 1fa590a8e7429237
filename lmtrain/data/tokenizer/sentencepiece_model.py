"""SentencePiece models: text ↔ ids with one of them, and what a model made elsewhere is changed to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import sentencepiece

from lmtrain.data.documents import TokenArray
from lmtrain.data.tokenizer.huggingface import encode_with
from lmtrain.data.tokenizer.interface import SPECIAL, Tokenizer, token_dtype, utf8
from lmtrain.data.tokenizer.sentencepiece_conversion import SPACE_MARK, converted, inexpressible
from lmtrain.data.tokenizer.words import WordEncoder
from lmtrain.errors import DataError

_DAMAGED = "not a SentencePiece model, or damaged"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with an end token; DataError if damaged. Special tokens are its control symbols.

    Models that leave spaces as they are encode word by word (`WordEncoder`), others whole texts. All use one thread:
    processes share the work. Words of unigram models are split by the Hugging Face library, where SentencePiece, whose
    sums are rounded, chooses among equally likely ways by the length of all text before.
    """

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = _processor(model)
        self.vocab_size = self._processor.get_piece_size()
        self.end_id = self._processor.eos_id()
        if self.end_id < 0:
            raise DataError("the SentencePiece model has no end token, or is damaged")
        ids = {name: self._processor.piece_to_id(name) for name in SPECIAL}
        self.special = {name: token for name, token in ids.items() if self._processor.is_control(token)}
        self._dtype = token_dtype(self.vocab_size)
        spelt = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._knows_bytes = all(map(self._processor.is_byte, spelt))
        self._mark_ids: TokenArray = np.array(spelt, self._dtype)

    @property
    def name(self) -> str:
        kind = self.proto.trainer_spec.model_type
        return f"sentencepiece_{self.proto.trainer_spec.ModelType.Name(kind).lower()}"

    @cached_property
    def proto(self) -> Any:
        """The model as a protocol buffer."""
        return _parsed(self._model)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        prefix, encode = self._encoder
        parts: list[bytes] = []
        for text in texts:
            first, *others = text.split(SPACE_MARK)
            parts.append(prefix + utf8(first) if first else b"")
            parts.extend(map(utf8, others))
        encoded = encode(parts)
        if len(parts) == len(texts):
            return encoded
        if not self._knows_bytes:
            raise _unknown(SPACE_MARK)
        following = iter(encoded)
        return [np.concatenate(self._with_marks(text, following)) for text in texts]

    def _with_marks(self, text: str, parts: Iterable[TokenArray]) -> list[TokenArray]:
        parts = iter(parts)
        arrays = [next(parts)]
        for _ in range(text.count(SPACE_MARK)):
            arrays += [self._mark_ids, next(parts)]
        return arrays

    @cached_property
    def _encoder(self) -> tuple[bytes, Callable[[list[bytes]], list[TokenArray]]]:
        """What encodes text, and what comes before each text for it."""
        proto = self.proto
        normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
        prefix = b" " if normalizer.add_dummy_prefix else b""
        if trainer.model_type == trainer.UNIGRAM and not inexpressible(proto):
            library = converted(proto)
            library.normalizer = None  # words are not the beginning of a text
            library.encode_special_tokens = True  # their names are text
            encode = partial(self._by_library, library)
        elif (
            trainer.model_type != trainer.BPE
            or trainer.treat_whitespace_as_suffix
            or normalizer.precompiled_charsmap
            or normalizer.remove_extra_whitespaces
            or not normalizer.escape_whitespaces
        ):
            return b"", partial(self._by_processor, self._processor)
        else:
            processor = self._processor
            if prefix:
                changed = _parsed(self._model)
                changed.normalizer_spec.add_dummy_prefix = False
                processor = _processor(changed.SerializeToString())
            encode = partial(self._by_processor, processor)
        merged = (proto.SentencePiece.NORMAL, proto.SentencePiece.USER_DEFINED, proto.SentencePiece.UNUSED)
        pieces = (utf8(piece.piece.replace(SPACE_MARK, " ")) for piece in proto.pieces if piece.type in merged)
        return prefix, WordEncoder(pieces, encode, self._dtype).encode_batch

    def _by_processor(
        self, processor: sentencepiece.SentencePieceProcessor, texts: Sequence[bytes]
    ) -> list[TokenArray]:
        encoded = processor.encode(list(texts), return_type="numpy", num_threads=1)
        return self._known(texts, [ids.astype(self._dtype) for ids in encoded])

    def _by_library(self, library: Any, texts: Sequence[bytes]) -> list[TokenArray]:
        return self._known(texts, encode_with(library, [text.decode() for text in texts], self._dtype))

    def _known(self, texts: Sequence[bytes], encoded: list[TokenArray]) -> list[TokenArray]:
        """The ids of texts. Raises DataError for a character that has none."""
        if not self._knows_bytes and encoded:
            unknown = self._processor.unk_id()
            if (np.concatenate(encoded) == unknown).any():
                number = next(number for number, ids in enumerate(encoded) if unknown in ids)
                found = self._processor.encode(texts[number].decode(), return_type="offset_mapping")
                raise _unknown(found["pieces"][found["ids"].index(unknown)][0])
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def serialize(self) -> bytes:
        return self._model


def adopt_sentencepiece(model: bytes, special: Sequence[str]) -> SentencePieceTokenizer:
    """A model made elsewhere, with an end token and the `special` ones as control symbols.

    A model that has them is left as it is. Raises DataError if it is none, or damaged.
    """
    proto = _parsed(model)
    wanted = [proto.trainer_spec.eos_piece, *special]
    pieces = {piece.piece: piece for piece in proto.pieces}
    control = proto.SentencePiece.CONTROL
    if all(name in pieces and pieces[name].type == control for name in wanted):
        return SentencePieceTokenizer(model)
    for name in wanted:
        if name in pieces:
            pieces[name].type = control
        else:
            proto.pieces.add(piece=name, score=0.0, type=control)
    return SentencePieceTokenizer(proto.SerializeToString())


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise DataError(_DAMAGED) from error
    return processor


def _parsed(model: bytes) -> Any:
    """The model as a protocol buffer, in which it can be changed."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as schema

    try:
        proto = schema.ModelProto.FromString(model)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise DataError(_DAMAGED) from error
    if not (proto.pieces and proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise DataError(_DAMAGED)
    return proto


def _unknown(character: str) -> DataError:
    return DataError(
        f"the character {character!r} (U+{ord(character):04X}) has no piece in the tokenizer, which spells nothing in "
        "bytes; leave it out, or train a tokenizer with tokenizer.byte_fallback=true or tokenizer.character_coverage=1"
    )
