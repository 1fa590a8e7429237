"""Rotary positions, grouped heads and the cache of keys and values, each by the property that defines it."""

from __future__ import annotations

import math

import pytest
import torch

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.attention import SelfAttention
from lmtrain.model.cache import KeyValueCache
from lmtrain.model.positions import RotaryTable, rotate

SEQ_LEN = 16


def attention(num_kv_heads: int | None = None, qk_norm: bool = False) -> SelfAttention:
    config = DecoderConfig(d_model=32, num_layers=1, num_heads=4, num_kv_heads=num_kv_heads, qk_norm=qk_norm)
    layer = SelfAttention(config, dropout=0.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def cache_of(layer: SelfAttention, batch_size: int) -> KeyValueCache:
    shape = (layer.num_kv_heads, layer.head_dim)
    return KeyValueCache(num_layers=1, head_shape=shape, batch_size=batch_size, capacity=SEQ_LEN, like=layer.qkv.weight)


def test_rotary_angles_by_hand() -> None:
    cos, sin = RotaryTable(4, seq_len=3, theta=100.0)(0, 3)  # frequencies 1 and 1/10
    torch.testing.assert_close(cos[2, 0], torch.tensor([2.0, 0.2, 2.0, 0.2]).cos())
    torch.testing.assert_close(sin[2, 0], torch.tensor([-2.0, -0.2, 2.0, 0.2]).sin())
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4), (cos[2:], sin[2:])).flatten()
    expected = [math.cos(2), -math.sin(0.2), math.sin(2), math.cos(0.2)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_rotated_products_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    table = RotaryTable(8, seq_len=SEQ_LEN, theta=10000.0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query_position: int, key_position: int) -> float:
        return float((rotate(q, table(query_position, 1)) * rotate(k, table(key_position, 1))).sum())

    assert score(5, 2) == pytest.approx(score(12, 9), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


def test_rotation_keeps_lengths_and_the_number_format() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, SEQ_LEN, 3, 8)
    rotation = RotaryTable(8, seq_len=SEQ_LEN, theta=10000.0)(0, SEQ_LEN)
    torch.testing.assert_close(rotate(x, rotation).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), rotation).dtype == torch.bfloat16


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_grouped_heads_equal_full_heads_with_copied_keys_and_values(num_kv_heads: int) -> None:
    torch.manual_seed(0)
    grouped, full = attention(num_kv_heads), attention()
    q, k, v = grouped.qkv.weight.split([32, num_kv_heads * 8, num_kv_heads * 8])
    copies = 4 // num_kv_heads
    k, v = (w.view(num_kv_heads, 8, 32).repeat_interleave(copies, 0).flatten(0, 1) for w in (k, v))
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([q, k, v]))
        full.output.weight.copy_(grouped.output.weight)
    x_BTD = torch.randn(2, SEQ_LEN, 32)
    torch.testing.assert_close(grouped(x_BTD), full(x_BTD), atol=1e-5, rtol=1e-5)


def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant() -> None:
    torch.manual_seed(0)
    layer = attention(qk_norm=True)
    x_BTD = torch.randn(2, SEQ_LEN, 32)
    before_BTD = layer(x_BTD)
    with torch.no_grad():
        layer.qkv.weight[:64] *= 5  # queries and keys
    torch.testing.assert_close(layer(x_BTD), before_BTD, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_token_by_token_with_a_cache_equals_all_at_once(num_kv_heads: int | None) -> None:
    torch.manual_seed(0)
    layer = attention(num_kv_heads, qk_norm=True)
    x_BTD = torch.randn(2, SEQ_LEN, 32)
    table = RotaryTable(8, seq_len=SEQ_LEN, theta=10000.0)
    cache = cache_of(layer, batch_size=2)
    with torch.no_grad():
        expected_BTD = layer(x_BTD, table(0, SEQ_LEN))
        parts = [layer(x_BTD[:, :5], table(0, 5), cache.layers[0])]
        cache.advance(5)
        for t in range(5, SEQ_LEN):
            parts.append(layer(x_BTD[:, t : t + 1], table(t, 1), cache.layers[0]))
            cache.advance(1)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTD, atol=1e-5, rtol=1e-5)
    assert cache.longest == SEQ_LEN


def test_a_filled_cache_refuses_several_tokens() -> None:
    layer = attention()
    cache = cache_of(layer, batch_size=1)
    layer(torch.randn(1, 3, 32), None, cache.layers[0])
    cache.advance(3)
    with pytest.raises(AssertionError, match="one token"):
        layer(torch.randn(1, 2, 32), None, cache.layers[0])
