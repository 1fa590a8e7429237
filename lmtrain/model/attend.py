"""Scaled dot-product attention: which keys a query sees, and the implementations that compute it.

They agree but for rounding. Not here: projections, heads and positions (`attention.py`). In shapes B is batch, T time
of queries, S that of keys, H query heads, K key and value heads, C the width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Implementation = Literal["auto", "sdpa", "flex", "naive"]


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees: what the mask says if there is one, else its past if `causal`, else all."""

    causal: bool = False
    mask: Tensor | None = None  # [B or 1, T or 1, S] bool
    blocks: BlockMask | None = None  # for FlexAttention, instead of the mask


EVERYTHING = Visible()
PAST = Visible(causal=True)


def visible_past(
    length: int,
    device: torch.device,
    *,
    documents_BT: Tensor | None = None,
    window: int | None = None,
    flex: bool = False,
) -> Visible:
    """What each of `length` tokens sees: itself and those before it, of its document, within its window.

    `documents_BT` numbers the documents of each row; `window` is how many tokens are seen, the own one included. With
    `flex`, blocks without anything to see are passed over, where a mask is read whole.
    """
    if flex:
        return Visible(blocks=_blocks(length, device, documents_BT, window))
    if documents_BT is None and (window is None or window >= length):
        return PAST
    places_T = torch.arange(length, device=device)
    distances_TS = places_T.unsqueeze(1) - places_T
    mask_BTS = (distances_TS >= 0).unsqueeze(0)
    if window is not None:
        mask_BTS = mask_BTS & (distances_TS < window)
    if documents_BT is not None:
        mask_BTS = mask_BTS & (documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1))
    return Visible(mask=mask_BTS)


def chooses_flex(implementation: Implementation, device: torch.device, *, sparse: bool, dropout: float) -> bool:
    """Whether FlexAttention is taken: by `auto` on GPUs for masks, unless it would have to drop something out."""
    return implementation == "flex" or (implementation == "auto" and device.type == "cuda" and sparse and dropout == 0)


def attend(
    q_BHTC: Tensor,
    k_BKSC: Tensor,
    v_BKSC: Tensor,
    visible: Visible,
    *,
    dropout: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """Values weighted by the softmax of the scores, [B, H, T, C]; each key head serves H / K query heads."""
    num_heads, num_kv_heads = q_BHTC.size(1), k_BKSC.size(1)
    if visible.blocks is not None:
        kernel: Any = _compiled(flex_attention) if q_BHTC.is_cuda else flex_attention
        grouped = num_heads != num_kv_heads
        return cast(Tensor, kernel(q_BHTC, k_BKSC, v_BKSC, block_mask=visible.blocks, enable_gqa=grouped))
    if implementation == "naive":
        return attend_naively(q_BHTC, k_BKSC, v_BKSC, visible, dropout=dropout)
    single = q_BHTC.size(2) == 1  # one query: those of a group go together, and no key is repeated
    if single:
        q_BHTC = q_BHTC.reshape(q_BHTC.size(0), num_kv_heads, -1, q_BHTC.size(-1))
    attended_BHTC = F.scaled_dot_product_attention(
        q_BHTC,
        k_BKSC,
        v_BKSC,
        dropout_p=dropout,
        attn_mask=None if visible.mask is None else visible.mask.unsqueeze(1),
        is_causal=visible.causal and not single,
        enable_gqa=q_BHTC.size(1) != num_kv_heads,
    )
    return attended_BHTC.reshape(-1, num_heads, 1, q_BHTC.size(-1)) if single else attended_BHTC


def attend_naively(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, visible: Visible, *, dropout: float = 0.0) -> Tensor:
    """The same written out, with all scores in memory: what the other implementations are compared with."""
    groups = q_BHTC.size(1) // k_BKSC.size(1)
    k_BHSC, v_BHSC = k_BKSC.repeat_interleave(groups, dim=1), v_BKSC.repeat_interleave(groups, dim=1)
    scores_BHTS = (q_BHTC @ k_BHSC.transpose(2, 3)).float() / q_BHTC.size(-1) ** 0.5
    length, num_keys = scores_BHTS.shape[2:]
    if visible.mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~visible.mask.unsqueeze(1), -torch.inf)
    elif visible.causal and length > 1:
        future_TS = torch.ones(length, num_keys, dtype=torch.bool, device=scores_BHTS.device).triu(1)
        scores_BHTS = scores_BHTS.masked_fill(future_TS, -torch.inf)
    weights_BHTS = F.dropout(scores_BHTS.softmax(dim=-1), dropout)
    return weights_BHTS.type_as(v_BHSC) @ v_BHSC


def _blocks(length: int, device: torch.device, documents_BT: Tensor | None, window: int | None) -> BlockMask:
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if documents_BT is not None:
            seen = seen & (documents_BT[row, query] == documents_BT[row, key])
        return seen

    num_rows = None if documents_BT is None else len(documents_BT)
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    blocks: BlockMask = make(sees, num_rows, None, length, length, device=device)
    return blocks


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Uncompiled, either would hold all scores in memory."""
    return torch.compile(function)
