"""Batches made ready in a thread while the step before them runs, so that training does not wait for them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from lmtrain.data.batches import Batch


class Addressed(Protocol):
    """Batches by step."""

    def __getitem__(self, step: int) -> Batch: ...


class Prefetched:
    """The same batches by step. Asking for one begins to make the next, up to the last of the run.

    A batch depends on its step alone, so it does not matter when and where it is made, nor whether it is used.
    An error of the thread is raised where the batch is asked for.
    """

    def __init__(self, batches: Addressed, *, num_steps: int, pin_memory: bool) -> None:
        """With `pin_memory`, which needs a CUDA device, batches can be moved to it while something else runs."""
        self._batches = batches
        self._num_steps = num_steps
        self._pin_memory = pin_memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def __getitem__(self, step: int) -> Batch:
        begun, self._next = self._next, None
        batch = begun[1].result() if begun is not None and begun[0] == step else self._make(step)
        if step + 1 < self._num_steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return batch

    def _make(self, step: int) -> Batch:
        batch = self._batches[step]
        return batch.pin_memory() if self._pin_memory else batch

    def close(self) -> None:
        """End the thread; what it was making is dropped."""
        self._thread.shutdown(cancel_futures=True)
