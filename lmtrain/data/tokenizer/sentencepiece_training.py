"""Training of SentencePiece models that give back every text they accept."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import sentencepiece

from lmtrain.config.schema import SentencePieceBpeConfig, SentencePieceConfig
from lmtrain.data.tokenizer.sentencepiece_conversion import SPACE_MARK
from lmtrain.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from lmtrain.errors import DataError

# Characters that SentencePiece uses itself while it trains; they get no piece.
_NO_PIECE = set(f"\0 \x1f\u2585{SPACE_MARK}")


def train_sentencepiece(
    config: SentencePieceConfig, lines: Sequence[str], characters: str, special: Sequence[str]
) -> SentencePieceTokenizer:
    """Train with settings that keep every character as it is (checked in test_tokenizer.py).

    Without byte fallback and at a coverage of 1, all of `characters` get a piece. Raises DataError if the text does not
    allow the vocabulary asked for.
    """
    if not lines:
        raise DataError("there is no text to train a tokenizer on; name a given one, or use tokenizer=byte")
    # A line end is never merged, so text can be encoded line by line.
    symbols = list(dict.fromkeys(["\n", *(symbol.replace(" ", SPACE_MARK) for symbol in config.user_symbols)]))
    optional: dict[str, Any] = {}
    if special:
        optional["control_symbols"] = list(special)
    if not config.byte_fallback and config.character_coverage == 1:
        optional["required_chars"] = "".join(sorted(set(characters) - _NO_PIECE - set(symbols)))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe" if isinstance(config, SentencePieceBpeConfig) else "unigram",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=config.byte_fallback,
            split_digits=True,
            user_defined_symbols=symbols,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,  # nothing on the console; errors are raised
            **optional,
        )
    except RuntimeError as error:
        raise _vocabulary_error(config, str(error)) from error
    return SentencePieceTokenizer(model.getvalue())


def _vocabulary_error(config: SentencePieceConfig, message: str) -> DataError:
    """Say in our terms what SentencePiece refused."""
    asked = f"tokenizer.vocab_size={config.vocab_size}"
    if found := re.search(r"set it to a value <= (\d+)", message):
        largest, least = int(found[1]), 300 if config.byte_fallback else 10
        remedy = f"tokenizer.vocab_size={largest}" if largest >= least else "tokenizer=byte or tokenizer=char"
        return DataError(f"{asked} is larger than the training text allows ({largest}); use {remedy}")
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        needs = "characters and bytes" if config.byte_fallback else "characters"
        return DataError(
            f"{asked} is too small for the {found[1]} {needs} of the training text; "
            f"use tokenizer.vocab_size={found[1]} or more, or a lower tokenizer.character_coverage"
        )
    return DataError(f"SentencePiece cannot train on this text with {asked}: {message}")
