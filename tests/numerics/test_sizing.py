"""The size formulas against built models and against PyTorch's own count of operations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.building import build_model
from lmtrain.model.sizing import count_parameters, flops_per_token

VOCAB_SIZE, SEQ_LEN = 100, 32


def config(**settings: Any) -> DecoderConfig:
    return DecoderConfig(**({"d_model": 64, "num_layers": 3, "num_heads": 4} | settings))


def test_parameters_equal_the_built_model_for_every_choice() -> None:
    choices = itertools.product(
        ("rotary", "learned"), ("swiglu", "relu2"), (None, 2, 1), (True, False), (None, 96), (True, False)
    )
    for position, activation, num_kv_heads, tied, d_ff, qk_norm in choices:
        chosen = config(
            position=position,
            activation=activation,
            num_kv_heads=num_kv_heads,
            tie_embeddings=tied,
            d_ff=d_ff,
            qk_norm=qk_norm,
        )
        with torch.device("meta"):
            model = build_model(chosen, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)
        built = sum(parameter.numel() for parameter in model.parameters())
        assert count_parameters(chosen, VOCAB_SIZE, SEQ_LEN).total == built, chosen


def test_parameters_by_part_equal_the_modules() -> None:
    chosen = config(position="learned", tie_embeddings=False, norm="layernorm")
    model = build_model(chosen, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)
    count = count_parameters(chosen, VOCAB_SIZE, SEQ_LEN)

    def built(part: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if part in f".{name}")

    assert count.embedding == built(".embedding.") + built(".position.")
    assert count.attention == built(".attention.")
    assert count.feed_forward == built(".feed_forward.")
    assert count.norm == built("norm.")
    assert count.head == built(".head.")


@pytest.mark.parametrize("tied", [True, False])
def test_flops_equal_what_the_operations_of_a_step_add_up_to(tied: bool) -> None:
    chosen = config(num_kv_heads=2, tie_embeddings=tied)
    model = build_model(chosen, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)
    tokens_BT = torch.randint(VOCAB_SIZE, (2, SEQ_LEN))
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT).sum().backward()
    # The counter knows the matrix products but no causal mask: the attention kernel's share is put by hand.
    products = counter.get_flop_counts()["Global"]
    counted = sum(flops for op, flops in products.items() if "attention" not in str(op)) / tokens_BT.numel()
    attention = 12 * chosen.num_layers * chosen.d_model * (SEQ_LEN + 1) / 2
    assert flops_per_token(chosen, VOCAB_SIZE, SEQ_LEN) == counted + attention


def test_flops_by_hand() -> None:
    """One layer, width 2: q, k, v and output 16 weights, feed-forward 4 · 2 · 2 = 16, logits 3 · 2 = 6."""
    tiny = DecoderConfig(d_model=2, num_layers=1, num_heads=1, d_ff=4, activation="gelu")
    # 6 · 38 for the weights; 3 keys a query on average in a context of 5: 12 · 1 · 2 · 3.
    assert flops_per_token(tiny, vocab_size=3, seq_len=5) == 6 * 38 + 72
