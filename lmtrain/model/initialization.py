"""What every weight starts as: one table, in one place.

Not here: the shapes of the weights (`layers.py`, `attention.py`, `transformer.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lmtrain.config.schema import TransformerConfig

Initializer = Callable[[Tensor], Tensor]


WRITES_RESIDUAL = ("attention.output.weight", "feed_forward.down.weight")
"""How the names of matrices end whose results are added to the residual stream."""


def initial_values(config: TransformerConfig, num_writes: int) -> dict[str, Initializer]:
    """The last parts of a parameter's name → how its values are drawn, in place.

    Matrices that write to the residual stream are scaled by one over the root of `num_writes`, how many do so in
    their stack, so that its variance at the end does not grow with depth (Radford et al., GPT-2, 2019, section 2.3), or
    start at zero, so that every block begins as the identity (Zhang et al., Fixup, arXiv:1901.09321).
    """
    matrix = partial(nn.init.normal_, std=config.init_std)
    depth_scaled = partial(nn.init.normal_, std=config.init_std / max(num_writes, 1) ** 0.5)
    writes_residual = nn.init.zeros_ if config.output_init == "zero" else depth_scaled
    return {
        "embedding.weight": matrix,
        "position.weight": matrix,
        "qkv.weight": matrix,
        "query.weight": matrix,
        "key_value.weight": matrix,
        "up.weight": matrix,
        "head.weight": matrix,
        **dict.fromkeys(WRITES_RESIDUAL, writes_residual),
        "norm.weight": nn.init.ones_,
        "bias": nn.init.zeros_,
    }


def initialize(model: nn.Module, config: TransformerConfig) -> None:
    """Set every parameter of the model from the table, in the order of `named_parameters`."""
    stacks = Counter(name.split(".")[0] for name, _ in model.named_parameters() if name.endswith(WRITES_RESIDUAL))
    for name, parameter in model.named_parameters():
        table = initial_values(config, stacks[name.split(".")[0]])
        rows = [draw for suffix, draw in table.items() if name.endswith(suffix)]
        assert len(rows) == 1, f"{len(rows)} rows of the initialisation table fit {name}"
        rows[0](parameter)
