"""Checkpoints written while training goes on.

Tensors are copied to host memory first, which is all that training waits for; a thread writes them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lmtrain.distributed.sharding import local_part, with_local_part
from lmtrain.training.checkpoint import Checkpoint


class Checkpoints(Protocol):
    """What the trainer saves to."""

    def prepare(self, checkpoint: Checkpoint) -> None: ...

    def save(self, checkpoint: Checkpoint, *, step: int, best_step: int | None = None) -> None: ...

    def wait(self) -> None: ...


class Write(Protocol):
    """Writes a checkpoint to where it will be found."""

    def __call__(self, checkpoint: Checkpoint, *, step: int, best_step: int | None) -> object: ...


class NoCheckpoints:
    """Those of a process whose leader saves all there is."""

    def prepare(self, checkpoint: Checkpoint) -> None:
        pass

    def save(self, checkpoint: Checkpoint, *, step: int, best_step: int | None = None) -> None:
        pass

    def wait(self) -> None:
        pass


class CheckpointWriter:
    """Saves checkpoints in a thread, one at a time; training waits for the copy into host memory only.

    The copies go into buffers that are kept: two host copies of the state would be too many for a large model, so a
    checkpoint that comes before the one before is written waits for it.
    """

    def __init__(self, write: Write) -> None:
        """`write` is called in the thread."""
        self._write = write
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self, checkpoint: Checkpoint) -> None:
        """Make the buffers for checkpoints like this one, in the background.

        The system maps memory page by page at the first write, which takes longer than the copy that is to come.
        """

        def touch() -> None:
            for part, tensors in (("model", checkpoint.model), ("state", checkpoint.state)):
                for name, tensor in tensors.items():
                    buffer = self._buffer(f"{part}/{name}", local_part(tensor))
                    # Not zero_(): in this thread it would start a second team of threads beside that of training.
                    ctypes.memset(buffer.data_ptr(), 0, buffer.nbytes)

        self.wait()
        self._start(touch)

    def save(self, checkpoint: Checkpoint, *, step: int, best_step: int | None = None) -> None:
        """Copy now, write soon. Raises what went wrong with the one before (RunError)."""
        self.wait()
        copy = replace(
            checkpoint, model=self._copy("model", checkpoint.model), state=self._copy("state", checkpoint.state)
        )
        self._start(lambda: self._write(copy, step=step, best_step=best_step))

    def _start(self, work: Callable[[], object]) -> None:
        def note_errors() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=note_errors, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is left to write. Raises what went wrong (RunError)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            own = local_part(tensor.detach())
            buffer = self._buffer(f"{part}/{name}", own).copy_(own, non_blocking=True)
            copies[name] = with_local_part(tensor, buffer)
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return copies

    def _buffer(self, key: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[key] = buffer
        return buffer
