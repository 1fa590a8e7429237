"""Functions with a derivative of their own: the same values and gradients as autograd gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.model import fused
from lmtrain.model.fused import rms_normalised, squared_relu

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rms": (lambda x: rms_normalised(x, 1e-5), lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-5)),
    "relu2": (squared_relu, lambda x: F.relu(x).square()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 7) * torch.logspace(-4, 4, 5).view(1, 5, 1)).requires_grad_()
    upstream = torch.randn(3, 5, 7)
    ours, plain = (function(x) for function in FUNCTIONS[name])
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    [gradient], [expected] = (torch.autograd.grad(y, x, upstream) for y in (ours, plain))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_differences(name: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    functions: dict[str, Any] = {"rms": fused._RMSNormalised, "relu2": fused._SquaredReLU}
    arguments = (1e-5,) if name == "rms" else ()
    assert torch.autograd.gradcheck(lambda x: functions[name].apply(x, *arguments), x)


def test_a_row_of_zeros_stays_zero_and_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_normalised(x, 1e-5)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(y, torch.zeros(2, 4))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
