"""Running out of memory: what counts as that, what a step needs, and going back to where it began.

Owns the measures; what a step should need is computed in `footprint.py`, and which microbatch to try when is the step's
(`step.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lmtrain.training.optimizers import set_lr

ALLOCATION_FAILED = ("DefaultCPUAllocator", "MPS backend out of memory", "std::bad_alloc")
"""What tells such a RuntimeError from others. CUDA raises torch.OutOfMemoryError itself, Python a MemoryError."""


@contextmanager
def out_of_memory_recognized() -> Iterator[None]:
    """Turn every kind of failed allocation into torch.OutOfMemoryError, on a CPU too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        message = str(error)
        sign = next((sign for sign in ALLOCATION_FAILED if sign in message), None)
        if isinstance(error, RuntimeError) and sign is None:
            raise
        raise torch.OutOfMemoryError(message[message.find(sign or "") :]) from error  # without the line of C++


def remember_random_state(device: torch.device) -> Callable[[], None]:
    """A function that sets the random states of CPU and device back to what they are now."""
    cpu = torch.get_rng_state()
    own = getattr(torch, device.type).get_rng_state() if device.type in ("cuda", "mps") else None

    def put_back() -> None:
        torch.set_rng_state(cpu)
        if own is not None:
            getattr(torch, device.type).set_rng_state(own)

    return put_back


@contextmanager
def optimizer_state_filled(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Let optimizers that have not moved yet hold, while entered, the state they will have once they have.

    A step at learning rate 0 with gradients of zero makes it and moves no weight: every update is a multiple of the
    rate, weight decay included. Leaves no state and no gradient.
    """
    fresh = [optimizer for optimizer in optimizers if not optimizer.state]
    groups = [group for optimizer in fresh for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    try:
        set_lr(fresh, 0.0)
        for optimizer in fresh:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for optimizer in fresh:
            optimizer.state.clear()
            optimizer.zero_grad(set_to_none=True)


@contextmanager
def leaving_no_trace(
    parameters: Iterable[Tensor], optimizers: Sequence[torch.optim.Optimizer], device: torch.device
) -> Iterator[None]:
    """Whatever steps are made while entered, by optimizers that have not moved yet: nothing of them stays.

    Weights, states and learning rates of optimizers, and random numbers are afterwards what they were, to the bit.
    Takes the memory of a copy of the weights.
    """
    rewind = remember_random_state(device)
    copies = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        with optimizer_state_filled(optimizers):
            yield
    finally:
        with torch.no_grad():
            for parameter, copy in copies:
                parameter.copy_(copy)
        rewind()


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made while entered: `peak`, the most that were alive at one time.

    On one thread, as a CPU's forward and backward pass are. Memory that kernels take for themselves is not seen.
    """

    def __init__(self, there_before: Iterable[Tensor] = ()) -> None:
        """Views of `there_before` are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in there_before}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in self._storages:
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._storages.add(storage._cdata)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage: int, size: int) -> None:
        self._storages.discard(storage)
        self._alive -= size
