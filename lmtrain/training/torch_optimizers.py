"""PyTorch's optimizers, which come without its compiler here: importing that takes half as long as importing PyTorch.

PyTorch calls it to keep optimizers out of compiled code; ours never are in any.
"""

from __future__ import annotations

import inspect

import torch


class Adam(torch.optim.Adam):
    """Adam (Kingma and Ba, arXiv:1412.6980)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class SGD(torch.optim.SGD):
    """Gradient descent with momentum."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def _spare_compiler() -> None:
    """Mark the methods of all optimizers as kept out of compiled code, as the compiler would, once it is imported.

    Where PyTorch does this in another way, the compiler is imported as ever.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        if not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)


_spare_compiler()
