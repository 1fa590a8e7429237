"""Functions whose derivative is written out, where autograd would make many small passes over memory.

On CPUs, uncompiled, in fp32; elsewhere there are kernels for them, or the compiler makes one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_normalised(x: Tensor, eps: float) -> Tensor:
    """x over the root mean square of its last axis (Zhang and Sennrich, arXiv:1910.07467), without a gain."""
    if _by_hand(x):
        normalised: Tensor = _RMSNormalised.apply(x, eps)  # type: ignore[no-untyped-call]
        return normalised
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al., arXiv:2109.08668)."""
    if _by_hand(x):
        squared: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
        return squared
    return F.relu(x).square()


def _by_hand(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _RMSNormalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        normalised: Tensor = x * scale
        ctx.save_for_backward(normalised, scale)
        return normalised

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        normalised, scale = ctx.saved_tensors
        mean = (gradient * normalised).mean(dim=-1, keepdim=True)
        return torch.addcmul(gradient, normalised, mean, value=-1.0).mul_(scale), None


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        derivative: Tensor = (gradient * positive).mul_(2.0)
        return derivative
