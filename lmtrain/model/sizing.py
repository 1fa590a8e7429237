"""How large a model is and what a token costs, by formula: no tensors, no torch.

The memory of training, which depends on batch, optimizer and hardware too, is in `training/footprint.py`; time is not
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig, TransformerConfig

Shape = tuple[int, int]
"""Of a matrix, outputs × inputs."""

VOCAB_MULTIPLE = 64
"""A padded vocabulary is one: 128 bytes of numbers in 16 bits, which tensor cores and their memory are made for."""


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by what they are for."""

    embedding: int  # token table, and learned positions
    attention: int  # matrices of the blocks
    feed_forward: int  # ... likewise
    bias: int  # of those matrices
    norm: int
    head: int  # 0 when it shares the token table

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.feed_forward + self.bias + self.norm + self.head


@dataclass(frozen=True, kw_only=True)
class BlockShapes:
    """The matrices of a block. With `model.bias`, each has one of its outputs."""

    attention: tuple[Shape, ...]  # to its own tokens
    to_source: tuple[Shape, ...] = ()  # cross-attention
    feed_forward: tuple[Shape, ...]

    @property
    def matrices(self) -> tuple[Shape, ...]:
        return (*self.attention, *self.to_source, *self.feed_forward)

    @property
    def num_sublayers(self) -> int:
        return 3 if self.to_source else 2


def block_shapes(config: TransformerConfig) -> list[BlockShapes]:
    """Every block, those of an encoder first."""
    width, keys_and_values = config.d_model, 2 * config.kv_heads * config.head_dim
    attention = ((width + keys_and_values, width), (width, width))
    to_source = ((width, width), (keys_and_values, width), (width, width))
    feed_forward = ((config.hidden_dim * (2 if config.gated else 1), width), (width, config.hidden_dim))
    plain = BlockShapes(attention=attention, feed_forward=feed_forward)
    match config:
        case DecoderConfig():
            return [plain] * config.num_layers
        case EncoderDecoderConfig():
            crossing = BlockShapes(attention=attention, to_source=to_source, feed_forward=feed_forward)
            return [plain] * config.num_encoder_layers + [crossing] * config.num_decoder_layers
    raise TypeError(f"no size is known of {type(config).__name__}")


def embedding_shapes(config: TransformerConfig, vocab_size: int, seq_len: int) -> list[Shape]:
    """The table of tokens, and those of learned positions."""
    positions = [(seq_len, config.d_model)] * _num_stacks(config) if config.position == "learned" else []
    return [(vocab_size, config.d_model), *positions]


def _num_stacks(config: TransformerConfig) -> int:
    """Of blocks, each with positions, and with a norm at its end."""
    return 2 if isinstance(config, EncoderDecoderConfig) else 1


def count_parameters(config: TransformerConfig, vocab_size: int, seq_len: int) -> ParameterCount:
    """The parameters of the model `build_model` makes, tied weights counted once."""
    width, blocks = config.d_model, block_shapes(config)
    norms = _num_stacks(config) + sum(block.num_sublayers for block in blocks)
    return ParameterCount(
        embedding=num_weights(embedding_shapes(config, vocab_size, seq_len)),
        attention=sum(num_weights((*block.attention, *block.to_source)) for block in blocks),
        feed_forward=sum(num_weights(block.feed_forward) for block in blocks),
        bias=sum(outputs for block in blocks for outputs, _ in block.matrices) if config.bias else 0,
        norm=norms * width * (2 if config.bias and config.norm == "layernorm" else 1),
        head=0 if config.tie_embeddings else vocab_size * width,
    )


def num_weights(shapes: Iterable[Shape]) -> int:
    """Numbers in these matrices."""
    return sum(outputs * inputs for outputs, inputs in shapes)


def flops_per_token(
    config: TransformerConfig, vocab_size: int, seq_len: int, *, source_len: int | None = None
) -> float:
    """Floating-point operations of training on one token, forward and backward, without recomputation.

    6 N + 12 L D K after Chowdhery et al. (PaLM, arXiv:2204.02311, appendix B), where N are the weights used in matrix
    products (so the logits, tied or not, but neither embeddings nor norms), L is the number of layers, D is d_model
    and K the keys a query meets. PaLM takes seq_len for K; here only what the causal mask and the window leave is
    counted, in the mean over a sequence, as if it were one document.

    Of an encoder–decoder, a token is one of the target. With it are counted its share of the encoder, and of the keys
    and values that the decoder makes of the source, when `source_len` tokens (None: as many) are read for `seq_len`.
    """
    width, blocks, logits = config.d_model, block_shapes(config), vocab_size * config.d_model
    match config:
        case DecoderConfig():
            weights = sum(num_weights(block.matrices) for block in blocks)
            return 6 * (weights + logits) + 12 * len(blocks) * width * mean_keys(seq_len, config.sliding_window)
        case EncoderDecoderConfig():
            sources = seq_len if source_len is None else source_len
            encoder, decoder = blocks[: config.num_encoder_layers], blocks[config.num_encoder_layers :]
            for_sources = sum(6 * num_weights(block.matrices) + 12 * width * sources for block in encoder)
            for_sources += sum(6 * num_weights(block.to_source[1:2]) for block in decoder)  # keys and values
            for_targets = sum(
                6 * num_weights((*block.attention, *block.to_source[::2], *block.feed_forward))
                + 12 * width * (mean_keys(seq_len) + sources)
                for block in decoder
            )
            return for_sources * sources / seq_len + for_targets + 6 * logits
    raise TypeError(f"no size is known of {type(config).__name__}")


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Tokens that a token sees under a causal mask, itself included, in the mean over a sequence."""
    most = min(window or seq_len, seq_len)
    return most * (most + 1) / 2 / seq_len + (seq_len - most) * most / seq_len
