"""How many tokens there will be, known before any text is read."""

from __future__ import annotations

from lmtrain.config.schema import DataConfig, MixtureConfig, SentencePieceConfig, TokenizerConfig
from lmtrain.data.encoding import special_tokens
from lmtrain.data.tokenizer import sample_for, train_tokenizer

USUAL_CHARACTERS = 100
"""What a tokenizer of characters may come to, as long as its text was not read."""


def vocabulary_size(tokenizer: TokenizerConfig, data: DataConfig) -> int | None:
    """Size of the vocabulary as far as it follows from the settings; None if it follows from the text.

    Reads the file of a tokenizer that is given. Raises DataError if that cannot be used.
    """
    if isinstance(tokenizer, SentencePieceConfig):
        return tokenizer.vocab_size
    if sample_for(tokenizer) is not None:
        return None
    sources = data.sources.values() if isinstance(data, MixtureConfig) else [data]
    special = dict.fromkeys(name for source in sources for name in special_tokens(source))
    return train_tokenizer(tokenizer, [], "", list(special)).vocab_size
