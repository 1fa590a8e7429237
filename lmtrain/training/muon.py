"""Muon: momentum whose update is made orthogonal, for the matrices inside a transformer's blocks.

Our own because `torch.optim.Muon` works matrix by matrix in bf16, which on a CPU without bf16 units costs almost as
much as the model itself; here equal shapes go through one batched product, in fp32 where bf16 is not faster. The tests
hold it against `torch.optim.Muon`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmtrain.training.held_back import decay_and_add, replace_where

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Keller Jordan's Muon (kellerjordan.github.io/posts/muon)."""


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Approximate orthogonal factors U V^T of matrices (N, rows, columns), by Newton–Schulz.

    Singular values end between about 0.7 and 1.2. CUDA works in bf16, everything else in fp32.
    """
    a, b, c = NEWTON_SCHULZ
    work = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = work.size(-2) > work.size(-1)
    x = work.mT if tall else work
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


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
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_alike(parameters, group)

    def _step_alike(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        """Update parameters of one shape together."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        averages = [self._average(p) for p in parameters]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            replace_where(found_inf, gradients, averages)
        torch._foreach_lerp_(averages, gradients, 1.0 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
        directions = orthogonalize(torch.stack(updates), group["ns_steps"])
        scale = group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5
        decay_and_add(
            list(parameters), list(directions.unbind()), group["lr"] * group["weight_decay"], -scale, found_inf
        )

    def _average(self, parameter: torch.nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]  # type: ignore[no-any-return]
