"""The initialisation table against the built model, parameter by parameter."""

from __future__ import annotations

import math

import pytest
import torch

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.building import build_model
from lmtrain.model.decoder import Decoder

STD, NUM_LAYERS = 0.05, 8


def built(output_init: str) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        d_model=128,
        num_layers=NUM_LAYERS,
        num_heads=4,
        position="learned",
        tie_embeddings=False,
        init_std=STD,
        output_init=output_init,  # type: ignore[arg-type]
    )
    return build_model(config, vocab_size=512, seq_len=256, dropout=0.0)


def expected_std(name: str, output_init: str) -> float:
    """What each parameter's name promises, written out again by hand."""
    if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        return 0.0 if output_init == "zero" else STD / math.sqrt(2 * NUM_LAYERS)
    return STD


@pytest.mark.parametrize("output_init", ["depth_scaled", "zero"])
def test_every_parameter_starts_as_the_table_says(output_init: str) -> None:
    model = built(output_init)
    names = []
    for name, parameter in model.named_parameters():
        names.append(name)
        if "norm" in name:
            assert torch.all(parameter == 1), name
            continue
        std = expected_std(name, output_init)
        # Six standard errors of a mean and of a standard deviation of so many draws.
        tolerance = 6 * std / math.sqrt(parameter.numel())
        assert abs(parameter.mean().item()) <= tolerance, name
        assert abs(parameter.std().item() - std) <= tolerance, name
    assert len(names) == 1 + 1 + NUM_LAYERS * 6 + 1 + 1  # embedding, position, blocks, norm, head


def test_no_two_matrices_start_alike() -> None:
    first_values = [p.flatten()[:4] for p in built("depth_scaled").parameters() if p.ndim == 2]
    rounded = {tuple(values.tolist()) for values in first_values}
    assert len(rounded) == len(first_values)


def test_zero_output_makes_every_block_the_identity() -> None:
    model = built("zero")
    x_BTD = torch.randn(1, 5, 128)
    for block in model.blocks:
        assert torch.equal(block(x_BTD), x_BTD)


def test_residual_variance_does_not_grow_with_depth() -> None:
    """What depth scaling is for: 8 and 32 layers end at about the same size."""
    ends = []
    for num_layers in (8, 32):
        torch.manual_seed(0)
        config = DecoderConfig(d_model=64, num_layers=num_layers, num_heads=4)
        model = build_model(config, vocab_size=64, seq_len=32, dropout=0.0)
        residual = []
        model.norm.register_forward_pre_hook(lambda _, inputs, kept=residual: kept.append(inputs[0]))
        model(torch.randint(64, (4, 32)))
        ends.append(residual[0].std().item())
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
