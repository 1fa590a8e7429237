"""What a mirror is told of a run and of its multirun, kept in their folders, so that they are enough to make one.

Owns `run.json` of a run folder and `sweep.json` of a sweep folder. Knows no mirror.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from lmtrain.errors import RunFolderError
from lmtrain.run_dir import RunDir, write_atomically
from lmtrain.tracking.metrics_file import read_metrics

SWEEP_FILE = "sweep.json"

DIED = "died"
"""How a run ended that left no result: its process was killed, or the machine went down."""

_TAGS_OF_EARLIER_RESULTS = ("data_fingerprint", "tokenizer_fingerprint")
_ROOT_KEYS = ("lr", "dropout", "batch_size", "seed")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a run is trained on."""

    name: str
    digest: str  # changes with every token
    source: str  # where it came from, for people
    documents: int  # of the training split
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SweepInfo:
    """The multirun that a run belongs to."""

    id: str  # the same wherever it is mirrored
    name: str
    folder: Path
    started: float  # seconds since the epoch

    @classmethod
    def of(cls, folder: Path, name: str | None = None, started: float | None = None) -> SweepInfo:
        """That of a sweep folder; the first to ask settles it, for all processes.

        `started` is when the run began that asks.
        """
        file = folder / SWEEP_FILE
        with FileLock(folder / f".{SWEEP_FILE}.lock"):
            if not file.exists():
                new = {"id": uuid.uuid4().hex, "name": name or folder.name, "started": _begin_of(folder, started)}
                write_atomically(file, json.dumps(new, indent=2))
            content = _read_json(file)
        return cls(folder=folder, **{key: content[key] for key in ("id", "name", "started")})


@dataclass(frozen=True, kw_only=True)
class SweepEnding:
    """How a multirun ended."""

    status: str  # as of a run
    time: float
    metrics: Mapping[str, float]  # numbers about all its runs
    files: Sequence[Path]  # of its folder, worth showing
    best: Path | None  # the run folder whose model is the best

    def write(self, folder: Path) -> None:
        """Note it in the sweep folder."""
        ending = {
            "status": self.status,
            "ended": self.time,
            "metrics": dict(self.metrics),
            "files": [str(path.relative_to(folder)) for path in self.files],
            "best": None if self.best is None else str(self.best.relative_to(folder)),
        }
        write_atomically(folder / SWEEP_FILE, json.dumps(_read_json(folder / SWEEP_FILE) | ending, indent=2))

    @classmethod
    def read(cls, folder: Path) -> SweepEnding | None:
        """None if the multirun has not ended. Files that are gone are left out."""
        content = _read_json(folder / SWEEP_FILE)
        if "status" not in content:
            return None
        return cls(
            status=content["status"],
            time=content["ended"],
            metrics=content["metrics"],
            files=[folder / name for name in content["files"] if (folder / name).is_file()],
            best=None if content["best"] is None else folder / content["best"],
        )


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a mirror is told about a run when it starts."""

    id: str  # the same wherever it is mirrored
    name: str  # shown to people, for example the folder's name
    folder: Path  # the run folder
    params: Mapping[str, Any]  # swept and non-default settings
    tags: Mapping[str, str]
    origin: Mapping[str, str]  # who runs it, where, from which code: `environment.describe_origin`
    started: float  # its first attempt, in seconds since the epoch
    attempt: int = 0  # 0, then one more with every resume
    dataset: DatasetInfo | None = None
    sweep: SweepInfo | None = None

    def write(self) -> None:
        """Keep it in the run folder."""
        content = asdict(self)
        del content["folder"]
        content["sweep"] = None if self.sweep is None else os.path.relpath(self.sweep.folder, self.folder)
        write_atomically(RunDir(self.folder).description, json.dumps(content, indent=2, default=str))

    @classmethod
    def read(cls, folder: Path) -> RunInfo:
        """That of a run folder; of a run made before there was one, what the folder tells. Raises RunFolderError."""
        run = RunDir(folder)
        content = _read_json(run.description) if run.description.exists() else _derived(run)
        if content["dataset"] is not None:
            content["dataset"] = DatasetInfo(**content["dataset"])
        if content["sweep"] is not None:  # they may have been moved, together or apart
            sweep_folder = Path(os.path.normpath(folder / content["sweep"]))
            content["sweep"] = SweepInfo.of(sweep_folder) if (sweep_folder / SWEEP_FILE).exists() else None
        return cls(**content, folder=folder)


@dataclass(frozen=True, kw_only=True)
class RunEnding:
    """How a run ended."""

    status: str
    time: float  # seconds since the epoch
    summary: Mapping[str, float]  # the numbers of its result that metrics do not hold

    @property
    def succeeded(self) -> bool:
        """Whether it came to an end of its own."""
        return self.status in ("completed", "early_stopped", "pruned")

    @classmethod
    def read(cls, folder: Path) -> RunEnding:
        """That of a run folder that no process is at work in."""
        run = RunDir(folder)
        result = run.read_result()
        if result is None:
            last = max(path.stat().st_mtime for path in (run.config, run.metrics) if path.exists())
            return cls(status=DIED, time=last, summary={})
        numbers = {name: result[name] for name in ("objective", "best_step") if result[name] is not None}
        ended = result.get("ended", run.result.stat().st_mtime)  # results of earlier versions do not say
        return cls(status=result["status"], time=ended, summary=numbers)


def new_id() -> str:
    """An id for a run that has none."""
    return uuid.uuid4().hex


def _derived(run: RunDir) -> dict[str, Any]:
    """What a folder without `run.json` tells of its run; the same whenever it is asked."""
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    result, records = run.read_result() or {}, read_metrics(run.metrics) if run.metrics.exists() else []
    words = (word.lstrip("+").partition("=") for word in result.get("overrides", []))
    started = records[0]["time"] if records else run.config.stat().st_mtime
    return {
        "id": sha256(run.config.read_bytes() + repr(started).encode()).hexdigest()[:32],
        "name": run.path.name,
        "params": {key: value for key, _, value in words} | {key: config[key] for key in _ROOT_KEYS},
        "tags": {name: result[name] for name in _TAGS_OF_EARLIER_RESULTS if name in result},
        "origin": {},
        "started": started,
        "attempt": int(max((record["attempt"] for record in records), default=0)),
        "dataset": None,
        "sweep": ".." if (run.path.parent / SWEEP_FILE).exists() else None,
    }


def _begin_of(folder: Path, started: float | None) -> float:
    """When a multirun began: with its first run."""
    begun = (config.stat().st_mtime for config in folder.glob("*/config.yaml"))
    return min([time.time() if started is None else started, *begun])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read ({error}): remove it, it is made again") from error
    return content
