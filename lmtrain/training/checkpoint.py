"""Checkpoints: everything a run needs to go on, in one folder that is whole or not there.

Tensors are copied to host memory first, which is all that training waits for; a thread writes them.

`step_00001000/` holds `model.safetensors`, `training_state.safetensors` (optimizer moments, random states; absent where
a model was exported for use), `meta.json` (step, counts, scores) and `manifest.json` (format and sha256 of the others).
It is written under a temporary name, synced and renamed; `last` and `best` are links to such folders. Reading executes
no pickle.
A format newer than ours is refused, not passed over like damage: an older checkpoint would undo what was trained since.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmtrain.errors import CheckpointError, NewerFormatError, RunError, WeightsOnlyError
from lmtrain.new_folder import sync

log = logging.getLogger(__name__)

FORMAT = 1
MODEL, STATE, META, MANIFEST = "model.safetensors", "training_state.safetensors", "meta.json", "manifest.json"
REMOVED = "REMOVED.txt"  # in a folder whose checkpoints were deleted: why


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory."""

    model: dict[str, Tensor]
    state: dict[str, Tensor]  # optimizer and random states, by flat name; empty: weights only
    meta: dict[str, Any]


def capture(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    meta: dict[str, Any],
) -> Checkpoint:
    """The state of a run now; the tensors are the live ones, not copies."""
    state = {f"random/{name}": device.get_rng_state() for name, device in _random_devices().items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{number}/{parameter}/{name}": value for name, value in values.items()}
    # Tied weights appear under every name but are one tensor; safetensors stores each tensor once.
    return Checkpoint(model=dict(model.named_parameters()), state=state, meta=meta | {"scaler": scaler.state_dict()})


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> None:
    """Put a captured state back. Raises CheckpointError if it belongs to another architecture or optimizer."""
    load_weights(model, checkpoint.model)
    for number, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        whole["state"] = {}
        for name, value in checkpoint.state.items():
            kind, *rest = name.split("/")
            if kind == "optimizer" and int(rest[0]) == number:
                whole["state"].setdefault(int(rest[1]), {})[rest[2]] = value
        optimizer.load_state_dict(whole)
    if checkpoint.meta["scaler"]:
        scaler.load_state_dict(checkpoint.meta["scaler"])
    for name, device in _random_devices().items():
        if f"random/{name}" in checkpoint.state:
            device.set_rng_state(checkpoint.state[f"random/{name}"])


def _random_devices() -> dict[str, Any]:
    """Where this process draws random numbers: modules with `get_rng_state` and `set_rng_state`."""
    devices: dict[str, Any] = {"cpu": torch.random}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices["cuda"] = torch.cuda
    if torch.mps.is_available():
        devices["mps"] = torch.mps
    return devices


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model. Raises CheckpointError unless names and shapes are the same."""
    parameters = dict(model.named_parameters())
    ours = {name: tuple(p.shape) for name, p in parameters.items()}
    theirs = {name: tuple(w.shape) for name, w in weights.items()}
    if ours != theirs:
        name = min(ours.items() ^ theirs.items())[0]
        raise CheckpointError(
            f"the checkpoint is of another model: {name} is {theirs.get(name, 'absent')} there, "
            f"{ours.get(name, 'absent')} here"
        )
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


class CheckpointFolder:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, *, keep: int = 1) -> None:
        """`keep` newest checkpoints stay, besides the best."""
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint, *, step: int, best_step: int | None = None) -> Path:
        """Write a checkpoint, set the links and drop those no longer kept.

        Raises RunError if it cannot be written (disk full); the one before stays as it was.
        """
        try:
            final = self.write(checkpoint, step=step)
            self.link(step=step, best_step=best_step)
            self._drop_old()
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"cannot write the checkpoint {self._step_folder(step)}: {getattr(error, 'strerror', None) or error}\n"
                f"those before it are whole; when this is mended, go on with resume={self.folder.parent}"
            ) from error
        return final

    def link(self, *, step: int, best_step: int | None) -> None:
        """Let `last` be the checkpoint of `step` and `best` that of `best_step`, if there is one.

        Done with every checkpoint and when resuming: a kill may have come after a rename and before its links.
        """
        self._point("last", self._step_folder(step))
        if best_step is not None and self._step_folder(best_step).is_dir():
            self._point("best", self._step_folder(best_step))

    def load(self, name: str = "last", *, weights_only: bool = False) -> Checkpoint:
        """Read `last`, `best` or a step's folder, checking the sum of each file that is read.

        `weights_only`: not what only training needs. Raises CheckpointError; NewerFormatError, WeightsOnlyError.
        """
        folder = self.folder / name
        self.require_not_removed()
        if not folder.is_dir():
            raise CheckpointError(f"there is no checkpoint {folder}")
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if manifest["format"] > FORMAT:
                raise NewerFormatError(
                    f"{folder} was written by a newer version of lmtrain (format {manifest['format']}, this one "
                    f"reads up to {FORMAT}): go on with that version"
                )
            sums = manifest["sha256"]
            if set(sums) == {MODEL, META} and not weights_only:
                raise WeightsOnlyError(
                    f"{folder} holds weights only, nothing to resume from: start from them with "
                    f"init_from={self.folder.parent}"
                )
            for file in (MODEL, META) if weights_only else (MODEL, STATE, META):
                if _sha256(folder / file) != sums[file]:
                    raise CheckpointError(f"{folder / file} is damaged: its sha256 is not that of the manifest")
            return Checkpoint(
                model=load_file(folder / MODEL),
                state={} if weights_only else load_file(folder / STATE),
                meta=json.loads((folder / META).read_text()),
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from error

    def has_any(self) -> bool:
        """Whether there is something to continue from."""
        return any(self.folder.glob("step_*"))

    def remove_all(self, why: str) -> None:
        """Delete every checkpoint of a run that has ended, leaving a note."""
        (self.folder / REMOVED).write_text(f"{why}\n", encoding="utf-8")
        for name in ("last", "best"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in sorted(self.folder.glob("step_*")):
            shutil.rmtree(folder)

    def require_not_removed(self) -> None:
        """Raise CheckpointError if the checkpoints have been here and were deleted."""
        note = self.folder / REMOVED
        if note.exists() and not self.has_any():
            raise CheckpointError(
                f"{self.folder} was emptied: {note.read_text(encoding='utf-8').strip()}\n"
                "train it again in another folder with "
                f"--config-dir {self.folder.parent} --config-name config"
            )

    def load_newest(self, *, weights_only: bool = False) -> Checkpoint:
        """Read the newest checkpoint that is sound, warning of damaged ones; see `load`.

        Raises CheckpointError if none is, NewerFormatError or WeightsOnlyError if one that would be used is of those.
        """
        folders = sorted(self.folder.glob("step_*"), reverse=True)
        for folder in folders:
            try:
                return self.load(folder.name, weights_only=weights_only)
            except (NewerFormatError, WeightsOnlyError):
                raise
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
        raise CheckpointError(f"there is no {'sound ' if folders else ''}checkpoint in {self.folder}")

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def write(self, checkpoint: Checkpoint, *, step: int) -> Path:
        """Write a checkpoint and nothing else: no link, nothing dropped. Raises OSError, SafetensorError."""
        started, final = time.monotonic(), self._step_folder(step)
        for left_over in self.folder.glob(".step_*.partial"):  # by a kill
            shutil.rmtree(left_over)
        partial = final.with_name(f".{final.name}.partial")
        partial.mkdir(parents=True)
        try:
            (partial / META).write_text(json.dumps(checkpoint.meta, indent=2))
            parts = {MODEL: checkpoint.model} | ({STATE: checkpoint.state} if checkpoint.state else {})
            for file, tensors in parts.items():
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / file)
                shutil.copymode(partial / META, partial / file)  # made with mode 0600, whatever the umask
            sums = {file: _sha256(partial / file) for file in (*parts, META)}
            (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": sums}, indent=2))
            for file in (*parts, META, MANIFEST):
                sync(partial / file)
            sync(partial)
            if final.exists():  # left by an attempt that was killed just before it pointed `last` here
                shutil.rmtree(final)
            partial.rename(final)
        except BaseException:  # give the room back: others need it on a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(self.folder)
        log.debug("wrote %s in %.2f s", final, time.monotonic() - started)
        return final

    def _point(self, name: str, target: Path) -> None:
        """Make a link name → target, replacing an older one in one move."""
        link = self.folder / name
        if link.is_symlink() and link.readlink() == Path(target.name):
            return
        new = self.folder / f".{name}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(target.name)
        new.replace(link)

    def _drop_old(self) -> None:
        """Those linked always stay: damaged folders of later steps can make `last` look old."""
        linked = {(self.folder / name).resolve() for name in ("last", "best")}
        for folder in sorted(self.folder.glob("step_*"))[: -self.keep]:
            if folder.resolve() not in linked:
                shutil.rmtree(folder)


class CheckpointWriter:
    """Saves checkpoints in a thread, one at a time; training waits for the copy into host memory only.

    The copies go into buffers that are kept: two host copies of the state would be too many for a large model, so a
    checkpoint that comes before the one before is written waits for it.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
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
                    buffer = self._buffer(f"{part}/{name}", tensor)
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
        self._start(lambda: self._folder.save(copy, step=step, best_step=best_step))

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
        copies = {
            name: self._buffer(f"{part}/{name}", tensor).copy_(tensor.detach(), non_blocking=True)
            for name, tensor in tensors.items()
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return copies

    def _buffer(self, key: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[key] = buffer
        return buffer


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
