"""Text ↔ token ids: SentencePiece, Hugging Face, characters, bytes, ids; trained, given, or loaded from one file.

Every tokenizer trained here gives back exactly the text it was given. Owns the format of `tokenizer.model`: a
SentencePiece model, a Hugging Face tokenizer.json, or a JSON object of our own. Reads no corpora and splits none.
"""

from __future__ import annotations

from lmtrain.data.tokenizer.building import load_tokenizer, load_tokenizer_bytes, tokenizer_file, train_tokenizer
from lmtrain.data.tokenizer.elementary import ByteTokenizer, CharTokenizer, IdsTokenizer
from lmtrain.data.tokenizer.huggingface import HuggingFaceTokenizer
from lmtrain.data.tokenizer.interface import (
    ASSISTANT,
    PAD,
    SPECIAL,
    SYSTEM,
    TOOL,
    TURN_END,
    USER,
    Tokenizer,
    token_dtype,
)
from lmtrain.data.tokenizer.sample import TextSample, sample_for
from lmtrain.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from lmtrain.data.tokenizer.to_huggingface import huggingface_files

__all__ = [
    "ASSISTANT",
    "PAD",
    "SPECIAL",
    "SYSTEM",
    "TOOL",
    "TURN_END",
    "USER",
    "ByteTokenizer",
    "CharTokenizer",
    "HuggingFaceTokenizer",
    "IdsTokenizer",
    "SentencePieceTokenizer",
    "TextSample",
    "Tokenizer",
    "huggingface_files",
    "load_tokenizer",
    "load_tokenizer_bytes",
    "sample_for",
    "token_dtype",
    "tokenizer_file",
    "train_tokenizer",
]
