"""From an optimizer's config to torch optimizers over the right parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lmtrain.config.schema import AdamWConfig, MuonConfig, OptimizerConfig
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
    match config:
        case AdamWConfig():
            return [_adamw(config, everything, lr)]
        case MuonConfig():
            matrices = list(block_matrices)
            taken = {id(p) for p in matrices}
            muon = Muon(
                matrices,
                lr=lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                nesterov=config.nesterov,
                ns_steps=config.ns_steps,
            )
            return [muon, _adamw(config, [p for p in everything if id(p) not in taken], lr)]
    raise TypeError(f"no optimizer for {type(config).__name__}")


def _adamw(config: OptimizerConfig, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
