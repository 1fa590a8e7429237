"""Matrix products in 8 bits while training: the linear layers of the blocks, by torchao.

The weights stay fp32 and keep their names, so that checkpoints and exports do not know of it. Which machines can is in
`hardware`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 16
"""Rows and columns of the products of 8-bit tensor cores (`torch._scaled_mm`)."""


def train_in_fp8(blocks: Iterable[nn.Module], *, emulate: bool = False) -> int:
    """Let the linear layers of blocks whose sizes allow it train in fp8, in place; returns how many do.

    Scaled by tensor, as fits the moment (Micikevicius et al., arXiv:2209.05433). When evaluated, a layer computes as it
    does in a model that was never converted. `emulate` rounds alike on devices without 8-bit products.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # the tokens of a batch may be any number
    converted = 0
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=lambda module, name: fits(module), config=config)
        for layer in block.modules():
            if isinstance(layer, _float8_linear()):
                layer.__class__ = _fp8_in_training()
                converted += 1
    return converted


def fits(module: nn.Module) -> bool:
    """Whether a layer is a matrix product of sizes that 8-bit tensor cores take."""
    return isinstance(module, nn.Linear) and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0


def _float8_linear() -> type[nn.Linear]:
    from torchao.float8.float8_linear import Float8Linear

    return Float8Linear  # type: ignore[no-any-return]


@functools.cache
def _fp8_in_training() -> type[nn.Linear]:
    base: Any = _float8_linear()

    class Fp8InTraining(base):  # type: ignore[misc]
        """A linear layer that is evaluated in the number format around it."""

        def forward(self, input: Tensor) -> Tensor:
            if self.training:
                return super().forward(input)  # type: ignore[no-any-return]
            return F.linear(input, self.weight, self.bias)

    return Fp8InTraining
