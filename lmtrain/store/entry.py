"""One model of a store: a run folder with `model.json` beside its files. Making one; whether one is as it was made.

Knows no store: where entries lie, and which numbers they get, is that of `folder.py` and `registry.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtrain.config.saved import saved_model
from lmtrain.data.tokenizer import Tokenizer, load_tokenizer
from lmtrain.errors import CheckpointError, ModelStoreError, WeightsOnlyError
from lmtrain.reading import RecordedRun, read_run
from lmtrain.redaction import redact
from lmtrain.run_dir import RunDir
from lmtrain.store.naming import ModelId
from lmtrain.tracking.environment import describe_environment

if TYPE_CHECKING:
    from lmtrain.training.checkpoint import Checkpoint

FORMAT = 1
METADATA = "model.json"

Metadata = dict[str, Any]
"""What `model.json` holds; `docs/store.md` lists it."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A line of a list of models."""

    name: str
    version: int
    parameters: int | None = None
    bytes: int | None = None  # of all its files
    objective_name: str | None = None
    objective: float | None = None
    data: str | None = None
    created: str | None = None  # ISO 8601, UTC
    aliases: tuple[str, ...] = ()
    problem: str | None = None  # why nothing more is known of it

    @property
    def id(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True, kw_only=True)
class NewEntry:
    """What an entry will be, read and in memory."""

    run: RecordedRun
    saved: Checkpoint
    metadata: Metadata  # yet without a name, and without sums

    @classmethod
    def read(cls, run: Path, *, checkpoint: str | None, weights_only: bool) -> NewEntry:
        """Read a checkpoint of a run.

        Args:
            checkpoint: `last`, `best` or the number of a step; None: the best if there is one, else the newest.
            weights_only: without what only training needs.

        Raises:
            UsageError: there is no such run or checkpoint, or a file is damaged.
        """
        from lmtrain.training.chosen_checkpoint import load_chosen

        require_as_saved(run)
        recorded = read_run(run)
        try:
            saved = load_chosen(recorded.folder, checkpoint, weights_only=weights_only)
        except WeightsOnlyError as error:
            raise CheckpointError(f"{recorded.folder} has weights and no training state: add --weights-only") from error
        metadata = describe(
            recorded,
            saved.meta,
            load_tokenizer(recorded.folder.tokenizer),
            num_parameters=sum(weight.numel() for weight in saved.model.values()),
            has_training_state=bool(saved.state),
        )
        return cls(run=recorded, saved=saved, metadata=metadata)

    def write(self, to: Path, *, name: str, version: int | None) -> Metadata:
        """Write its files, `model.json` last, into an empty folder; returns what that holds.

        `version`: None where a registry gives it later. Raises OSError, SafetensorError.
        """
        from lmtrain.training.checkpoint import CheckpointFolder

        source, copy = self.run.folder, RunDir(to)
        for path in (source.config, source.description, source.result):
            if path.exists():
                (to / path.name).write_text(redact(path.read_text(encoding="utf-8")), encoding="utf-8")
        for path in (source.tokenizer, source.metrics, source.sample):
            if path.exists():
                (to / path.name).write_bytes(path.read_bytes())
        CheckpointFolder(copy.checkpoints).write(self.saved, step=self.metadata["step"])
        return _seal(to, self.metadata, name=name, version=version)


def describe(
    run: RecordedRun,
    checkpoint: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    num_parameters: int,
    has_training_state: bool,
) -> Metadata:
    """What is to be known of a checkpoint of a run, as plain values; `checkpoint`: its `meta.json`."""
    progress, result = checkpoint["progress"], run.result or {}
    metrics: dict[str, float | None] = {}
    for record in run.records:
        if record["step"] <= progress["step"]:
            metrics |= {key: value if math.isfinite(value) else None for key, value in record.items() if "/" in key}
    objectives = run.config["objective"]
    objective = objectives if isinstance(objectives, str) else objectives[0]
    architecture, seq_len = saved_model(run.folder.config.read_text(encoding="utf-8"))
    environment = result.get("environment") or describe_environment()
    origin, dataset = _told_of(run.folder)
    return {
        "step": progress["step"],
        "tokens": progress.get("tokens"),
        "parameters": num_parameters,
        "objective": {"name": objective, "value": metrics.get(objective, progress.get("last_score"))},
        "metrics": metrics,
        "architecture": {
            "kind": type(architecture).__name__.removesuffix("Config"),
            **asdict(architecture),
            "seq_len": seq_len,
        },
        "data": {
            "name": redact(dataset["name"]) if "name" in dataset else None,
            "fingerprint": checkpoint.get("data_fingerprint"),
        },
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        "training_state": has_training_state,
        "run": run.folder.path.resolve().name,
        "status": run.status,
        "git_commit": origin.get("git.commit"),
        "python": environment["python"],
        "libraries": environment["libraries"],
    }


def _told_of(run: RunDir) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """Which code a run is of, and which data, as far as its folder says."""
    try:
        told = json.loads(run.description.read_bytes())
        return told["origin"], told["dataset"] or {}
    except (OSError, ValueError, KeyError):  # of an earlier version, or torn
        return {}, {}


def _seal(folder: Path, metadata: Metadata, *, name: str, version: int | None) -> Metadata:
    """Write `model.json` over the files of an entry, with their sums and its own; returns what it holds."""
    paths = {file: folder / file for file in _files(folder)}
    sizes = {file: path.stat().st_size for file, path in paths.items()}
    whole = {
        "format": FORMAT,
        "id": str(ModelId(name=name, version=version)),
        "name": name,
        "version": version,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **metadata,
        "bytes": sum(sizes.values()),
        "files": {file: {"bytes": sizes[file], "sha256": _sha256(path)} for file, path in paths.items()},
    }
    whole["sha256"] = _sum(whole)
    (folder / METADATA).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return whole


def is_entry(folder: Path) -> bool:
    """Whether a run folder is that of a model in a store."""
    return (folder / METADATA).is_file()


def read_metadata(folder: Path) -> Metadata:
    """What `model.json` of an entry holds. Raises ModelStoreError if it is not there, or not as it was written."""
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_bytes())
        if metadata["format"] > FORMAT:
            raise ModelStoreError(f"{path} was written by a newer version of lmtrain: use that version")
        sound = metadata["sha256"] == _sum(metadata) and isinstance(metadata["files"], dict)
    except OSError as error:
        raise ModelStoreError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelStoreError(f"{path} is damaged: it is not the metadata of a model") from error
    if not sound:
        raise ModelStoreError(f"{path} was changed: its sha256 sum is not the one it was written with")
    return dict(metadata)


def problems(folder: Path) -> list[str]:
    """What of an entry is not as it was saved: a line for each file that is changed, missing or extra."""
    try:
        noted = read_metadata(folder)["files"]
    except ModelStoreError as error:
        return [str(error)]
    there = set(_files(folder))
    found = [f"missing: {name}" for name in sorted(noted.keys() - there)]
    found += [f"extra: {name}" for name in sorted(there - noted.keys())]
    found += [
        f"changed: {name}"
        for name in sorted(noted.keys() & there)
        if (folder / name).is_symlink() or _sha256(folder / name) != noted[name]["sha256"]
    ]
    return found


def require_as_saved(folder: Path) -> None:
    """Raise ModelStoreError, naming the files, if a run folder is an entry that was changed. Reads all of an entry."""
    if is_entry(folder) and (found := problems(folder)):
        raise ModelStoreError(f"the model in {RunDir(folder)} is not as it was saved: {'; '.join(found)}")


def _sum(metadata: Mapping[str, Any]) -> str:
    """The sum of metadata, but for the sum that it holds."""
    content = {key: value for key, value in metadata.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """Everything below a folder that is no folder, but its metadata; links are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = (Path(parent) / name).relative_to(folder).as_posix()
            if path != METADATA:
                yield path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
