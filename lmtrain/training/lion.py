"""Lion: steps of one size in the direction of the sign of an averaged gradient.

Our own because PyTorch has none. Grouped operations, one tensor of state a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmtrain.training.held_back import decay_and_add, replace_where


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay (Chen et al., arXiv:2302.06675, algorithm 2).

    A step moves every weight by `lr`, up or down: where the average, mixed with this step's gradient, points. A step
    with `found_inf`, as GradScaler and `optimizers.move_if` set it, changes nothing where that is 1.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        assert closure is None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights if p.grad is not None]
            averages = [self._average(p) for p in weights]
            if found_inf is not None:
                replace_where(found_inf, gradients, averages)
            (beta1, beta2), lr = group["betas"], group["lr"]
            updates = list(torch._foreach_lerp(averages, gradients, 1.0 - beta1))
            torch._foreach_sign_(updates)
            decay_and_add(weights, updates, lr * group["weight_decay"], -lr, found_inf)
            torch._foreach_lerp_(averages, gradients, 1.0 - beta2)

    def _average(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        return state["exp_avg"]  # type: ignore[no-any-return]
