"""The loss without all logits at a time: the same numbers and gradients, in less memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig
from lmtrain.data.batches import IGNORED
from lmtrain.model.building import build_model
from lmtrain.training.losses import TrainingLoss
from lmtrain.training.memory import PeakMemory
from lmtrain.training.step import losses_of

VOCABULARY, ROWS, LENGTH = 61, 3, 14
SHAPE: dict[str, Any] = {"d_model": 16, "num_heads": 2}


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets[0, 5:] = IGNORED
    targets[2] = IGNORED  # whole chunks without a target
    return tokens, targets


def passes(model: nn.Module, loss: TrainingLoss, **context: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    tokens, targets = inputs()
    objective, cross_entropy = losses_of(model, loss, tokens, targets, context)
    objective.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return objective, cross_entropy, gradients


@pytest.mark.parametrize("positions", [1, 5, 41])
@pytest.mark.parametrize("loss", [TrainingLoss(), TrainingLoss(label_smoothing=0.1, z_loss=1e-2)])
@pytest.mark.parametrize("changed", [{}, {"tie_embeddings": False}, {"logit_softcap": 5.0}])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(
    positions: int, loss: TrainingLoss, changed: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build_model(
        DecoderConfig(**SHAPE, num_layers=2, **changed), vocab_size=VOCABULARY, seq_len=LENGTH, dropout=0.0
    )
    expected = passes(model, loss)
    found = passes(model, dataclasses.replace(loss, positions=positions))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_chunks_of_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = EncoderDecoderConfig(**SHAPE, num_encoder_layers=1, num_decoder_layers=1)
    model = build_model(config, vocab_size=VOCABULARY, seq_len=LENGTH, dropout=0.0)
    sources = torch.randint(VOCABULARY, (ROWS, 6))
    expected = passes(model, TrainingLoss(), sources_BS=sources)
    found = passes(model, TrainingLoss(positions=8), sources_BS=sources)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_chunks_in_16_bits_are_as_the_whole_in_16_bits() -> None:
    """Cast, multiplied and summed alike: only gradients of the head are added up in another order."""
    torch.manual_seed(0)
    model = build_model(DecoderConfig(**SHAPE, num_layers=1), vocab_size=VOCABULARY, seq_len=LENGTH, dropout=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = passes(model, TrainingLoss())
        found = passes(model, TrainingLoss(positions=8))
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2], expected[2], rtol=2e-2, atol=2e-2)


def test_chunks_take_less_memory() -> None:
    """The logits of 3 x 64 positions over 4,096 tokens are 3 MiB, several times over; those of a chunk a twelfth."""
    torch.manual_seed(0)
    model = build_model(DecoderConfig(**SHAPE, num_layers=1), vocab_size=4096, seq_len=64, dropout=0.0)
    tokens = torch.zeros(3, 64, dtype=torch.int64)
    peaks = []
    for positions in (None, 16):
        with PeakMemory(model.parameters()) as memory:
            losses_of(model, TrainingLoss(positions=positions), tokens, tokens, {})[0].backward()  # type: ignore[no-untyped-call]
        peaks.append(memory.peak)
        model.zero_grad(set_to_none=True)
    assert peaks[1] < peaks[0] / 3
