"""The layers without a notion of time: linear map, embedding, normalisation and feed-forward.

Not here: attention and positions, how they are stacked (`decoder.py`, `encoder_decoder.py`), and what the weights
start as (`initialization.py`): `Linear` and `Embedding` leave their memory unset until that has run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.config.schema import TransformerConfig
from lmtrain.model.fused import rms_normalised, squared_relu


class Linear(nn.Linear):
    """A matrix product; its weights are set by `initialization.py` alone."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Skip PyTorch's own initialisation: drawing every weight twice costs seconds in a large model."""


class Embedding(nn.Embedding):
    """A table of vectors; its weights are set by `initialization.py` alone."""

    def reset_parameters(self) -> None:
        """Skip PyTorch's own initialisation, as in `Linear`."""


class RMSNorm(nn.RMSNorm):
    """Normalisation by the root mean square, with a gain."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.dtype != self.weight.dtype:  # one kernel; or what autocast does with two types
            return super().forward(x)
        assert self.eps is not None
        return rms_normalised(x, self.eps) * self.weight


def build_norm(config: TransformerConfig) -> nn.Module:
    """The normalisation over the last axis (width d_model) that the config names, with a gain."""
    if config.norm == "rmsnorm":  # Zhang and Sennrich, arXiv:1910.07467
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)  # Ba et al., arXiv:1607.06450


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # as in GPT-2
    "relu2": squared_relu,
}


class FeedForward(nn.Module):
    """Two matrix products around an activation; gated ones multiply two halves (Shazeer, arXiv:2002.05202).

    For `swiglu` and `geglu` the rows of `up.weight` [2 d_ff, d_model] are the gate first, then the values.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated
        self.up = Linear(config.d_model, config.hidden_dim * (2 if config.gated else 1), bias=config.bias)
        self.down = Linear(config.hidden_dim, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.up(x_BTD)
        if self.gated:
            gate_BTF, value_BTF = hidden_BTF.chunk(2, dim=-1)
            hidden_BTF = self.activation(gate_BTF) * value_BTF
        else:
            hidden_BTF = self.activation(hidden_BTF)
        output_BTD: Tensor = self.down(hidden_BTF)
        return output_BTD
