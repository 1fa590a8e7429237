"""Checkpoints: everything a run needs to go on, in one folder that is whole or not there.

`step_00001000/` holds `model.safetensors`, `training_state.safetensors` (optimizer moments, random states; absent where
a model was exported for use), `meta.json` (step, counts, scores) and `manifest.json` (format and sha256 of the others).
It is written under a temporary name, synced and renamed; `last` and `best` are links to such folders. Reading executes
no pickle.
A format newer than ours is refused, not passed over like damage: an older checkpoint would undo what was trained since.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmtrain.distributed.sharding import is_divided
from lmtrain.distributed.team import ALONE, Team
from lmtrain.errors import CheckpointError, NewerFormatError, RunError, WeightsOnlyError
from lmtrain.new_folder import sync

log = logging.getLogger(__name__)

FORMAT = 1
MODEL, STATE, META, MANIFEST = "model.safetensors", "training_state.safetensors", "meta.json", "manifest.json"
UNDIVIDED = "undivided_state.safetensors"  # beside a divided state: what each process has whole
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
    team: Team = ALONE,
) -> Checkpoint:
    """The state of a run now; the tensors are the live ones, not copies, and may be parts of those of a team."""
    states = team.gather({name: device.get_rng_state() for name, device in _random_devices().items()})
    state = {_of(rank, f"random/{name}"): value for rank, own in enumerate(states) for name, value in own.items()}
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
    team: Team = ALONE,
) -> None:
    """Put a captured state back. Raises CheckpointError if it belongs to another architecture or optimizer.

    A process that was not there when it was captured keeps the random numbers that it has.
    """
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
        if (key := _of(team.rank, f"random/{name}")) in checkpoint.state:
            device.set_rng_state(checkpoint.state[key])


def _of(rank: int, name: str) -> str:
    """The name of what each process of a team has for itself."""
    return f"{name}/{rank}" if rank else name


def divided_like(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Callable[[str, torch.Size], Tensor | None]:
    """For a name of `capture` and a shape, the parameter that such a tensor is divided like; None: it is whole."""
    parameters = dict(model.named_parameters())
    by_optimizer = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]

    def like(name: str, shape: torch.Size) -> Tensor | None:
        kind, *rest = name.split("/")
        parameter = by_optimizer[int(rest[0])][int(rest[1])] if kind == "optimizer" else parameters.get(name)
        return parameter if parameter is not None and parameter.shape == shape else None

    return like


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


class TensorFiles(Protocol):
    """How tensors are written to a safetensors file and read from one."""

    def save(self, tensors: dict[str, Tensor], path: Path) -> None: ...

    def load(self, path: Path) -> dict[str, Tensor]: ...


class WholeFiles:
    """Tensors that this process holds whole."""

    def save(self, tensors: dict[str, Tensor], path: Path) -> None:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)

    def load(self, path: Path) -> dict[str, Tensor]:
        return load_file(path)


class CheckpointFolder:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, *, keep: int = 1, files: TensorFiles | None = None) -> None:
        """`keep` newest checkpoints stay, besides the best."""
        self.folder = folder
        self.keep = keep
        self._files = files or WholeFiles()

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
            undivided = (UNDIVIDED,) if UNDIVIDED in sums else ()
            wanted = (MODEL, META) if weights_only else (MODEL, STATE, META, *undivided)
            for file in wanted:
                if _sha256(folder / file) != sums[file]:
                    raise CheckpointError(f"{folder / file} is damaged: its sha256 is not that of the manifest")
            return Checkpoint(
                model=self._files.load(folder / MODEL),
                state={
                    name: tensor
                    for file in (STATE, UNDIVIDED)
                    if file in wanted
                    for name, tensor in self._files.load(folder / file).items()
                },
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
        partial = self._draft(step)
        partial.mkdir(parents=True)
        try:
            (partial / META).write_text(json.dumps(checkpoint.meta, indent=2))
            for file in (files := self._write_tensors(checkpoint, partial)):
                shutil.copymode(partial / META, partial / file)  # made with mode 0600, whatever the umask
            sums = {file: _sha256(partial / file) for file in (*files, META)}
            (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": sums}, indent=2))
            for file in (*files, META, MANIFEST):
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

    def save_share(self, checkpoint: Checkpoint, *, step: int, best_step: int | None = None) -> None:
        """Take part in what the leader of a team does with `save`: write this process's parts of the tensors."""
        self._write_tensors(checkpoint, self._draft(step))

    def _write_tensors(self, checkpoint: Checkpoint, folder: Path) -> list[str]:
        divided: dict[str, Tensor] = {name: value for name, value in checkpoint.state.items() if is_divided(value)}
        undivided = {name: tensor for name, tensor in checkpoint.state.items() if name not in divided}
        files: dict[str, dict[str, Tensor]] = {MODEL: checkpoint.model, STATE: undivided}
        if divided:
            files |= {STATE: divided, UNDIVIDED: undivided}
        parts = {file: tensors for file, tensors in files.items() if tensors}
        for file, tensors in parts.items():
            self._files.save(tensors, folder / file)
        return list(parts)

    def _draft(self, step: int) -> Path:
        return self.folder / f".{self._step_folder(step).name}.partial"

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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
