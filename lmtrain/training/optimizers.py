"""From an optimizer's config to torch optimizers over the right parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

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
from lmtrain.distributed.sharding import is_divided
from lmtrain.training import torch_optimizers
from lmtrain.training.adafactor import Adafactor
from lmtrain.training.lion import Lion
from lmtrain.training.muon import Muon


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
            return [torch_optimizers.Adam(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)]
        case MuonConfig():
            return _muon_and_adamw(config, everything, list(block_matrices), lr)
        case SGDConfig():
            fused = not any(map(is_divided, everything))  # PyTorch has no fused SGD for divided parameters
            return [
                torch_optimizers.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
            ]
        case LionConfig():
            return [Lion(groups, lr=lr, weight_decay=config.weight_decay, betas=config.betas)]
        case AdafactorConfig():
            return [
                Adafactor(
                    groups,
                    lr=lr,
                    weight_decay=config.weight_decay,
                    beta2_decay=config.beta2_decay,
                    min_scale=config.min_scale,
                    clip_threshold=config.clip_threshold,
                )
            ]
    raise TypeError(f"no optimizer for {type(config).__name__}")


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(config: MomentsConfig, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch_optimizers.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


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


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def move_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Let an optimizer make its step if `finite` (a bool tensor) holds, and change nothing if not.

    Decided on the device, so that nothing waits for it, by those that can: they read `found_inf` as they do under
    `torch.amp.GradScaler`. Not by others, and not before there is state to leave as it is: fused SGD would keep
    unset memory as its momentum.
    """
    if not optimizer.state or not getattr(optimizer, "_step_supports_amp_scaling", False):
        if finite:
            optimizer.step()
        return
    told: Any = optimizer
    told.grad_scale, told.found_inf = None, (~finite).float()
    try:
        optimizer.step()
    finally:
        del told.grad_scale, told.found_inf
