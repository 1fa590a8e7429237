"""Activation checkpointing: memory for time, by computing activations again in the backward pass (arXiv:1604.06174).

Owns what is kept and what is computed again. The model knows nothing of it: its blocks are wrapped from outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

MATRIX_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
"""Results that `selective` keeps: most of a block's arithmetic, in about half of the memory.

Not those of attention: fused kernels draw dropout themselves, and one not run again would put later draws out of step.
"""


def checkpoint_activations(blocks: Iterable[nn.Module], mode: Literal["none", "selective", "full"]) -> None:
    """Make every block keep only its input (`full`) or also the results of its matrix products (`selective`).

    The rest is computed again when the backward pass needs it, with the same dropout: gradients are the same, to the
    bit where the device's kernels repeat to the bit. Without gradients (evaluation, generation) nothing changes.
    """
    if mode == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS)
    for block in blocks:
        block.forward = functools.partial(_checkpointed, block.forward, settings)


def _checkpointed(forward: Callable[..., Tensor], settings: dict[str, Any], *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    output: Tensor = checkpoint(forward, *inputs, **settings)
    return output
