"""Every kind of tokenizer, and texts that are hard for them."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st
from small_tokenizers import (
    foreign_huggingface,
    foreign_sentencepiece,
    sample_text,
    train_bpe,
    train_unigram,
    written,
)

from lmtrain.config.schema import ByteConfig, CharConfig, HuggingFaceConfig, SentencePieceModelConfig
from lmtrain.data.tokenizer import SPECIAL, Tokenizer, train_tokenizer

TRICKY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n \n\t\t\n",
    "line\r\nline\rline\n",
    "▁",
    "▁▁ ▁ a▁b ▁\n▁",
    "<s></s><unk><pad><0x0A><|endoftext|>",
    "".join(SPECIAL) + "<|user|> <|pad|>\n<|user|",
    "\u2047 \u2585 \ufeff \u200b \u00ad \u2028 \u0085 \u3000 \ufffd",
    "e\u0301 é \ufb01 ﬀ ① ａ",
    "日本語 👩‍👩‍👧 𝔘𝔫𝔦 العربية",
    "".join(map(chr, range(1, 256))),
    "\0",
    "a\0" + "\0" * 40,
    "0123456789 12.5e-7",
    "x" * 5_000,
    " " * 5_000,
    "中文没有空格" * 100,
]
LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n\t\r"  # what "of letters" tokenizers know


def given_model(special: Sequence[str], **settings: object) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "a.model", foreign_sentencepiece(**settings))
        return train_tokenizer(SentencePieceModelConfig(path=path), [], "", special)


def given_huggingface(special: Sequence[str]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "tokenizer.json", foreign_huggingface())
        return train_tokenizer(HuggingFaceConfig(path=path), [], "", special)


@dataclass(frozen=True)
class Kind:
    """A tokenizer to be made with some special tokens, and the characters it knows (None: all)."""

    name: str
    make: Callable[[Sequence[str]], Tokenizer]
    characters: str | None = None

    @property
    def texts(self) -> st.SearchStrategy[str]:
        known = st.characters(codec="utf-8") if self.characters is None else st.sampled_from(self.characters)
        tricky = [text for text in (*TRICKY, "▁", " ", "  ", "\n", "the", " fox") if self.knows(text)]
        return st.lists(st.text(known, max_size=20) | st.sampled_from(tricky), max_size=8).map("".join)

    def knows(self, text: str) -> bool:
        return self.characters is None or set(text) <= set(self.characters)


OWN_TEXT = sample_text() + LETTERS
KINDS = [
    Kind("bpe", lambda special: train_bpe(sample_text(), special=special)),
    Kind(
        "bpe of symbols", lambda s: train_bpe(OWN_TEXT, vocab_size=380, special=s, user_symbols=["<b>", "a b", "\n\n"])
    ),
    Kind(
        "bpe of letters",
        lambda special: train_bpe(OWN_TEXT, vocab_size=160, byte_fallback=False, character_coverage=1, special=special),
        LETTERS,
    ),
    Kind("unigram", lambda special: train_unigram(sample_text(), special=special)),
    Kind(
        "unigram of letters",
        lambda s: train_unigram(OWN_TEXT, vocab_size=130, byte_fallback=False, character_coverage=1, special=s),
        LETTERS,
    ),
    Kind("given bpe", given_model),
    Kind("given unigram", lambda special: given_model(special, model_type="unigram")),
    Kind("huggingface", given_huggingface),
    Kind("char", lambda s: train_tokenizer(CharConfig(), [], "".join(sorted(set(LETTERS + "é𝔘"))), s), LETTERS + "é𝔘"),
    Kind("byte", lambda special: train_tokenizer(ByteConfig(), [], "", special)),
]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])


@cache
def make(kind: Kind, special: Sequence[str] = ()) -> Tokenizer:
    return kind.make(special)
