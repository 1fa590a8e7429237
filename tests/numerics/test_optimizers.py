"""Optimizers against references: torch's Muon, steps by hand, plain loops; and the grouping of parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lmtrain.config.schema import (
    AdafactorConfig,
    AdamConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from lmtrain.training import optimizer_memory
from lmtrain.training.adafactor import Adafactor
from lmtrain.training.lion import Lion
from lmtrain.training.memory import PeakMemory
from lmtrain.training.muon import NEWTON_SCHULZ, Muon, orthogonalize
from lmtrain.training.optimizers import build_optimizers, set_lr


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (1, 8)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e3]).view(3, 1, 1)
    values = torch.linalg.svdvals(torch.stack(orthogonalize(matrices.unbind(), steps=5)))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_orthogonalize_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 12)
    u, _, vh = torch.linalg.svd(matrix)
    inner = u.mT @ orthogonalize([matrix], steps=5)[0] @ vh.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-7])
def test_the_iteration_on_gram_matrices_is_the_iteration(smallest: float) -> None:
    """Also for matrices that are nearly of low rank, in double precision and by its definition."""
    torch.manual_seed(0)
    sizes = torch.logspace(0, math.log10(smallest), 24, dtype=torch.float64)
    matrices = [
        torch.linalg.qr(torch.randn(rows, 24, dtype=torch.float64)).Q
        @ sizes.diag()
        @ torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
        for rows in (24, 40, 96)
    ]
    for wide in (False, True):
        given = [matrix.mT.contiguous() if wide else matrix for matrix in matrices]
        ours = orthogonalize([matrix.float() for matrix in given], steps=5)
        for matrix, factor in zip(given, ours, strict=True):
            x = matrix / matrix.norm()
            for _ in range(5):
                a, b, c = NEWTON_SCHULZ
                x = a * x + b * (x @ x.mT @ x) + c * (x @ x.mT @ x @ x.mT @ x)
            assert (factor - x).norm() < 1e-3 * x.norm()


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


@pytest.mark.parametrize("in_fp32", [True, False])
def test_muon_moves_alike_however_few_matrices_it_takes_at_a_time(
    in_fp32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both of its iterations: on Gram matrices, and, of other formats, as it is written."""

    def train() -> list[torch.Tensor]:
        torch.manual_seed(1)
        shapes = [(24, 8), (8, 24), (8, 8), (24, 8), (16, 16), (24, 8)]
        format = torch.float32 if in_fp32 else torch.bfloat16
        parameters = [nn.Parameter(torch.randn(shape, dtype=format)) for shape in shapes]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=True, ns_steps=5)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    together = train()
    monkeypatch.setattr(optimizer_memory, "MAX_STACK_BYTES", 2 * 24 * 8 * 4)
    by_twos = train()
    monkeypatch.setattr(optimizer_memory, "MAX_STACK_BYTES", 0)
    torch.testing.assert_close([by_twos, train()], [together, together])


def test_muon_takes_no_more_memory_for_more_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_memory, "MAX_STACK_BYTES", 2 * 64 * 48 * 4)
    peaks = []
    for number in (2, 9):
        parameters = [nn.Parameter(torch.randn(64, 48)) for _ in range(number)]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=True, ns_steps=5)
        for _ in range(2):  # the first makes what it keeps
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            known = [tensor for p in parameters for tensor in (p, p.grad, *optimizer.state[p].values())]
            with PeakMemory(tensor for tensor in known if tensor is not None) as memory:
                optimizer.step()
        peaks.append(memory.peak)
    assert peaks[1] <= 1.01 * peaks[0]


@pytest.mark.parametrize("config", [AdamWConfig, SGDConfig, LionConfig, AdafactorConfig])
def test_decay_shrinks_matrices_and_not_vectors(config: type[OptimizerConfig]) -> None:
    """One step by hand: with a zero gradient only decay moves anything (SGD's L2 term comes to the same)."""
    matrix, vector = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    [optimizer] = build_optimizers(config(weight_decay=0.5), [matrix, vector], [matrix], lr=0.1)
    matrix.grad, vector.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((3, 3), 1 - 0.1 * 0.5))
    assert torch.equal(vector, torch.ones(3))


def test_decay_of_adam_is_part_of_the_gradient() -> None:
    """So the first step moves by lr, however small the decay, where AdamW would move by lr times the decay."""
    matrix, vector = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    [optimizer] = build_optimizers(AdamConfig(weight_decay=0.01), [matrix, vector], [matrix], lr=0.1)
    matrix.grad, vector.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((3, 3), 0.9))
    assert torch.equal(vector, torch.ones(3))


def test_adamw_first_step_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    [optimizer] = build_optimizers(AdamWConfig(weight_decay=0.0, eps=0.1), [parameter], [], lr=0.01)
    parameter.grad = torch.tensor([[0.5, -4.0]])
    optimizer.step()
    # bias correction makes both moments the gradient itself after one step: g / (|g| + eps)
    expected = torch.tensor([[1.0 - 0.01 * 0.5 / 0.6, -2.0 + 0.01 * 4.0 / 4.1]])
    assert torch.allclose(parameter, expected, atol=1e-6)


@pytest.mark.parametrize(("nesterov", "moves"), [(False, (0.1 * 2.0, 0.1 * 2.8)), (True, (0.1 * 2.8, 0.1 * 3.12))])
def test_two_steps_of_sgd_by_hand(nesterov: bool, moves: tuple[float, float]) -> None:
    """Gradients 2 and 2, momentum 0.4: directions 2 and 2.8; Nesterov adds 0.4 of them to the gradient."""
    weight = nn.Parameter(torch.tensor([[1.0]]))
    [optimizer] = build_optimizers(SGDConfig(momentum=0.4, nesterov=nesterov), [weight], [], lr=0.1)
    for move in moves:
        before = weight.item()
        weight.grad = torch.tensor([[2.0]])
        optimizer.step()
        assert before - weight.item() == pytest.approx(move, rel=1e-5)


def test_two_steps_of_lion_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]]))
    [optimizer] = build_optimizers(LionConfig(weight_decay=0.5, betas=(0.9, 0.99)), [weight], [], lr=0.1)
    weight.grad = torch.tensor([[0.5, -4.0, 0.0]])
    optimizer.step()  # signs +, -, 0; averages 0.005, -0.04, 0
    assert torch.allclose(weight, torch.tensor([[0.95 - 0.1, -1.9 + 0.1, 2.85]]))
    weight.grad = torch.tensor([[-0.04, 0.4, -1.0]])
    optimizer.step()  # 0.9 average + 0.1 gradient: 0.0005, 0.004, -0.1
    assert torch.allclose(weight, torch.tensor([[0.8075 - 0.1, -1.71 - 0.1, 2.7075 + 0.1]]))


def test_lion_moves_as_a_plain_loop_does_and_skips_parameters_without_gradient() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(4), torch.randn(2, 2)]
    ours = [nn.Parameter(weight.clone()) for weight in start]
    optimizer = Lion(ours, lr=0.03, weight_decay=0.2, betas=(0.8, 0.95))
    averages = [torch.zeros_like(weight) for weight in start]
    expected = [weight.clone() for weight in start]
    for _ in range(6):
        for i in range(2):
            gradient = torch.randn_like(start[i])
            ours[i].grad = gradient.clone()
            direction = torch.sign(0.8 * averages[i] + 0.2 * gradient)
            expected[i] = expected[i] - 0.03 * (direction + 0.2 * expected[i])
            averages[i] = 0.95 * averages[i] + 0.05 * gradient
        optimizer.step()
    assert all(torch.allclose(mine, plain, atol=1e-6) for mine, plain in zip(ours, expected, strict=True))
    assert torch.equal(ours[2], start[2])


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_first_step_of_adafactor_by_hand(scale: float) -> None:
    """The size of the gradient cancels, also where it is that of a large model's."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 5.0]])), nn.Parameter(torch.zeros(2))
    [optimizer] = build_optimizers(AdafactorConfig(), [weight, bias], [], lr=0.01)
    weight.grad = scale * torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    bias.grad = scale * torch.tensor([2.0, -8.0])
    optimizer.step()
    # squares by row: means 2.5 and 0.5; by column: 0.5 and 2.5; over all: 1.5
    update = torch.tensor([[1.0, 2.0], [0.0, 1.0]]) / torch.tensor([[1.25, 6.25], [0.25, 1.25]]).div(1.5).sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    size = 12.5**0.5  # root mean square of the weights
    assert torch.allclose(weight, torch.tensor([[3.0, 4.0], [0.0, 5.0]]) - 0.01 * size * update, rtol=1e-5)
    assert torch.allclose(bias, -0.01 * 1e-3 * torch.tensor([1.0, -1.0]))  # zeros count as 1e-3


@pytest.mark.parametrize("lr", [0.01, 0.9])  # the second is above 1 / √steps
def test_adafactor_moves_as_torch_adafactor_does(lr: float) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(6)), nn.Parameter(1e-4 * torch.randn(3, 4))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": lr, "weight_decay": 0.1, "beta2_decay": -0.7}
    our_optimizer = Adafactor(ours, min_scale=0.002, clip_threshold=1.1, **settings)
    their_optimizer = torch.optim.Adafactor(theirs, eps=(1e-15, 0.002), d=1.1, **settings)
    for step in range(6):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) * 3.0**-step
            other.grad = mine.grad.clone()
        our_optimizer.step()
        their_optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(ours, theirs, strict=True))
    for mine, other in zip(ours, theirs, strict=True):
        assert our_optimizer.state[mine].keys() == their_optimizer.state[other].keys()


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


@pytest.mark.parametrize(
    ("config", "lr"),
    [
        (AdamWConfig(weight_decay=0.0), 0.2),
        (AdamConfig(), 0.2),
        (MuonConfig(weight_decay=0.0), 0.2),
        (SGDConfig(), 0.5),
        (SGDConfig(nesterov=True), 0.5),
        (LionConfig(weight_decay=0.0), 0.05),
        (AdafactorConfig(), 0.2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_regression_converges(config: OptimizerConfig, lr: float) -> None:
    torch.manual_seed(0)
    target, inputs = torch.randn(8, 8), torch.randn(256, 8)
    weight, bias = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8))
    optimizers = build_optimizers(config, [weight, bias], [weight], lr=lr)

    def loss() -> torch.Tensor:
        return ((inputs @ weight + bias - inputs @ target) ** 2).mean()

    start = loss().item()
    for step in range(400):
        set_lr(optimizers, lr * (1 - step / 400))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss().item() < 1e-3 * start
