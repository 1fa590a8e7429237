"""How large a model is and what a token costs, by formula: no tensors, no torch.

Memory and time, which depend on batch and hardware, are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmtrain.config.schema import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by what they are for."""

    embedding: int  # token table, and learned positions
    attention: int
    feed_forward: int
    norm: int
    head: int  # 0 when it shares the token table

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.feed_forward + self.norm + self.head


def count_parameters(config: DecoderConfig, vocab_size: int, seq_len: int) -> ParameterCount:
    """The parameters of the model `build_model` makes, tied weights counted once."""
    width, layers = config.d_model, config.num_layers
    positions = seq_len if config.position == "learned" else 0
    qkv_width = (config.num_heads + 2 * config.kv_heads) * config.head_dim
    feed_forward_matrices = 3 if config.gated else 2
    return ParameterCount(
        embedding=(vocab_size + positions) * width,
        attention=layers * width * (qkv_width + width),
        feed_forward=layers * feed_forward_matrices * width * config.hidden_dim,
        norm=(2 * layers + 1) * width,
        head=0 if config.tie_embeddings else vocab_size * width,
    )


def flops_per_token(config: DecoderConfig, vocab_size: int, seq_len: int) -> int:
    """Floating-point operations of training on one token, forward and backward, without recomputation.

    6 N + 12 L D K after Chowdhery et al. (PaLM, arXiv:2204.02311, appendix B), where N are the weights used
    in matrix products (so the logits, tied or not, but neither embeddings nor norms), L is the number of
    layers, D is d_model and K the keys a query meets. Only what the causal mask leaves is counted: K is
    (seq_len + 1) / 2 on average, where PaLM takes seq_len.
    """
    count = count_parameters(config, vocab_size, seq_len)
    matmul_weights = count.attention + count.feed_forward + vocab_size * config.d_model
    return 6 * matmul_weights + 6 * config.num_layers * config.d_model * (seq_len + 1)
