"""A bare loop over our own model, optimizer and batches: what one would write in an afternoon.

What lmtrain's own loop takes longer is the price of counting, checking, recording and being able to resume.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.batches import Batch, TrainBatches
from lmtrain.hardware import FORMATS
from lmtrain.model.building import build_model
from lmtrain.training.optimizers import build_optimizers
from lmtrain.training.precision import Precision
from lmtrain.training.schedules import lr_at


class BareLoop:
    """Forward, loss, backward, clip, step; the batches are those of lmtrain."""

    def __init__(self, config: ExperimentConfig, vocab_size: int, batches: TrainBatches, total_steps: int) -> None:
        """`config` is that of a session: nothing in it is `auto` any more."""
        torch.manual_seed(config.seed)
        self.device = torch.device(config.device)
        self.precision = Precision(self.device, FORMATS[config.precision.format])
        self.model = build_model(
            config.model, vocab_size=vocab_size, seq_len=config.data.seq_len, dropout=config.dropout
        ).to(self.device)
        self.loss_of = torch.compile(self._loss_of, dynamic=False) if config.trainer.compile else self._loss_of
        self.optimizers = build_optimizers(
            config.optimizer, self.model.parameters(), self.model.block_matrices(), config.lr
        )
        self.config = config
        self.batches = batches
        self.total_steps = total_steps
        self.step = 0
        self.losses: dict[int, float] = {}  # by the last step of a call, the mean over its steps

    def __call__(self, num_steps: int) -> None:
        losses = [self.train_on(self.batches[self.step]) for _ in range(num_steps)]
        self.losses[self.step] = torch.stack(losses).double().mean().item()

    def train_on(self, batch: Batch) -> torch.Tensor:
        """One step; returns its loss, which waits for nothing."""
        lr = lr_at(self.config.schedule, self.step, lr=self.config.lr, total_steps=self.total_steps)
        batch = batch.to(self.device)
        with self.precision.autocast():
            loss = self.loss_of(batch.inputs, batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.trainer.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.trainer.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def _loss_of(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(inputs_BT).flatten(0, 1), targets_BT.flatten())
