"""What every weight starts as: one table, in one place.

Not here: the shapes of the weights (`layers.py`, `attention.py`, `decoder.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lmtrain.config.schema import DecoderConfig

Initializer = Callable[[Tensor], Tensor]


def initial_values(config: DecoderConfig) -> dict[str, Initializer]:
    """The last parts of a parameter's name → how its values are drawn, in place.

    Matrices that write to the residual stream are scaled by 1 / sqrt(2 num_layers), so that its variance at
    the end does not grow with depth (Radford et al., GPT-2, 2019, section 2.3), or start at zero, so that
    every block begins as the identity (Zhang et al., Fixup, arXiv:1901.09321).
    """
    matrix = partial(nn.init.normal_, std=config.init_std)
    depth_scaled = partial(nn.init.normal_, std=config.init_std / (2 * config.num_layers) ** 0.5)
    writes_residual = nn.init.zeros_ if config.output_init == "zero" else depth_scaled
    return {
        "embedding.weight": matrix,
        "position.weight": matrix,
        "attention.qkv.weight": matrix,
        "attention.output.weight": writes_residual,
        "feed_forward.up.weight": matrix,
        "feed_forward.down.weight": writes_residual,
        "head.weight": matrix,
        "attention_norm.weight": nn.init.ones_,
        "feed_forward_norm.weight": nn.init.ones_,
        "norm.weight": nn.init.ones_,
    }


def initialize(model: nn.Module, config: DecoderConfig) -> None:
    """Set every parameter of the model from the table, in the order of `named_parameters`."""
    table = initial_values(config)
    for name, parameter in model.named_parameters():
        rows = [draw for suffix, draw in table.items() if f".{name}".endswith(f".{suffix}")]
        assert len(rows) == 1, f"{len(rows)} rows of the initialisation table fit {name}"
        rows[0](parameter)
