"""Documents in one row: each gets the logits and gradients it gets alone, however the model is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.building import build_model
from lmtrain.model.decoder import Decoder
from lmtrain.training.activation_checkpointing import checkpoint_activations

VOCAB_SIZE, LENGTHS = 23, (5, 1, 7, 3)
SEQ_LEN = sum(LENGTHS)
VARIANTS: list[dict[str, Any]] = [{}, {"position": "learned"}, {"num_kv_heads": 1, "qk_norm": True}]


def build(**settings: Any) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(**({"d_model": 32, "num_layers": 2, "num_heads": 4} | settings))
    model = build_model(config, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def packed_rows() -> tuple[Tensor, Tensor]:
    """Two rows with the same four documents; in the second in another order."""
    tokens = torch.randint(VOCAB_SIZE, (SEQ_LEN,), generator=torch.Generator().manual_seed(1))
    pieces = tokens.split(LENGTHS)
    order = (2, 0, 3, 1)
    rows = torch.stack([tokens, torch.cat([pieces[number] for number in order])])
    numbers = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    other = torch.arange(4).repeat_interleave(torch.tensor([LENGTHS[number] for number in order]))
    return rows, torch.stack([numbers, other])


def alone(model: Decoder, rows: Tensor, documents: Tensor) -> Tensor:
    """Logits of every document by itself, put together again."""
    return torch.stack(
        [
            torch.cat([model(row[numbers == number].unsqueeze(0))[0] for number in numbers.unique()])
            for row, numbers in zip(rows, documents, strict=True)
        ]
    )


def gradients(model: Decoder, logits: Tensor, rows: Tensor) -> list[Tensor]:
    model.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), rows.roll(-1, dims=1).flatten()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_as_alone(model: Decoder, forward: Callable[..., Tensor]) -> None:
    rows, documents = packed_rows()
    packed, apart = forward(rows, documents_BT=documents), alone(model, rows, documents)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)
    pairs = zip(gradients(model, packed, rows), gradients(model, apart, rows), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_document_in_a_packed_row_is_as_alone(settings: dict[str, Any]) -> None:
    model = build(**settings)
    assert_as_alone(model, model)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_under_activation_checkpointing_too(mode: Any) -> None:
    model = build()
    checkpoint_activations(model.blocks, mode)
    assert_as_alone(model, model)


@pytest.mark.parametrize("settings", VARIANTS)
def test_in_one_graph_of_a_compiled_model_too(settings: dict[str, Any]) -> None:
    model = build(**settings)
    assert_as_alone(model, torch.compile(model, backend="aot_eager", fullgraph=True))


def test_without_documents_the_others_are_seen() -> None:
    """Else the tests above would show nothing."""
    model = build()
    rows, documents = packed_rows()
    seen, apart = model(rows), alone(model, rows, documents)
    torch.testing.assert_close(seen[:, : LENGTHS[1]], apart[:, : LENGTHS[1]], atol=1e-5, rtol=1e-5)
    assert (seen[:, -1] - apart[:, -1]).abs().max() > 0.1


def test_padding_at_the_right_changes_nothing() -> None:
    model = build()
    rows, _ = packed_rows()
    filled = torch.cat([rows[:, :9], torch.zeros(2, 7, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(filled)[:, :9], model(rows[:, :9]), atol=1e-5, rtol=1e-5)
