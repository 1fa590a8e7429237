"""Small tokenizers of every kind, made once for all tests."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as schema
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmtrain.config.schema import SentencePieceBpeConfig, SentencePieceUnigramConfig
from lmtrain.data.tokenizer import Tokenizer, sample_for, train_tokenizer

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards mix jolly potions near quiet hills".split()  # noqa: SIM905
)


def sample_text(num_words: int = 2_000) -> str:
    generator = random.Random(0)
    separators = [" "] * 12 + ["\n", "\n    ", ", ", "  ", "\n\n"]
    return "".join(generator.choice(WORDS) + generator.choice(separators) for _ in range(num_words))


def train(
    config: SentencePieceBpeConfig | SentencePieceUnigramConfig, *texts: str, special: Sequence[str] = ()
) -> Tokenizer:
    """Train as preparing does."""
    sample = sample_for(config)
    assert sample is not None
    for number, text in enumerate(texts):
        sample.add(text, number)
    return train_tokenizer(config, sample.lines(lambda key: True), sample.characters, special)


def train_bpe(*texts: str, special: Sequence[str] = (), **settings: object) -> Tokenizer:
    return train(SentencePieceBpeConfig(**{"vocab_size": 340} | settings), *texts, special=special)  # type: ignore[arg-type]


def train_unigram(*texts: str, special: Sequence[str] = (), **settings: object) -> Tokenizer:
    return train(SentencePieceUnigramConfig(**{"vocab_size": 320} | settings), *texts, special=special)  # type: ignore[arg-type]


@cache
def foreign_sentencepiece(**settings: object) -> bytes:
    """A SentencePiece model as others train them; by default like those of many open language models."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_text().split("\n")),
        model_writer=model,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "vocab_size": 350,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
        }
        | {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
    )
    return model.getvalue()


def unigram_with(scores: Mapping[str, float], **settings: object) -> bytes:
    """A foreign unigram model with these pieces too."""
    proto = schema.ModelProto.FromString(foreign_sentencepiece(model_type="unigram", **settings))  # type: ignore[attr-defined]
    known = {piece.piece for piece in proto.pieces}
    for text in scores.keys() - known:
        proto.pieces.add(piece=text, score=scores[text], type=proto.SentencePiece.NORMAL)
    model: bytes = proto.SerializeToString()
    return model


def repetitive_unigram() -> bytes:
    """A model with several equally likely ways to split runs: ooo is oo o and o oo."""
    scores = {"oo": -3.84, "ha": -3.16, "haha": -7.36, "ahah": -7.39, "▁▁": -3.09, "▁▁▁": -3.92}
    return unigram_with(scores, add_dummy_prefix=False, user_defined_symbols=("▁▁▁▁",))


@cache
def foreign_huggingface(end_token: str = "<|endoftext|>") -> Library:
    """A byte-level BPE in the manner of GPT-2."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[end_token], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([sample_text()], trainer)
    return library


def written(path: Path, content: bytes | Library) -> str:
    """Write what a given tokenizer is read from."""
    path.write_bytes(content if isinstance(content, bytes) else content.to_str().encode())
    return str(path)
