"""One optimizer step: accumulate the exact gradient of the whole batch, check it, move once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lmtrain.data.batches import Batch
from lmtrain.training.losses import TrainingLoss
from lmtrain.training.optimizers import set_lr
from lmtrain.training.precision import Precision

log = logging.getLogger(__name__)

PLAIN = TrainingLoss()
"""Cross-entropy and nothing else."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step measured. The tensors are on the device; reading them waits for it."""

    loss: Tensor  # cross-entropy, mean over all targets of the step, nats; without smoothing and z-loss
    grad_norm: Tensor  # of the whole gradient, before clipping
    applied: bool  # False: not finite, nothing was changed
    overflow: bool  # ... because the fp16 loss scale was too large, which is expected now and then


class StepObserver(Protocol):
    """Sees a step from inside, unless it is dropped; must change nothing."""

    def before_update(self) -> None:
        """The gradient is whole and not clipped yet."""

    def after_update(self) -> None:
        """The optimizers have moved."""


class TrainingStep:
    """`step(batch, lr)` moves the model once.

    The loss of each microbatch is summed and divided by the target count of the *whole* batch, so the microbatch
    size changes memory and speed, never the mathematics (dropout masks aside).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        precision: Precision,
        *,
        grad_clip: float | None,
        micro_batch_size: int | None,
        loss: TrainingLoss = PLAIN,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`micro_batch_size` None starts with the whole batch; `forward` is the compiled model, if there is one."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers
        self.precision = precision
        self.scaler = precision.gradient_scaler()
        self.grad_clip = grad_clip
        self.micro_batch_size = micro_batch_size
        self._loss = loss
        self._forward = forward or model

    def __call__(self, batch: Batch, lr: float, observer: StepObserver | None = None) -> StepOutcome:
        """Raises torch.OutOfMemoryError when not even one sequence at a time fits."""
        loss = self._backward_that_fits(batch)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        applied = bool(torch.isfinite(grad_norm) & torch.isfinite(loss))
        if applied:
            if observer is not None:
                observer.before_update()
            if self.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, grad_norm)
            set_lr(self.optimizers, lr)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            if observer is not None:
                observer.after_update()
        self.scaler.update()
        self._drop_gradients()
        overflow = not applied and self.scaler.is_enabled() and bool(torch.isfinite(loss))
        return StepOutcome(loss, grad_norm, applied, overflow)

    def _backward_that_fits(self, batch: Batch) -> Tensor:
        """Gradients of the whole batch; out of memory halves the microbatch and starts the same step again."""
        while True:
            num_sequences = len(batch.inputs) // batch.rows_per_sequence
            size = min(self.micro_batch_size or num_sequences, num_sequences)
            random_state = torch.cuda.get_rng_state() if self.precision.device.type == "cuda" else None
            try:
                return self._backward(batch, size)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.micro_batch_size = (size + 1) // 2
            self._drop_gradients()
            if random_state is not None:
                torch.cuda.empty_cache()
                torch.cuda.set_rng_state(random_state)
            log.warning("out of memory at microbatch %d, going on with %d", size, self.micro_batch_size)

    def _backward(self, batch: Batch, size: int) -> Tensor:
        total = torch.zeros((), device=self.precision.device)
        for inputs_BT, targets_BT in self._microbatches(batch, size):
            with self.precision.autocast():
                objective, cross_entropy = self._loss(self._forward(inputs_BT), targets_BT)
            self.scaler.scale(objective / batch.num_targets).backward()  # type: ignore[no-untyped-call]
            total += cross_entropy / batch.num_targets
        return total

    def _microbatches(self, batch: Batch, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        device, rows = self.precision.device, size * batch.rows_per_sequence
        for inputs_BT, targets_BT in zip(
            torch.split(batch.inputs, rows), torch.split(batch.targets, rows), strict=True
        ):
            yield inputs_BT.to(device, non_blocking=True), targets_BT.to(device, non_blocking=True)

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
