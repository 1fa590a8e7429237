"""How tokens know where they are: rotary angles, and tables that are added to the embedding.

In shapes B is batch, T time, D width, H heads, C the width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmtrain.config.schema import TransformerConfig
from lmtrain.model.layers import Embedding

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, each [T, 1, C], or [B, 1, 1, C] of one token a row


class RotaryTable(nn.Module):
    """The angles of rotary positions (Su et al., arXiv:2104.09864), in fp32, not part of the saved weights.

    Channel i turns together with channel i + C/2, as in Llama; the sines of the first half carry the minus
    sign of the rotation.
    """

    cos: Tensor  # [seq_len, 1, C]
    sin: Tensor

    def __init__(self, head_dim: int, *, seq_len: int, theta: float, stretch: float = 1.0) -> None:
        """`stretch` divides positions: a context that much longer turns as far (Chen et al., arXiv:2306.15595)."""
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        # Rounded as transformers rounds them: at far positions an exported model would differ by that more than by
        # all the rest.
        frequencies = 1.0 / theta**exponents / stretch
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1).unsqueeze(1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1).unsqueeze(1), persistent=False)

    def forward(self, start: int | Tensor, length: int) -> Rotation:
        """The rotation of positions start … start + length - 1; of one token a row if there is a start a row."""
        if isinstance(start, Tensor):
            return self.cos[start].unsqueeze(1), self.sin[start].unsqueeze(1)
        return self.cos[start : start + length], self.sin[start : start + length]


def build_rotary(config: TransformerConfig, *, seq_len: int) -> RotaryTable | None:
    """The angles that the config asks for, if any."""
    if config.position != "rotary":
        return None
    stretch = config.rope_factor if config.rope_scaling == "linear" else 1.0
    return RotaryTable(config.head_dim, seq_len=seq_len, theta=config.rope_base, stretch=stretch)


def rotate(x_BTHC: Tensor, rotation: Rotation) -> Tensor:
    """Turn every head by the angles of its position: in fp32, returned in the type of x."""
    cos_T1C, sin_T1C = rotation
    swapped_BTHC = x_BTHC.roll(x_BTHC.size(-1) // 2, dims=-1)
    return torch.addcmul(x_BTHC * cos_T1C, swapped_BTHC, sin_T1C).type_as(x_BTHC)


class SinusoidalPositions(nn.Module):
    """The table of sines and cosines of Vaswani et al. (arXiv:1706.03762, section 3.5), not part of the saved weights.

    Its size beside the embeddings at the start is the paper's: there these are multiplied, here the table is.
    """

    weight: Tensor  # [seq_len, D]

    def __init__(self, seq_len: int, d_model: int, *, scale: float) -> None:
        super().__init__()
        frequencies = 10000.0 ** -(torch.arange(0, d_model, 2, dtype=torch.float32) / d_model)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        self.register_buffer("weight", scale * table, persistent=False)

    def forward(self, places: Tensor) -> Tensor:
        """Positions [...] to vectors [..., D]."""
        return self.weight[places]


AddedPositions = Embedding | SinusoidalPositions


def build_added_positions(config: TransformerConfig, *, seq_len: int) -> AddedPositions | None:
    """What is added to the embedding of each token by its position, if anything."""
    if config.position == "learned":
        return Embedding(seq_len, config.d_model)
    if config.position == "sinusoidal":
        return SinusoidalPositions(seq_len, config.d_model, scale=config.init_std)
    return None


def places_within_documents(documents_BT: Tensor) -> Tensor:
    """How many tokens of its own document precede each one, [B, T] int64."""
    places_T = torch.arange(documents_BT.size(1), device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return places_T - (places_T * begins_BT).cummax(dim=1).values
