"""From settings to a model with its initial weights."""

from __future__ import annotations

import torch

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig, ModelConfig
from lmtrain.model.decoder import Decoder
from lmtrain.model.encoder_decoder import EncoderDecoder
from lmtrain.model.initialization import initialize

Model = Decoder | EncoderDecoder


def build_model(config: ModelConfig, *, vocab_size: int, seq_len: int, dropout: float) -> Model:
    """The model that the config describes, initialised from PyTorch's global random state.

    Args:
        vocab_size: number of token ids; seq_len: the longest context, in tokens; dropout: one rate for all.

    Under `torch.device("meta")` it takes no memory and no random numbers.
    """
    model: Model
    match config:
        case DecoderConfig():
            model = Decoder(config, vocab_size=vocab_size, seq_len=seq_len, dropout=dropout)
        case EncoderDecoderConfig():
            model = EncoderDecoder(config, vocab_size=vocab_size, seq_len=seq_len, dropout=dropout)
        case _:
            raise TypeError(f"no model is built from {type(config).__name__}")
    with torch.no_grad():
        initialize(model, config)
    return model
