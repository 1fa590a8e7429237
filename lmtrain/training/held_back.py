"""How our own optimizers make a step that changes nothing: decided on the device, so that nothing waits for it.

`found_inf` is 1 where the gradient is not finite, else 0, as `torch.amp.GradScaler` tells PyTorch's fused optimizers;
or None where it is known to be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor


def replace_where(found_inf: Tensor, gradients: list[Tensor], averages: list[Tensor]) -> None:
    """Put averages in the place of their gradients: an average that takes in itself stays as it is, to the bit."""
    bad = found_inf.bool()
    for gradient, average in zip(gradients, averages, strict=True):
        torch.where(bad, average, gradient, out=gradient)


def decay_and_add(
    weights: list[Tensor], directions: list[Tensor], decay: float, alpha: float, found_inf: Tensor | None
) -> None:
    """Shrink weights by the share `decay` and add `alpha` times their (finite) directions, unless held back."""
    if found_inf is None:
        torch._foreach_mul_(weights, 1.0 - decay)
        torch._foreach_add_(weights, directions, alpha=alpha)
        return
    good = 1.0 - found_inf
    torch._foreach_mul_(weights, 1.0 - decay * good)
    torch._foreach_add_(weights, list(torch._foreach_mul(directions, alpha * good)))
