"""Decoders whose weights are random and large enough that each of them shows in the logits."""

from __future__ import annotations

from typing import Any

import torch

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.decoder import Decoder

VOCAB_SIZE = 97
LLAMA: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 4}
GPT2: dict[str, Any] = {**LLAMA, "norm": "layernorm", "position": "learned", "activation": "gelu_tanh", "bias": True}

EXPORTABLE: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "grouped, untied": {**LLAMA, "num_kv_heads": 2, "tie_embeddings": False},
    "one key head, narrow": {**LLAMA, "num_kv_heads": 1, "d_ff": 20, "norm_eps": 1e-5},
    "geglu, biased": {**LLAMA, "activation": "geglu", "bias": True, "num_kv_heads": 2},
    "linear": {**LLAMA, "rope_scaling": "linear", "rope_factor": 3.0},
    "ntk": {**LLAMA, "rope_scaling": "ntk", "rope_factor": 4.0, "rope_theta": 5000.0},
    "gpt2": GPT2,
    "exact gelu, no bias": {**GPT2, "activation": "gelu", "bias": False},
    "relu2, untied, narrow": {**GPT2, "activation": "relu2", "tie_embeddings": False, "d_ff": 20, "norm_eps": 1e-5},
}
"""Settings of models that one of the formats of transformers holds."""


def random_decoder(settings: dict[str, Any], *, seq_len: int = 64, vocab_size: int = VOCAB_SIZE) -> Decoder:
    """Nothing is zero, gains are not one; logits have a standard deviation of a few."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**settings), vocab_size=vocab_size, seq_len=seq_len, dropout=0.0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=float(name.endswith("weight")), std=0.3)
            else:
                table = name.startswith(("embedding", "position"))
                parameter.normal_(std=0.6 if table else 1.5 * parameter.size(1) ** -0.5)
    return model
