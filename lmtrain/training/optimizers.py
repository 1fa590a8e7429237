"""From an optimizer's config to torch optimizers over the right parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lmtrain.config.schema import (
    AdafactorConfig,
    AdamConfig,
    AdamWConfig,
    LionConfig,
    MomentsConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from lmtrain.training.lion import Lion
from lmtrain.training.muon import Muon

ADAFACTOR_EPS = 1e-15
"""Floor of a gradient's size; squared, it is the 1e-30 of the paper.

PyTorch's default floors mean squares at 1e-7, which those of a large model's gradients are below.
"""


def build_optimizers(
    config: OptimizerConfig,
    parameters: Iterable[nn.Parameter],
    block_matrices: Iterable[nn.Parameter],
    lr: float,
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter once a step, all at the learning rate `lr`.

    Weight decay is applied to matrices only, never to norms. `block_matrices` are those inside the blocks: Muon
    takes them, embeddings and the output layer stay with AdamW.
    """
    everything = list(parameters)
    groups = _decay_groups(everything, config.weight_decay)
    match config:
        case AdamWConfig():
            return [_adamw(config, groups, lr)]
        case AdamConfig():
            return [torch.optim.Adam(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)]
        case MuonConfig():
            return _muon_and_adamw(config, everything, list(block_matrices), lr)
        case SGDConfig():
            return [torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)]
        case LionConfig():
            return [Lion(groups, lr=lr, weight_decay=config.weight_decay, betas=config.betas)]
        case AdafactorConfig():
            return [_adafactor(config, groups, lr)]
    raise TypeError(f"no optimizer for {type(config).__name__}")


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(config: MomentsConfig, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def _muon_and_adamw(
    config: MuonConfig, parameters: list[nn.Parameter], matrices: list[nn.Parameter], lr: float
) -> list[torch.optim.Optimizer]:
    taken = {id(p) for p in matrices}
    muon = Muon(
        matrices,
        lr=lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
    )
    rest = _decay_groups([p for p in parameters if id(p) not in taken], config.weight_decay)
    return [muon, _adamw(config, rest, lr)]


def _adafactor(config: AdafactorConfig, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Tensor by tensor, as PyTorch does by default: grouped, it would take the memory that it is chosen to save."""
    return torch.optim.Adafactor(
        groups,
        lr=lr,
        beta2_decay=config.beta2_decay,
        eps=(ADAFACTOR_EPS, config.min_scale),
        d=config.clip_threshold,
    )


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
