"""The cache of keys and values: its bookkeeping by hand, rows of different lengths against each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.attend import EVERYTHING
from lmtrain.model.building import build_model
from lmtrain.model.cache import KeyValueCache
from lmtrain.model.decoder import Decoder

LENGTHS = (3, 1, 6, 6)


def decoder(**settings: Any) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(**({"d_model": 32, "num_layers": 2, "num_heads": 4, "init_std": 0.3} | settings))
    return build_model(config, vocab_size=20, seq_len=12, dropout=0.0).eval()


def filled(model: Decoder, tokens_BT: torch.Tensor, lengths: tuple[int, ...] = LENGTHS) -> KeyValueCache:
    cache = model.new_cache(len(lengths))
    model.read(tokens_BT[:, : max(lengths)], cache)
    cache.truncate(lengths)
    return cache


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"num_kv_heads": 2, "qk_norm": True}, {"num_kv_heads": 1}, {"position": "learned"}]
)
def test_rows_of_different_lengths_get_the_logits_they_get_alone(settings: dict[str, Any]) -> None:
    model, tokens_BT = decoder(**settings), torch.randint(20, (4, 10))
    cache = filled(model, tokens_BT)
    for step in range(4):
        next_B1 = torch.stack([tokens_BT[row, length + step] for row, length in enumerate(LENGTHS)]).unsqueeze(1)
        logits_B1V = model(next_B1, cache)
        for row, length in enumerate(LENGTHS):
            alone_V = model(tokens_BT[row : row + 1, : length + step + 1])[0, -1]
            torch.testing.assert_close(logits_B1V[row, 0], alone_V, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_can_leave_and_be_replaced() -> None:
    model, tokens_BT = decoder(num_kv_heads=2), torch.randint(20, (4, 10))
    cache = filled(model, tokens_BT)
    cache.keep([3, 0])  # with 6 and 3 tokens
    other_BT = torch.randint(20, (1, 4))
    cache.replace([0], filled(model, other_BT, (4,)))
    logits_B1V = model(torch.tensor([[7], [8]]), cache)
    expected = [torch.cat([other_BT[0], torch.tensor([7])]), torch.cat([tokens_BT[0, :3], torch.tensor([8])])]
    for row, alone_T in enumerate(expected):
        torch.testing.assert_close(logits_B1V[row, 0], model(alone_T[None])[0, -1], atol=1e-5, rtol=1e-5)


def test_what_a_row_sees_by_hand() -> None:
    cache = decoder().new_cache(3)
    cache.advance(4)
    assert (cache.start, cache.longest) == (4, 4)
    assert cache.visible() == EVERYTHING  # rows that agree need no mask
    cache.truncate([2, 0, 3])
    assert seen(cache) == [[[1, 1, 1, 0]], [[1, 0, 0, 0]], [[1, 1, 1, 1]]]
    cache.keep([1, 0])
    cache.advance(1)
    assert torch.equal(torch.as_tensor(cache.start), torch.tensor([1, 3]))
    cache.keep([1])
    assert cache.start == 3
    assert cache.visible() == EVERYTHING
    assert seen(cache, window=2) == [[[0, 0, 1, 1]]]
    assert cache.visible(window=4) == EVERYTHING


def seen(cache: KeyValueCache, window: int | None = None) -> list[list[list[int]]]:
    mask = cache.visible(window).mask
    assert mask is not None
    return [[list(map(int, query)) for query in row] for row in mask.tolist()]


def test_only_heads_of_keys_and_values_take_room() -> None:
    cache = decoder(num_kv_heads=1).new_cache(batch_size=3, capacity=5)
    assert [layer.keys_BKTC.shape for layer in cache.layers] == [(3, 1, 5, 8)] * 2
    assert cache.layers[0].values_BKTC.shape == (3, 1, 5, 8)


@torch.no_grad()
def test_a_full_cache_takes_no_more() -> None:
    model = decoder()
    cache = model.new_cache(1, capacity=4)
    model.read(torch.zeros((1, 4), dtype=torch.int64), cache)
    with pytest.raises(AssertionError, match="5 tokens exceed the cache's 4"):
        model(torch.zeros((1, 1), dtype=torch.int64), cache)
