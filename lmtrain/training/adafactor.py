"""Adafactor: AdamW's second moments kept as one row and one column a matrix, for models that fill the memory.

Our own because `torch.optim.Adafactor` reads two numbers of every tensor each step, which waits for a GPU that often.
The tests hold it against that one; the state has the same names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-15
"""Floor of a gradient's size; squared, it is the 1e-30 of the paper.

PyTorch's default floors mean squares at 1e-7, which those of a large model's gradients are below.
"""


class Adafactor(torch.optim.Optimizer):
    """Adafactor with decoupled weight decay (Shazeer and Stern, arXiv:1804.04235).

    A tensor's learning rate is its root mean square times min(lr, 1 / √steps). A step with `found_inf`, as GradScaler
    and `optimizers.move_if` set it, changes nothing where that is 1.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        beta2_decay: float,
        min_scale: float,
        clip_threshold: float,
    ) -> None:
        """`min_scale` is the least a tensor's root mean square counts; an update's is clipped at `clip_threshold`."""
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "beta2_decay": beta2_decay,
            "min_scale": min_scale,
            "clip_threshold": clip_threshold,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone. Tensor by tensor: memory is what this is for."""
        assert closure is None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    good = torch.ones((), device=weight.device)
                    if found_inf is not None:
                        good = good - found_inf
                        weight.grad.masked_fill_(found_inf.bool(), 0.0)
                    self._update(weight, weight.grad, group, good)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], good: Tensor) -> None:
        """Move `weight`, or change nothing where `good` is 0 instead of 1."""
        state = self._state_of(weight)
        steps = state["step"] = state["step"].to(weight.device).add_(good)
        share = good * steps.clamp_min(1.0).pow(group["beta2_decay"])  # of this gradient in the averages
        scale = weight.norm() / weight.numel() ** 0.5
        rate = scale.clamp_min(group["min_scale"]) * steps.clamp_min(1.0).rsqrt().clamp_max(group["lr"])
        weight.mul_(1.0 - group["lr"] * group["weight_decay"] * good)
        update = _mean_squares(state, gradient, share).clamp_min_(EPS * EPS).rsqrt_().mul_(gradient)
        clipping = (update.norm() / (update.numel() ** 0.5 * group["clip_threshold"])).clamp_min(1.0)
        weight.sub_(update.mul_(good * rate / clipping))

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            if weight.ndim > 1:
                state["row_var"] = weight.new_zeros(*weight.shape[:-1], 1)
                state["col_var"] = weight.new_zeros(*weight.shape[:-2], 1, weight.shape[-1])
            else:
                state["variance"] = torch.zeros_like(weight)
        return state


def _mean_squares(state: dict[str, Tensor], gradient: Tensor, share: Tensor) -> Tensor:
    """What a squared gradient is expected to be, with `share` of this one taken in; of a matrix, from its margins."""
    if gradient.ndim == 1:
        return state["variance"].lerp_(gradient.square(), share).clone()
    rows, columns = state["row_var"], state["col_var"]
    # A norm, squared, where a mean of squares would make a second gradient in memory.
    rows.lerp_(gradient.norm(dim=-1, keepdim=True).square_().div_(gradient.size(-1)), share)
    columns.lerp_(gradient.norm(dim=-2, keepdim=True).square_().div_(gradient.size(-2)), share)
    return (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_min(EPS))
