"""One optimizer step: accumulate the exact gradient of the whole batch, check it, move once.

Owns how many sequences go through the model at a time, and finds that number.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lmtrain.data.batches import Batch
from lmtrain.distributed.sharding import gathered, is_divided
from lmtrain.distributed.strategy import PassBy, passing_alone
from lmtrain.distributed.team import ALONE, Team
from lmtrain.training.compilation import repeatable
from lmtrain.training.losses import TrainingLoss
from lmtrain.training.memory import (
    PeakMemory,
    optimizer_state_filled,
    out_of_memory_recognized,
    remember_random_state,
)
from lmtrain.training.optimizers import move_if, set_lr
from lmtrain.training.precision import Precision

log = logging.getLogger(__name__)

PLAIN = TrainingLoss()
"""Cross-entropy and nothing else."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step measured. All are on the device; reading them waits for it."""

    loss: Tensor  # cross-entropy, mean over all targets of the step, nats; without smoothing and z-loss
    grad_norm: Tensor  # of the whole gradient, before clipping
    applied: Tensor  # bool; False: not finite, nothing was changed
    overflow: Tensor  # bool; ... because the fp16 loss scale was too large, which is expected now and then


class Losses(Protocol):
    """From a batch to what is minimised, and the cross-entropy: each summed over the targets."""

    def __call__(
        self,
        forward: Callable[..., Tensor],
        loss: TrainingLoss,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        context: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]: ...


def losses_of(
    forward: Callable[..., Tensor],
    loss: TrainingLoss,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    context: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """What is compiled: nothing of the optimizer, so that settings such as a learning rate are no part of the code."""
    if loss.positions is None or targets_BT.numel() <= loss.positions:
        return loss(forward(inputs_BT, **context), targets_BT)
    reading_out: Callable[..., tuple[Tensor, Tensor]] = forward  # type: ignore[assignment]  # then not logits
    return reading_out(inputs_BT, read_out=functools.partial(loss.of_hidden, targets_BT), **context)


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
        forward: Callable[..., Tensor] | None = None,
        pass_by: PassBy = passing_alone,
        team: Team = ALONE,
    ) -> None:
        """`micro_batch_size` None: the whole batch, or what `find_micro_batch_size` finds, until memory runs out.

        `forward` is the model as it is called if not as it is: divided among the processes of a team, each of which is
        given its share of every batch; `pass_by` is then entered around each pass.
        """
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers
        self.precision = precision
        self.scaler = precision.gradient_scaler()
        self.grad_clip = grad_clip
        self.micro_batch_size = micro_batch_size
        # Elsewhere there is no queue that reading would drain; divided parameters PyTorch updates without a condition.
        self.reads_at_once = precision.device.type != "cuda" or any(map(is_divided, self.parameters))
        self._loss = loss
        self.forward = model if forward is None else forward
        self._losses: Losses = losses_of
        self._repeatable: Callable[[], AbstractContextManager[None]] = nullcontext
        self._pass_by = pass_by
        self._team = team

    @out_of_memory_recognized()
    def __call__(self, batch: Batch, lr: float, observer: StepObserver | None = None) -> StepOutcome:
        """Waits for no GPU, but where an observer looks on.

        Raises torch.OutOfMemoryError when not even one sequence at a time fits.
        """
        loss = self._team.add_up(self._backward_that_fits(batch, self.forward))
        norm = self._gradient_norm()
        grad_norm = gathered(norm)
        finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
        self._update(lr, norm, finite, observer)
        self.scaler.update()
        self._drop_gradients()
        # With a scale, a gradient that is not finite under a loss that is means that it was too large.
        overflow = ~finite & torch.isfinite(loss) if self.scaler.is_enabled() else torch.zeros_like(finite)
        return StepOutcome(loss, grad_norm, finite, overflow)

    def compile(self, *, dynamic: bool) -> None:
        """Compile forward pass, loss and so the backward pass, when the next one is made.

        `dynamic`: one code for batches of all sizes, where they vary; else one for each size. Which sizes came before
        shall not matter to the result.
        """
        self._losses = torch.compile(losses_of, dynamic=dynamic)
        self._repeatable = repeatable

    def run_eagerly(self) -> None:
        """Undo `compile`."""
        self._losses, self._repeatable = losses_of, nullcontext

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run eagerly while entered."""
        before = self._losses, self._repeatable
        self.run_eagerly()
        try:
            yield
        finally:
            self._losses, self._repeatable = before

    def dry_pass(self, batch: Batch) -> None:
        """Forward and backward pass of the first microbatch, which leave no trace; waits for the device."""
        size = min(self.micro_batch_size or batch.num_sequences, batch.num_sequences)
        rewind = remember_random_state(self.precision.device)
        try:
            self._backward(next(batch.split(size)), size, self.forward).item()
        finally:
            self._drop_gradients()
            rewind()

    def _gradient_norm(self) -> Tensor:
        """Of the whole gradient, freed of the loss scale."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _update(self, lr: float, norm: Tensor, finite: Tensor, observer: StepObserver | None) -> None:
        """Clip and move, if all is finite."""
        if (self.reads_at_once or observer is not None) and not finite:
            return
        if observer is not None:
            observer.before_update()
        if self.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        set_lr(self.optimizers, lr)
        with record_function("optimizer"):
            for optimizer in self.optimizers:
                if self.reads_at_once:
                    optimizer.step()
                else:
                    move_if(optimizer, finite)
        if observer is not None:
            observer.after_update()

    def find_micro_batch_size(
        self, largest: Batch, *, room: float | None, beside: float = 0, bound: float = math.inf
    ) -> None:
        """Settle `micro_batch_size`, unless it is known, by a dry step over the largest batch of the run.

        A dry step is forward and backward beside the state that the optimizers will hold: of the whole batch, and of
        halves and quarters until one fits. It leaves no gradient, no state, and the random numbers where they were.

        `room` is None where the device refuses what it does not have. Main memory is promised without being there and
        the system kills who takes it. So where `room` bytes are free, no dry step of more is tried, by measure of the
        first two sequences; and none is needed if all sequences, of about `bound` bytes each, take half the room. What
        training takes `beside` weights, gradients and sequences has to find room as well.

        Raises torch.OutOfMemoryError when not even one sequence fits.
        """
        if self.micro_batch_size is not None:
            return
        size = largest.num_sequences
        if room is None or size * bound + beside > room / 2:
            rewind = remember_random_state(self.precision.device)
            try:
                with out_of_memory_recognized():
                    self.micro_batch_size = size if room is None else self._likely_to_fit(largest, room, beside)
                    with optimizer_state_filled(self.optimizers):
                        self._backward_that_fits(largest, self.model if self._team.has_others else self.forward)
            finally:
                self._drop_gradients()
                rewind()
        self.micro_batch_size = self._team.least(self.micro_batch_size or size)

    def _likely_to_fit(self, batch: Batch, room: float, beside: float) -> int:
        """The largest microbatch that should fit into `room` bytes, by what one and two sequences take."""
        size, one = batch.num_sequences, self._measure(batch, 1)
        growth = self._measure(batch, 2) - one  # without the gradients of the weights, which do not grow
        while size > 1 and one + (size - 1) * growth + beside > room:
            size = half(size)
        if size < batch.num_sequences:
            log.info("microbatch %d: the whole batch would not fit into %.2f GiB of memory", size, room / 2**30)
        return size

    def _measure(self, batch: Batch, size: int) -> int:
        """Bytes that the first `size` sequences take at the most, gradients of the weights included."""
        few = next(batch.split(size))
        with PeakMemory(self.parameters) as memory:
            self._backward(few, size, self.model, losses_of)
        self._drop_gradients()
        return int(memory.peak)

    def _backward_that_fits(self, batch: Batch, forward: Callable[..., Tensor]) -> Tensor:
        """Gradients of the whole batch; out of memory halves the microbatch and starts the same step again.

        With the same random numbers: the outcome is that of a step begun with the smaller microbatch, to the bit.
        """
        rewind = remember_random_state(self.precision.device)
        while True:
            size = min(self.micro_batch_size or batch.num_sequences, batch.num_sequences)
            try:
                return self._backward(batch, size, forward)
            except torch.OutOfMemoryError:
                if size == 1 or (self._team.has_others and forward is self.forward):  # they are in the same step
                    raise
                self.micro_batch_size = half(size)
            self._drop_gradients()
            if self.precision.device.type == "cuda":
                torch.cuda.empty_cache()
            rewind()
            log.warning("out of memory at microbatch %d, going on with %d", size, self.micro_batch_size)

    @out_of_memory_recognized()
    def _backward(
        self, batch: Batch, size: int, forward: Callable[..., Tensor], losses: Losses | None = None
    ) -> Tensor:
        total = torch.zeros((), device=self.precision.device)
        num_targets = max(1, batch.num_targets)  # of a batch without targets the loss is 0, and so is the gradient
        parts = list(batch.split(size))
        for number, part in enumerate(parts, start=1):
            with self._pass_by(number == len(parts)), self._repeatable():
                part = part.to(self.precision.device)
                with record_function("forward"), self.precision.autocast():
                    objective, cross_entropy = (losses or self._losses)(
                        forward, self._loss, part.inputs, part.targets, part.context
                    )
                with record_function("backward"):
                    self.scaler.scale(objective / num_targets).backward()  # type: ignore[no-untyped-call]
            total += cross_entropy / num_targets
        return total

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def half(size: int) -> int:
    """Of a microbatch that was too large, rounded up."""
    return (size + 1) // 2
