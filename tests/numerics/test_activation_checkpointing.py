"""Activation checkpointing: the same gradients to the bit, less kept, matrix products repeated only by `full`."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.building import build_model
from lmtrain.model.decoder import Decoder
from lmtrain.model.generation import generate
from lmtrain.training.activation_checkpointing import checkpoint_activations

Mode = Literal["none", "selective", "full"]
LAYERS = 3


def build(mode: Mode, *, dropout: float = 0.0, device: str = "cpu", d_model: int = 32, seq_len: int = 16) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(d_model=d_model, num_layers=LAYERS, num_heads=4, num_kv_heads=2)
    model = build_model(config, vocab_size=50, seq_len=seq_len, dropout=dropout).to(device)
    checkpoint_activations(model.blocks, mode)
    return model


def loss_of(model: Decoder, rows: int = 4) -> torch.Tensor:
    tokens = torch.randint(50, (rows, model.seq_len), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(model.embedding.weight.device)
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())


def gradients(model: Decoder) -> list[torch.Tensor]:
    """With dropout drawn from a fixed state; the state afterwards is part of what is compared."""
    torch.manual_seed(5)
    loss = loss_of(model)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), torch.rand(3)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same_to_the_bit(mode: Mode, dropout: float) -> None:
    assert same(gradients(build(mode, dropout=dropout)), gradients(build("none", dropout=dropout)))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same_in_bf16(mode: Mode) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(gradients(build(mode, dropout=0.2)), gradients(build("none", dropout=0.2)))


class CountProducts(TorchDispatchMode):
    """Counts matrix products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def products(mode: Mode, *, gradient: bool) -> int:
    model = build(mode)
    with CountProducts() as counter:
        if gradient:
            loss_of(model).backward()
        else:
            with torch.no_grad():
                loss_of(model)
    return counter.count


def test_only_full_repeats_matrix_products() -> None:
    """Four a block; `full` needs not repeat the last, whose result nothing in its block depends on."""
    forward = products("none", gradient=False)
    assert forward == 4 * LAYERS + 1
    assert products("none", gradient=True) == products("selective", gradient=True) == 3 * forward
    assert products("full", gradient=True) == 3 * forward + 3 * LAYERS


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_nothing_changes_without_gradients(mode: Mode) -> None:
    plain, model = build("none").eval(), build(mode).eval()
    assert products(mode, gradient=False) == products("none", gradient=False)
    assert loss_of(model).item() == loss_of(plain).item()
    assert generate(model, [3], max_new_tokens=6, seed=0) == generate(plain, [3], max_new_tokens=6, seed=0)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_gradients_are_the_same_and_memory_is_less(dtype: torch.dtype, dropout: float) -> None:
    results, peaks = {}, {}
    modes: tuple[Mode, ...] = ("none", "selective", "full")
    for mode in modes:
        model = build(mode, dropout=dropout, device="cuda", d_model=256, seq_len=256)
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            results[mode] = gradients(model)
        peaks[mode] = torch.cuda.max_memory_allocated()
        del model
    for mode in ("selective", "full"):
        for ours, plain in zip(results[mode], results["none"], strict=True):
            assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-6 * plain.abs().max().item())
    assert peaks["full"] < peaks["selective"] < peaks["none"]
