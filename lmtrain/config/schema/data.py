"""Settings of data sets and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmtrain.config.schema.rules import REQUIRED, require, require_positive


@dataclass(kw_only=True)
class DataConfig:
    """What every data set has in common."""

    seq_len: int = REQUIRED  # tokens a sequence: the context the model is trained at
    val_fraction: float = 0.1  # share of the text kept for validation
    split: Literal["auto", "document", "tail"] = "auto"  # by whole documents, or the end of the text
    min_chars: int = 1  # shorter documents are left out
    max_documents: int | None = None  # use only the first so many; None: all
    cache_dir: str | None = None  # where prepared tokens are kept; None: the user's cache folder

    def __post_init__(self) -> None:
        require_positive("data.", seq_len=self.seq_len, max_documents=self.max_documents)
        require(self.min_chars >= 0, f"data.min_chars must not be negative, got {self.min_chars}")
        require(0 < self.val_fraction < 1, f"data.val_fraction must lie between 0 and 1, got {self.val_fraction}")


@dataclass(kw_only=True)
class PythonStdlibConfig(DataConfig):
    """The source files of this Python's standard library, one document a file."""


@dataclass(kw_only=True)
class TextConfig(DataConfig):
    """UTF-8 text files."""

    path: str = REQUIRED  # a file, a folder (every *.txt in it) or a glob
    document: Literal["file", "paragraph", "line"] = "file"  # what counts as one document


@dataclass(kw_only=True)
class TokenizerConfig:
    """Base of every tokenizer."""


@dataclass(kw_only=True)
class SentencePieceBpeConfig(TokenizerConfig):
    """Byte-pair encoding by SentencePiece, trained on the training documents."""

    vocab_size: int = REQUIRED  # pieces, the 256 bytes and special tokens included
    character_coverage: float = 0.9995  # share of characters with a piece; the rest are spelt in bytes
    sample_bytes: int = 20_000_000  # train on about this much text

    def __post_init__(self) -> None:
        require(
            self.vocab_size >= 300,
            f"tokenizer.vocab_size must be at least 300 (256 of them are bytes), got {self.vocab_size}",
        )
        require(
            0 < self.character_coverage <= 1,
            f"tokenizer.character_coverage must lie between 0 and 1, got {self.character_coverage}",
        )
        require_positive("tokenizer.", sample_bytes=self.sample_bytes)


@dataclass(kw_only=True)
class CharConfig(TokenizerConfig):
    """One token a character that occurs in the text."""


@dataclass(kw_only=True)
class ByteConfig(TokenizerConfig):
    """One token a byte of UTF-8."""
