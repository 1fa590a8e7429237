"""Settings of tokenizers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Literal

from lmtrain.config.schema.rules import REQUIRED, require, require_positive

# What SentencePiece and special tokens need themselves.
_RESERVED = re.compile(r"^(<unk>|</s>|<0x[0-9A-F]{2}>|<\|(pad|system|user|assistant|tool|turn_end)\|>)$|[\0\u2581]")


@dataclass(kw_only=True)
class TokenizerConfig:
    """Base of every tokenizer."""

    special_tokens: Literal["auto", "all"] = "auto"
    """What the data need beside the end of a document; or padding and every chat role, for later training."""


@dataclass(kw_only=True)
class SentencePieceConfig(TokenizerConfig):
    """What both kinds of SentencePiece models have in common; trained on the training documents."""

    vocab_size: int = REQUIRED  # pieces, the 256 bytes and special tokens included
    character_coverage: float = 0.9995  # share of characters with a piece; the rest are spelt in bytes
    byte_fallback: bool = True  # spell what has no piece in bytes; without, such text is refused
    user_symbols: list[str] = field(default_factory=list)  # texts that are always one token
    sample_bytes: int = 20_000_000  # train on about this much text

    def __post_init__(self) -> None:
        least = 300 if self.byte_fallback else 10
        why = "256 of them are bytes" if self.byte_fallback else "some are special tokens"
        require(
            self.vocab_size >= least,
            f"tokenizer.vocab_size must be at least {least} ({why}), got {self.vocab_size}",
        )
        require(
            0 < self.character_coverage <= 1,
            f"tokenizer.character_coverage must lie between 0 and 1, got {self.character_coverage}",
        )
        require_positive("tokenizer.", sample_bytes=self.sample_bytes)
        require(all(self.user_symbols), "tokenizer.user_symbols must not hold an empty text")
        for symbol in self.user_symbols:
            require(
                not _RESERVED.search(symbol),
                f"tokenizer.user_symbols must not hold {json.dumps(symbol, ensure_ascii=False)}: names of the "
                "tokenizer's own tokens, U+2581 and NUL cannot be symbols",
            )


@dataclass(kw_only=True)
class SentencePieceBpeConfig(SentencePieceConfig):
    """Byte-pair encoding."""


@dataclass(kw_only=True)
class SentencePieceUnigramConfig(SentencePieceConfig):
    """The most likely pieces under a unigram model."""


@dataclass(kw_only=True)
class SentencePieceModelConfig(TokenizerConfig):
    """A SentencePiece model made elsewhere."""

    path: str = REQUIRED  # a .model file


@dataclass(kw_only=True)
class HuggingFaceConfig(TokenizerConfig):
    """A tokenizer of the Hugging Face tokenizers library."""

    path: str = REQUIRED  # a tokenizer.json, or a folder that holds one
    end_token: str | None = None  # token that ends a document; None: found among the usual names


@dataclass(kw_only=True)
class SavedTokenizerConfig(TokenizerConfig):
    """The tokenizer of a run, of whatever kind, as it is."""

    path: str = REQUIRED  # a tokenizer.model, or the folder that holds one: of a run, or what it was exported to


@dataclass(kw_only=True)
class CharConfig(TokenizerConfig):
    """One token a character that occurs in the text."""


@dataclass(kw_only=True)
class ByteConfig(TokenizerConfig):
    """One token a byte of UTF-8."""


@dataclass(kw_only=True)
class IdsConfig(TokenizerConfig):
    """No text, ids only: for token arrays whose tokenizer is not at hand."""

    vocab_size: int = REQUIRED  # ids are below it
    end_id: int | None = None  # id that ends a document; None: one more than all others

    def __post_init__(self) -> None:
        require_positive("tokenizer.", vocab_size=self.vocab_size)
        require(
            self.end_id is None or 0 <= self.end_id < self.vocab_size,
            f"tokenizer.end_id must lie below tokenizer.vocab_size={self.vocab_size}, got {self.end_id}",
        )
