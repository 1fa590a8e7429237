"""The size formulas against built models and against PyTorch's own count of operations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig, TransformerConfig
from lmtrain.model.building import Model, build_model
from lmtrain.model.sizing import block_shapes, count_parameters, flops_per_token, mean_keys

VOCAB_SIZE, SEQ_LEN = 100, 32


def decoder(**settings: Any) -> DecoderConfig:
    return DecoderConfig(**({"d_model": 64, "num_layers": 3, "num_heads": 4} | settings))


def encoder_decoder(**settings: Any) -> EncoderDecoderConfig:
    default = {"d_model": 64, "num_encoder_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    return EncoderDecoderConfig(**(default | settings))


def build(config: TransformerConfig) -> Model:
    return build_model(config, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_parameters_equal_the_built_model_for_every_choice(make: Any) -> None:
    choices = itertools.product(
        ("rotary", "learned", "sinusoidal"),
        (("swiglu", None), ("gelu_tanh", 96)),
        (None, 1),
        (True, False),
        (True, False),
        ("rmsnorm", "layernorm"),
    )
    for position, (activation, d_ff), num_kv_heads, tied, bias, norm in choices:
        config = make(
            position=position,
            activation=activation,
            num_kv_heads=num_kv_heads,
            tie_embeddings=tied,
            d_ff=d_ff,
            bias=bias,
            norm=norm,
            qk_norm=bias,  # which has no parameters
        )
        with torch.device("meta"):
            model = build(config)
        built = sum(parameter.numel() for parameter in model.parameters())
        assert count_parameters(config, VOCAB_SIZE, SEQ_LEN).total == built, config


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_parameters_by_part_equal_the_modules(make: Any) -> None:
    config = make(position="learned", tie_embeddings=False, norm="layernorm", bias=True)
    model = build(config)
    count = count_parameters(config, VOCAB_SIZE, SEQ_LEN)

    def built(part: str, *, ndim: int) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if part in f".{name}" and p.ndim == ndim)

    assert count.embedding == built(".embedding.", ndim=2) + built("position.", ndim=2)
    assert count.attention == built("attention.", ndim=2)
    assert count.feed_forward == built(".feed_forward.", ndim=2)
    assert count.bias == built("attention.", ndim=1) + built(".feed_forward.", ndim=1)
    assert count.norm == built("norm.", ndim=1)
    assert count.head == built(".head.", ndim=2)


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_shapes_are_those_of_the_blocks(make: Any) -> None:
    config = make(num_kv_heads=2, activation="swiglu")
    with torch.device("meta"):
        built = sorted(tuple(matrix.shape) for matrix in build(config).block_matrices())
    assert sorted(shape for block in block_shapes(config) for shape in block.matrices) == built


def counted_products(model: Model, *inputs: torch.Tensor) -> float:
    """Operations of forward and backward by PyTorch's count, but for those of attention kernels."""
    with FlopCounterMode(display=False) as counter:
        context = {"sources_BS": inputs[1]} if len(inputs) > 1 else {}
        model(inputs[0], **context).sum().backward()
    products = counter.get_flop_counts()["Global"]
    return float(sum(flops for op, flops in products.items() if "attention" not in str(op)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("window", "keys"), [(None, (SEQ_LEN + 1) / 2), (8, (36 + 24 * 8) / SEQ_LEN), (99, 16.5)])
def test_flops_equal_what_the_operations_of_a_step_add_up_to(tied: bool, window: int | None, keys: float) -> None:
    config = decoder(num_kv_heads=2, tie_embeddings=tied, bias=True, sliding_window=window)
    tokens_BT = torch.randint(VOCAB_SIZE, (2, SEQ_LEN))
    # The counter knows the matrix products but no mask: the attention kernel's share is put by hand.
    attention = 12 * config.num_layers * config.d_model * keys
    counted = counted_products(build(config), tokens_BT) / tokens_BT.numel() + attention
    assert flops_per_token(config, VOCAB_SIZE, SEQ_LEN) == counted


@pytest.mark.parametrize("source_len", [None, 12])
def test_flops_of_an_encoder_decoder_are_those_of_a_target(source_len: int | None) -> None:
    config = encoder_decoder(num_kv_heads=2)
    sources = source_len or SEQ_LEN
    targets_BT, sources_BS = torch.randint(VOCAB_SIZE, (2, SEQ_LEN)), torch.randint(VOCAB_SIZE, (2, sources))
    # Sources see all of each other, targets all of the source and their own past.
    pairs = 3 * sources * sources + 2 * SEQ_LEN * (sources + (SEQ_LEN + 1) / 2)
    counted = counted_products(build(config), targets_BT, sources_BS) / targets_BT.numel()
    expected = counted + 12 * config.d_model * pairs / SEQ_LEN
    assert flops_per_token(config, VOCAB_SIZE, SEQ_LEN, source_len=source_len) == pytest.approx(expected, rel=1e-12)


def test_flops_by_hand() -> None:
    """One layer, width 2: q, k, v and output 16 weights, feed-forward 4 · 2 · 2 = 16, logits 3 · 2 = 6."""
    tiny = DecoderConfig(d_model=2, num_layers=1, num_heads=1, d_ff=4, activation="gelu")
    # 6 · 38 for the weights; 3 keys a query on average in a context of 5: 12 · 1 · 2 · 3.
    assert flops_per_token(tiny, vocab_size=3, seq_len=5) == 6 * 38 + 72


def test_keys_a_token_sees() -> None:
    for length, window in itertools.product(range(1, 9), (None, 1, 3, 8, 20)):
        seen = [min(place + 1, window or length) for place in range(length)]
        assert mean_keys(length, window) == pytest.approx(sum(seen) / length, rel=1e-12)
