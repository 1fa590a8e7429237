"""Checkpoints: everything a run needs to go on, in one folder that is whole or not there.

Tensors are copied to host memory first, which is all that training waits for; a thread writes them.

`step_00001000/` holds `model.safetensors`, `training_state.safetensors` (optimizer moments, random states),
`meta.json` (step, counts, scores) and `manifest.json` (format and sha256 of the others). It is written under a
temporary name, synced and renamed; `last` and `best` are links to such folders. Reading executes no pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmtrain.errors import CheckpointError, RunError

log = logging.getLogger(__name__)

FORMAT = 1
MODEL, STATE, META, MANIFEST = "model.safetensors", "training_state.safetensors", "meta.json", "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory."""

    model: dict[str, Tensor]
    state: dict[str, Tensor]  # optimizer and random states, by flat name
    meta: dict[str, Any]


def capture(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    meta: dict[str, Any],
) -> Checkpoint:
    """The state of a run now; the tensors are the live ones, not copies."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["random/cuda"] = torch.cuda.get_rng_state()
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
    torch.set_rng_state(checkpoint.state["random/cpu"].cpu())
    if "random/cuda" in checkpoint.state and torch.cuda.is_available():
        torch.cuda.set_rng_state(checkpoint.state["random/cuda"].cpu())


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

    def save(self, checkpoint: Checkpoint, *, step: int, best: bool) -> Path:
        """Write a checkpoint, point `last` (and `best`) at it and drop those no longer kept.

        Raises RunError if it cannot be written (disk full); the one before stays as it was.
        """
        final = self.folder / f"step_{step:08d}"
        self._write(checkpoint, final)
        self._point("last", final)
        if best:
            self._point("best", final)
        self._drop_old()
        return final

    def load(self, name: str = "last") -> Checkpoint:
        """Read `last`, `best` or a step's folder, checking every sum. Raises CheckpointError."""
        folder = self.folder / name
        if not folder.is_dir():
            raise CheckpointError(f"there is no checkpoint {folder}")
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if manifest["format"] > FORMAT:
                raise CheckpointError(f"{folder} was written by a newer version (format {manifest['format']})")
            for file, digest in manifest["sha256"].items():
                if _sha256(folder / file) != digest:
                    raise CheckpointError(f"{folder / file} is damaged: its sha256 is not that of the manifest")
            return Checkpoint(
                model=load_file(folder / MODEL),
                state=load_file(folder / STATE),
                meta=json.loads((folder / META).read_text()),
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from error

    def has_any(self) -> bool:
        """Whether there is something to continue from."""
        return any(self.folder.glob("step_*"))

    def load_newest(self) -> Checkpoint:
        """Read the newest checkpoint that is sound, warning of damaged ones. Raises CheckpointError if none is."""
        damage = [f"there is no checkpoint in {self.folder}"]
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            try:
                return self.load(folder.name)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
                damage.append(str(error))
        raise CheckpointError(damage[-1])

    def _write(self, checkpoint: Checkpoint, final: Path) -> None:
        partial = final.with_name(f".{final.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({k: v.detach().contiguous() for k, v in checkpoint.model.items()}, partial / MODEL)
            save_file({k: v.contiguous() for k, v in checkpoint.state.items()}, partial / STATE)
            (partial / META).write_text(json.dumps(checkpoint.meta, indent=2))
            sums = {file: _sha256(partial / file) for file in (MODEL, STATE, META)}
            (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": sums}, indent=2))
            for file in (MODEL, STATE, META, MANIFEST):
                _sync(partial / file)
            _sync(partial)
            if final.exists():  # left by an attempt that was killed just before it pointed `last` here
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(f"cannot write the checkpoint {final}: {error}") from error

    def _point(self, name: str, target: Path) -> None:
        """Make a link name → target, replacing an older one in one move."""
        link = self.folder / f".{name}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.folder / name)

    def _drop_old(self) -> None:
        best = (self.folder / "best").resolve()
        steps = sorted(self.folder.glob("step_*"))
        for folder in steps[: -self.keep]:
            if folder.resolve() != best:
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

    def save(self, checkpoint: Checkpoint, *, step: int, best: bool) -> None:
        """Copy now, write soon. Raises what went wrong with the one before (RunError)."""
        self.wait()
        copy = Checkpoint(
            model=self._copy("model", checkpoint.model),
            state=self._copy("state", checkpoint.state),
            meta=checkpoint.meta,
        )

        def write() -> None:
            try:
                self._folder.save(copy, step=step, best=best)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=False)
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
            key = f"{part}/{name}"
            source = tensor.detach()
            if key not in self._buffers or self._buffers[key].shape != source.shape:
                self._buffers[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            copies[name] = self._buffers[key].copy_(source, non_blocking=True)
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return copies


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
