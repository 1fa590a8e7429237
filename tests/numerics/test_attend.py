"""Who sees whom, by hand, and every implementation of attention against the one that is written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig
from lmtrain.model.attend import EVERYTHING, PAST, Visible, attend, attend_naively, chooses_flex, visible_past
from lmtrain.model.building import build_model
from lmtrain.model.positions import places_within_documents

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")
B, H, T, C = 3, 4, 19, 8
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 1 + [2] * 11, [0] * 19, [4] * 3 + [5] * 8 + [9] * 8])
PADDING = torch.arange(T) < torch.tensor([[T], [1], [12]])


def drawn(num_kv_heads: int, length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, length, C), (B, num_kv_heads, T, C), (B, num_kv_heads, T, C))
    q, k, v = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: list[list[list[bool]]]) -> Tensor:
    """One query at a time, in float64, over the keys it sees and no others."""
    groups = q.size(1) // k.size(1)
    output = torch.zeros(q.shape, dtype=torch.float64)
    for row, head, query in itertools.product(range(q.size(0)), range(q.size(1)), range(q.size(2))):
        keys = [key for key, visible in enumerate(seen[row][query]) if visible]
        scores = k[row, head // groups, keys].double() @ q[row, head, query].double() / C**0.5
        output[row, head, query] = scores.softmax(0) @ v[row, head // groups, keys].double()
    return output.float()


def rule(documents: Tensor | None, window: int | None) -> list[list[list[bool]]]:
    def sees(row: int, query: int, key: int) -> bool:
        near = key <= query and (window is None or query - key < window)
        return near and (documents is None or bool(documents[row, query] == documents[row, key]))

    return [[[sees(row, query, key) for key in range(T)] for query in range(T)] for row in range(B)]


PASTS: list[dict[str, Any]] = [
    {},
    {"window": 5},
    {"window": 1},
    {"window": T},
    {"documents_BT": DOCUMENTS},
    {"documents_BT": DOCUMENTS, "window": 4},
]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("past", PASTS, ids=lambda past: " ".join(past) or "causal")
def test_every_implementation_gives_what_is_computed_by_hand(past: dict[str, Any], num_kv_heads: int) -> None:
    q, k, v = drawn(num_kv_heads)
    expected = by_hand(q, k, v, rule(past.get("documents_BT"), past.get("window")))
    visible = visible_past(T, CPU, **past)
    for output in (attend_naively(q, k, v, visible), attend(q, k, v, visible)):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    # FlexAttention has no gradients on a CPU.
    output = attend(q.detach(), k.detach(), v.detach(), visible_past(T, CPU, **past, flex=True))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("past", PASTS, ids=lambda past: " ".join(past) or "causal")
def test_gradients_are_those_of_the_naive_one(past: dict[str, Any], num_kv_heads: int, device: str) -> None:
    inputs = [tensor.detach().to(device).requires_grad_() for tensor in drawn(num_kv_heads)]
    past = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in past.items()}
    weights = torch.randn((B, H, T, C), generator=torch.Generator().manual_seed(1)).to(device)
    outputs = [attend_naively(*inputs, visible_past(T, inputs[0].device, **past))]  # type: ignore[call-arg]
    for flex in (False, *[True] * (device == "cuda")):
        outputs.append(attend(*inputs, visible_past(T, inputs[0].device, **past, flex=flex)))  # type: ignore[call-arg]
    naive, *others = [torch.autograd.grad((output * weights).sum(), inputs) for output in outputs]
    for gradients in others:
        for ours, expected in zip(gradients, naive, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("length", [T, 1])
def test_padded_keys_are_not_seen(num_kv_heads: int, length: int) -> None:
    q, k, v = drawn(num_kv_heads, length)
    visible = Visible(mask=PADDING.unsqueeze(1))
    expected = by_hand(q, k, v, [[row] * length for row in PADDING.tolist()])
    for implementation in ("sdpa", "naive"):
        output = attend(q, k, v, visible, implementation=implementation)  # type: ignore[arg-type]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_all_is_seen_where_nothing_is_said() -> None:
    q, k, v = drawn(2)
    everything = [[[True] * T] * T] * B
    torch.testing.assert_close(attend(q, k, v, EVERYTHING), by_hand(q, k, v, everything), atol=1e-5, rtol=1e-5)


def test_what_is_seen_by_hand() -> None:
    mask = visible_past(5, CPU, documents_BT=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]), window=2).mask
    assert mask is not None
    assert mask.int()[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert mask.int()[1, 4].tolist() == [0, 0, 0, 1, 1]
    assert visible_past(5, CPU) == visible_past(5, CPU, window=5) == PAST


def test_places_begin_anew_with_each_document() -> None:
    assert places_within_documents(torch.tensor([[0, 0, 1, 1, 1], [3, 4, 4, 9, 9]])).tolist() == [
        [0, 1, 0, 1, 2],
        [0, 0, 1, 0, 1],
    ]


def test_flex_is_chosen_where_it_passes_blocks_over() -> None:
    gpu = torch.device("cuda")
    assert chooses_flex("auto", gpu, sparse=True, dropout=0.0)
    assert not chooses_flex("auto", gpu, sparse=False, dropout=0.0)  # SDPA's causal kernel
    assert not chooses_flex("auto", gpu, sparse=True, dropout=0.1)  # it drops nothing out
    assert not chooses_flex("auto", CPU, sparse=True, dropout=0.0)
    assert chooses_flex("flex", CPU, sparse=False, dropout=0.0)
    assert not chooses_flex("sdpa", gpu, sparse=True, dropout=0.0)


MODELS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 6},
    {"sliding_window": 3, "position": "learned", "num_kv_heads": 2},
    {"position": "none", "bias": True, "norm": "layernorm"},
]


@torch.no_grad()
@pytest.mark.parametrize("settings", MODELS, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "flex", "auto"])
def test_models_agree_with_the_naive_one(settings: dict[str, Any], implementation: str) -> None:
    tokens = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(2))
    logits = []
    for attention in ("naive", implementation):
        torch.manual_seed(0)
        shape = {"d_model": 32, "num_layers": 2, "num_heads": H, "init_std": 0.2}
        config = DecoderConfig(**(shape | settings | {"attention": attention}))
        model = build_model(config, vocab_size=50, seq_len=T, dropout=0.0).eval()
        logits.append([model(tokens), model(tokens, documents_BT=DOCUMENTS)])
    for ours, naive in zip(logits[1], logits[0], strict=True):
        torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "flex", "auto"])
def test_encoder_decoders_agree_with_the_naive_one(implementation: str) -> None:
    tokens = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(2))
    logits = []
    for attention in ("naive", implementation):
        torch.manual_seed(0)
        config = EncoderDecoderConfig(
            d_model=32,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_heads=H,
            num_kv_heads=2,
            init_std=0.2,
            attention=attention,  # type: ignore[arg-type]
        )
        model = build_model(config, vocab_size=50, seq_len=T, dropout=0.0).eval()
        logits.append(model(tokens[:, :7], sources_BS=tokens, source_mask_BS=PADDING))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
