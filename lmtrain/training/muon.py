"""Muon: momentum whose update is made orthogonal, for the matrices inside a transformer's blocks.

Our own because `torch.optim.Muon` works matrix by matrix in bf16, which on a CPU without bf16 units costs almost as
much as the model itself. Here matrices go through batched products together (how many, says `optimizer_memory.py`),
and where bf16 is not faster in fp32, in which the iteration can be made on the smaller side alone: two thirds of the
work or less. The tests hold it against `torch.optim.Muon`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmtrain.distributed.sharding import is_divided
from lmtrain.training.held_back import decay_and_add, replace_where
from lmtrain.training.optimizer_memory import GRAM_STEPS, in_stacks

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Keller Jordan's Muon (kellerjordan.github.io/posts/muon)."""


def orthogonalize(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Approximate orthogonal factors U V^T of matrices by Newton–Schulz; those that are `by_gram_matrix` need have
    their smaller side in common only, others the shape.

    Singular values end between about 0.7 and 1.2.
    """
    if not by_gram_matrix(matrices[0]):
        return list(_iterate(torch.stack(list(matrices)), steps).unbind())
    wide = [matrix.mT if matrix.size(0) > matrix.size(1) else matrix for matrix in matrices]
    for done in range(0, steps, GRAM_STEPS):
        grams = torch.stack([x @ x.mT for x in wide])
        # What is begun with has a norm of one: its Gram matrix tells the norm that it would have to be divided by.
        norms = 1.0 if done else grams.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp_min(1e-7).view(-1, 1, 1)
        squares = _polynomials(grams / norms**2, min(GRAM_STEPS, steps - done)) / norms
        wide = [square @ x for square, x in zip(squares, wide, strict=True)]
    return [x.mT if matrix.size(0) > matrix.size(1) else x for matrix, x in zip(matrices, wide, strict=True)]


def by_gram_matrix(matrix: Tensor) -> bool:
    """Whether the iteration is made on the smaller side alone: in fp32, on a CPU, where a process holds the whole."""
    return matrix.is_cpu and matrix.dtype == torch.float32 and not is_divided(matrix)


def _kind(parameter: Tensor) -> int | torch.Size:
    """What matrices must have in common to be taken together: the smaller side, or the shape."""
    return min(parameter.shape) if by_gram_matrix(parameter) else parameter.shape


def _iterate(matrices: Tensor, steps: int) -> Tensor:
    """The iteration as it is written; in bf16 on GPUs, which are fast in it."""
    a, b, c = NEWTON_SCHULZ
    work = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = work.size(-2) > work.size(-1)
    x = work.mT if tall else work
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _polynomials(gram: Tensor, steps: int) -> Tensor:
    """What so many steps multiply X by, from its Gram matrices G = X X^T (N, side, side).

    Each multiplies X by a polynomial P of G, and so G by P², with which it commutes.
    """
    a, b, c = NEWTON_SCHULZ
    product: Tensor | None = None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step + 1 < steps:
            gram = polynomial @ (polynomial @ gram)
    assert product is not None
    return product


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay and the update scaled to AdamW's size (arXiv:2502.16982).

    The update of a matrix (rows, columns) is `lr * 0.2 * sqrt(max(rows, columns))` times its orthogonal factor, so
    one learning rate serves this and AdamW. Only matrices are accepted. A step with `found_inf`, as GradScaler and
    `optimizers.move_if` set it, changes nothing where that is 1.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        assert closure is None
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in in_stacks(moving, _kind, lambda parameter: parameter.nbytes):
                self._step_alike(parameters, group)

    def _step_alike(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        """Update parameters together that `orthogonalize` takes together."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        averages = [self._average(p) for p in parameters]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            replace_where(found_inf, gradients, averages)
        torch._foreach_lerp_(averages, gradients, 1.0 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
        directions = orthogonalize(list(updates), group["ns_steps"])
        torch._foreach_mul_(directions, [0.2 * max(parameter.shape) ** 0.5 for parameter in parameters])
        decay_and_add(list(parameters), directions, group["lr"] * group["weight_decay"], -group["lr"], found_inf)

    def _average(self, parameter: torch.nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]  # type: ignore[no-any-return]
