"""Every tracker with a reader of what it holds, by the libraries of its makers and not by ours."""

from __future__ import annotations

import json
import math
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.config.schema import TrackingConfig

Point = tuple[str, int, float, float | str]
"""Metric, step, seconds since the epoch, value; `nan` is a word, to be equal to itself."""


@dataclass(frozen=True)
class Held:
    """What a mirror holds of a run."""

    points: list[Point]  # sorted; one that is there twice is here twice
    params: Mapping[str, Any]
    succeeded: bool | None  # None: it goes on


def _plain(value: float) -> float | str:
    return "nan" if math.isnan(value) else value


def points_of(records: Iterable[Mapping[str, float]], kept: Callable[[float], float] = float) -> list[Point]:
    """The points of the records of a run, as a mirror should hold them."""
    points = [
        (key, int(record["step"]), record["time"], _plain(kept(record[key])))
        for record in records
        for key in record.keys() - {"step", "time", "attempt"}
    ]
    return sorted(points, key=str)


# ------------------------------------------------------------------------------------------------------- MLflow


def _double(value: float) -> float:
    """MLflow keeps the largest double for an infinity."""
    return value if math.isnan(value) else max(-sys.float_info.max, min(sys.float_info.max, value))


def read_mlflow(folder: Path, uri: str) -> Held:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(json.loads((folder / "mlflow_run.json").read_text())["run_id"])
    points = [
        (point.key, point.step, point.timestamp / 1000, _plain(point.value))
        for key in run.data.metrics
        if not key.startswith("summary/")
        for point in client.get_metric_history(run.info.run_id, key)
    ]
    succeeded = {"RUNNING": None, "FINISHED": True, "FAILED": False, "KILLED": False}[run.info.status]
    return Held(sorted(points, key=str), run.data.params, succeeded)


# -------------------------------------------------------------------------------------------------- TensorBoard


def read_tensorboard(folder: Path, uri: str) -> Held:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    points = [
        (tag, point.step, point.wall_time, _plain(point.value))
        for tag in events.Tags()["scalars"]
        if not tag.startswith("summary/")
        for point in events.Scalars(tag)
    ]
    told = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}
    hparams = metadata.parse_session_start_info_plugin_data(told[metadata.SESSION_START_INFO_TAG]).hparams
    params = {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}
    ending = told.get(metadata.SESSION_END_INFO_TAG)
    status = None if ending is None else metadata.parse_session_end_info_plugin_data(ending).status
    return Held(sorted(points, key=str), params, None if status is None else status == STATUS_SUCCESS)


# --------------------------------------------------------------------------------------------- Weights & Biases


def wandb_records(file: Path) -> Iterator[Any]:
    """The protocol buffers of the file that wandb keeps of a run, in the format of LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = file.read_bytes(), 7, b""  # past the file's own header
    while at + 7 <= len(content):
        left = 32768 - at % 32768  # of the block
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
            parts = b""


def read_wandb(folder: Path, uri: str) -> Held:
    """Of an offline run that has ended; wandb writes the end of its file when it has told that it is done."""
    deadline = time.monotonic() + 20
    while (held := _read_wandb(folder)).succeeded is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def _read_wandb(folder: Path) -> Held:
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    points: list[Point] = []
    params: dict[str, Any] = {}
    succeeded = None
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            metrics = {key: value for key, value in row.items() if not key.startswith("_")}
            points += [(key, row["_step"], row["_timestamp"], _plain(float(value))) for key, value in metrics.items()]
        elif kind == "run":
            params |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "exit":
            succeeded = record.exit.exit_code == 0
    return Held(sorted(points, key=str), params, succeeded)


# ---------------------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Kind:
    """A tracker, or several."""

    settings: Mapping[str, Any]  # of `TrackingConfig`
    readers: tuple[Callable[[Path, str], Held], ...] = ()

    def config(self, uri: str, **fields: Any) -> TrackingConfig:
        """The settings; those of MLflow go to `uri`."""
        address = {"uri": uri} if self.settings.get("mlflow") else {}
        return TrackingConfig(**{**self.settings, **address, **fields})

    def held(self, folder: Path, uri: str) -> list[Held]:
        """What each of its mirrors holds of the run of a folder."""
        return [read(folder, uri) for read in self.readers]

    def expected(self, records: Sequence[Mapping[str, float]]) -> list[list[Point]]:
        """What points each of its mirrors should hold."""
        records = list(records)
        return [points_of(records, KEPT.get(read, float)) for read in self.readers]


def _single(value: float) -> float:
    """TensorBoard keeps single precision."""
    return float(np.float32(value))


KEPT: dict[Callable[[Path, str], Held], Callable[[float], float]] = {read_mlflow: _double, read_tensorboard: _single}
WANDB = {"wandb": True, "wandb_mode": "offline"}
KINDS = {
    "mlflow": Kind({"mlflow": True}, (read_mlflow,)),
    "tensorboard": Kind({"tensorboard": True}, (read_tensorboard,)),
    "wandb": Kind(WANDB, (read_wandb,)),
    "none": Kind({}),
    "several": Kind({"mlflow": True, "tensorboard": True, **WANDB}, (read_mlflow, read_tensorboard, read_wandb)),
}
