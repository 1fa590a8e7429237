"""What mirrors are told of a run when it starts: from its settings, its text and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping

from lmtrain.data.prepared import PreparedData
from lmtrain.origin import Origin
from lmtrain.redaction import redact
from lmtrain.run_dir import RunDir
from lmtrain.session import Session
from lmtrain.tracking.environment import describe_origin
from lmtrain.tracking.run_info import DatasetInfo, RunInfo, SweepInfo, new_id

ROOT_KEYS = ("lr", "dropout", "batch_size", "seed")
"""Settings that are always shown: those that people sweep."""


def describe_run(
    session: Session, data: PreparedData, folder: RunDir, origin: Origin, *, started: float, attempt: int
) -> RunInfo:
    """That of an attempt that begins at `started` (seconds since the epoch); a later one is told as the same run."""
    config = session.config
    params = {**origin.changed, **{name: getattr(config, name) for name in ROOT_KEYS}}
    earlier = RunInfo.read(folder.path) if folder.description.exists() else None
    texts = {"data_fingerprint": data.fingerprint, "tokenizer_fingerprint": data.tokenizer.fingerprint}
    return RunInfo(
        id=earlier.id if earlier else new_id(),
        # The number comes first: where room is short, names lose their ends.
        name=folder.path.name if origin.sweep_dir is None else f"{folder.path.name} {config.sweep.name}",
        folder=folder.path,
        params={**params, **earlier.params} if earlier else params,
        tags={**session.tags, "data": data.name, **texts, **_trial(folder, origin)},
        origin=describe_origin(),
        started=earlier.started if earlier else started,
        attempt=attempt,
        dataset=_describe_dataset(session, data),
        sweep=None if origin.sweep_dir is None else SweepInfo.of(origin.sweep_dir, config.sweep.name, started),
    )


def _trial(folder: RunDir, origin: Origin) -> Mapping[str, str]:
    """The number of a run in its multirun: a study says it, runs of a grid have it for a name."""
    is_numbered = origin.sweep_dir is not None and folder.path.name.isdecimal()
    return {**({"trial": str(int(folder.path.name))} if is_numbered else {}), **origin.tags}


def _describe_dataset(session: Session, data: PreparedData) -> DatasetInfo:
    training = data.documents("train")
    return DatasetInfo(
        name=data.name,
        digest=data.fingerprint,
        source=redact(str(getattr(session.config.data, "path", None) or data.name)),
        documents=sum(map(len, training)),
        tokens=sum(len(one.tokens) for one in training),
    )
