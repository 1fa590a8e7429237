"""A run folder: the only place that knows the names inside it."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lmtrain.errors import RunFolderError

RESULT_ROOM = 32 * 1024  # bytes; a result takes about 3 kB

PATIENCE = 0.2
"""Seconds that a lock is waited for: one who only asks whether a folder is in use has it for an instant."""


STUDY_FILE = "study.yaml"
"""In a sweep folder: what the study is that its run folders are trials of."""


CONFIG_FILE = "config.yaml"
"""What makes a folder a run folder."""


OWN_TOKENIZER = "lmtrain_tokenizer.model"
"""Our file of the tokenizer in a folder of transformers, which would take a tokenizer.model for SentencePiece's."""


class RunDir:
    """One run folder, there already or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG_FILE
        self.description = path / "run.json"  # what mirrors are told of the run
        self.metrics = path / "metrics.jsonl"
        self.histograms = path / "histograms.jsonl"  # with diagnostics
        self.result = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer.model"
        self.plots = path / "plots"
        self.profile = path / "profile"  # with trainer.profile
        self.log = path / "lmtrain.log"
        self.sample = path / "sample.txt"
        self.git_diff = path / "git.diff"
        self.lock_file = path / ".lock"
        self._lock = FileLock(self.lock_file, timeout=PATIENCE)

    def __str__(self) -> str:
        """The path for messages: from the working folder if it is below, to be pasted into the next command."""
        return os.path.relpath(self.path) if self.path.absolute().is_relative_to(Path.cwd()) else str(self.path)

    def artifacts(self) -> list[Path]:
        """The small files that tell of a run, those that are there."""
        wanted = (
            *(self.config, self.description, self.result, self.metrics, self.histograms),
            *(self.log, self.git_diff, self.sample),
        )
        return [path for path in wanted if path.exists()]

    def is_trial(self) -> bool:
        """Whether the run belongs to a study."""
        return (self.path.parent / STUDY_FILE).is_file()

    def require_no_trial(self) -> None:
        """Raise RunFolderError if the run belongs to a study, which alone goes on with it."""
        if self.is_trial():
            raise RunFolderError(
                f"{self} is a trial of a study, which goes on with it by its own command; continued alone it would no "
                f"longer be what the study compared: start from its weights with init_from={self}, or add force=true"
            )

    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    def lock(self) -> None:
        """Keep other processes out until this one ends or calls `unlock`. Raises RunFolderError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise RunFolderError(f"{self.path} is in use by another process") from None
        except OSError as error:
            raise RunFolderError(f"cannot write to {self.path}: {error.strerror}") from error

    def in_use(self) -> bool:
        """Whether a process has the lock at this moment. Creates nothing, and needs no leave to write."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
        finally:
            os.close(descriptor)  # and the lock with it
        return False

    def unlock(self) -> None:
        """Let others in again."""
        self._lock.release()

    def write_texts(self, texts: Mapping[str, str]) -> None:
        """Write files by path inside the folder."""
        for name, text in texts.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / name, text)

    def read_result(self) -> dict[str, Any] | None:
        """What `result.json` says, or None if the run has not ended. Raises RunFolderError if it is damaged."""
        try:
            result = json.loads(self.result.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.result} cannot be read: {error}") from error
        if not isinstance(result, dict) or "status" not in result:
            raise RunFolderError(f"{self.result} is damaged: it does not say how the run ended")
        return result

    def reserve_result(self) -> None:
        """Set room aside for a result, which is to be written on a full disk too. Raises OSError if there is none."""
        _write_draft(self.result, bytes(RESULT_ROOM))

    def write_result(self, content: Mapping[str, Any]) -> None:
        """Write `result.json` into the room set aside for it, so that a reader sees all of it or none."""
        text = json.dumps(_finite(content), indent=2)
        draft = _draft(self.result)
        draft.touch()
        with draft.open("r+b") as file:
            file.write(text.encode())
            file.truncate()
        draft.replace(self.result)

    def discard_if_unused(self) -> None:
        """Remove the folder, and parents left empty inside the working folder, if no run was started in it.

        A folder in use by another process stays: its run may not have written anything yet.
        """
        if self.is_run() or not self.path.is_dir():
            return
        try:
            with self._lock:
                self.lock_file.unlink(missing_ok=True)
        except (Timeout, OSError):
            return
        for folder in (self.path, *self.path.parents):
            if Path.cwd() not in folder.absolute().parents:
                return
            try:
                folder.rmdir()
            except OSError:
                return


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    _write_draft(path, text.encode()).replace(path)


def _write_draft(path: Path, content: bytes) -> Path:
    draft = _draft(path)
    try:
        draft.write_bytes(content)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return draft


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None in their place."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
