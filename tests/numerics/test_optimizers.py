"""Optimizers against references: torch's Muon, a hand-written AdamW, and the grouping of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmtrain.config.schema import AdamWConfig, MuonConfig
from lmtrain.training.muon import Muon, orthogonalize
from lmtrain.training.optimizers import build_optimizers, set_lr


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (1, 8)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e3]).view(3, 1, 1)
    values = torch.linalg.svdvals(orthogonalize(matrices, steps=5))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_orthogonalize_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, 12, 12)
    u, _, vh = torch.linalg.svd(matrix)
    inner = u.mT @ orthogonalize(matrix, steps=5) @ vh.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_moves_as_torch_muon_does(nesterov: bool) -> None:
    """torch computes the orthogonal factor in bf16: three significant digits are what can agree."""
    torch.manual_seed(0)
    ours = [
        nn.Parameter(torch.randn(24, 8)),
        nn.Parameter(torch.randn(24, 8)),
        nn.Parameter(torch.randn(8, 8)),
    ]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov, "ns_steps": 5}
    our_optimizer = Muon(ours, **settings)
    their_optimizer = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        our_optimizer.step()
        their_optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() < 0.02 * moved


def test_muon_is_deterministic_and_skips_parameters_without_gradient() -> None:
    def train() -> list[torch.Tensor]:
        torch.manual_seed(1)
        parameters = [nn.Parameter(torch.randn(8, 4)) for _ in range(3)]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=True, ns_steps=5)
        for _ in range(3):
            for parameter in parameters[:2]:
                parameter.grad = torch.randn(8, 4)
            optimizer.step()
        return [p.detach() for p in parameters]

    first, second = train(), train()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    untouched = [torch.randn(8, 4) for _ in range(3)][2]
    assert torch.equal(first[2], untouched)


def test_adamw_decays_matrices_and_not_vectors() -> None:
    """One step by hand: with a zero gradient only decay moves anything."""
    matrix, vector = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    [optimizer] = build_optimizers(AdamWConfig(weight_decay=0.5), [matrix, vector], [matrix], lr=0.1)
    matrix.grad, vector.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((3, 3), 1 - 0.1 * 0.5))
    assert torch.equal(vector, torch.ones(3))


def test_adamw_first_step_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    [optimizer] = build_optimizers(AdamWConfig(weight_decay=0.0, eps=0.1), [parameter], [], lr=0.01)
    parameter.grad = torch.tensor([[0.5, -4.0]])
    optimizer.step()
    # bias correction makes both moments the gradient itself after one step: g / (|g| + eps)
    expected = torch.tensor([[1.0 - 0.01 * 0.5 / 0.6, -2.0 + 0.01 * 4.0 / 4.1]])
    assert torch.allclose(parameter, expected, atol=1e-6)


def test_muon_takes_the_block_matrices_and_adamw_the_rest() -> None:
    block, embedding, norm = (
        nn.Parameter(torch.ones(4, 4)),
        nn.Parameter(torch.ones(9, 4)),
        nn.Parameter(torch.ones(4)),
    )
    muon, adamw = build_optimizers(MuonConfig(), [embedding, block, norm], [block], lr=0.3)
    assert [p for group in muon.param_groups for p in group["params"]] == [block]
    assert {id(p) for group in adamw.param_groups for p in group["params"]} == {id(embedding), id(norm)}
    set_lr([muon, adamw], 0.7)
    assert {group["lr"] for optimizer in (muon, adamw) for group in optimizer.param_groups} == {0.7}


@pytest.mark.parametrize("config", [AdamWConfig(weight_decay=0.0), MuonConfig(weight_decay=0.0)])
def test_a_regression_converges(config: AdamWConfig | MuonConfig) -> None:
    torch.manual_seed(0)
    target, inputs = torch.randn(8, 8), torch.randn(256, 8)
    weight, bias = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8))
    optimizers = build_optimizers(config, [weight, bias], [weight], lr=0.2)

    def loss() -> torch.Tensor:
        return ((inputs @ weight + bias - inputs @ target) ** 2).mean()

    start = loss().item()
    for step in range(400):
        set_lr(optimizers, 0.2 * (1 - step / 400))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss().item() < 1e-3 * start
