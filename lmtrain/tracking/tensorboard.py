"""The TensorBoard mirror: one file of events in `RUN/tensorboard`, written anew from the metrics file by every attempt.

So it holds what the metrics file holds, once, whatever an earlier attempt had written. TensorBoard keeps values in
single precision. Knows the formats of TensorBoard, which is imported with the first run.
"""

from __future__ import annotations

import platform
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmtrain.config.schema import TrackingConfig
from lmtrain.run_dir import RunDir
from lmtrain.tracking.background import BackgroundTracker, Request
from lmtrain.tracking.metrics_file import PLACE, read_metrics
from lmtrain.tracking.run_info import RunEnding, RunInfo

FOLDER = "tensorboard"


class TensorboardTracker(BackgroundTracker):
    """Mirrors one run to event files in the background."""

    def __init__(self, config: TrackingConfig) -> None:
        super().__init__(
            server="TensorBoard's event file",
            open_mirror=TensorboardMirror,
            is_transient=lambda error: False,  # a file half written is no place to go on
            close_timeout=config.close_timeout,
            remedy="; resume=RUN writes it anew",
        )


class TensorboardMirror:
    """The event file of a run that goes on."""

    def __init__(self, info: RunInfo, request: Request) -> None:
        """`request` is not needed: no server is asked."""
        self._folder, self._last_steps = RunDir(info.folder), dict[str, int]()
        place = info.folder / FOLDER
        place.mkdir(exist_ok=True)
        earlier = list(place.glob("events.out.tfevents.*"))
        # TensorBoard reads the files of a folder in the order of their names.
        self._events = EventFile(place / f"events.out.tfevents.{time.time_ns():020d}.{platform.node()}")
        self._events.add_params(info.params, info.started)
        self._events.add_text("config.yaml", self._folder.config.read_text(encoding="utf-8"), info.started)
        if self._folder.metrics.exists():
            self.log(read_metrics(self._folder.metrics))
        for file in earlier:
            file.unlink()

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        for record in records:
            step, last = int(record["step"]), self._last_steps
            new = {key: record[key] for key in sorted(record.keys() - PLACE) if step > last.get(key, -1)}
            if new:
                self._events.add_scalars(new, step, record["time"])
                last.update(dict.fromkeys(new, step))
        self._events.flush()

    def finish(self) -> None:
        ending, step = RunEnding.read(self._folder.path), max(self._last_steps.values(), default=0)
        summary = {f"summary/{name}": value for name, value in ending.summary.items()}
        self._events.add_scalars(summary, step, ending.time)
        for picture in sorted(self._folder.plots.glob("*.png")):
            self._events.add_picture(f"plots/{picture.name}", picture.read_bytes(), step, ending.time)
        self._events.add_ending(ending.succeeded, ending.time)
        self._events.close()


class EventFile:
    """A new event file: TensorBoard's format, without the thread that its own writer would start."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, as every method may."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._file = path.open("xb")
        self._writer = RecordWriter(self._file)
        self._add(time.time(), file_version="brain.Event:2")
        # A TensorBoard that is open drops what it read from an earlier file.
        self._add(time.time(), session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, values: Mapping[str, float], step: int, wall_time: float) -> None:
        """Points of several curves at one step; `wall_time` in seconds since the epoch."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(wall_time, step=step, summary=Summary(value=points))

    def add_text(self, tag: str, text: str, wall_time: float) -> None:
        """A text, shown as it is."""
        from tensorboard.plugins.text.metadata import create_summary_metadata

        as_code = "\n".join(f"    {line}" for line in text.splitlines())  # in Markdown
        self._add_strings(tag, [as_code.encode()], create_summary_metadata(tag, ""), 0, wall_time)

    def add_picture(self, tag: str, png: bytes, step: int, wall_time: float) -> None:
        """A PNG file."""
        from tensorboard.plugins.image.metadata import create_summary_metadata

        size = struct.unpack(">II", png[16:24])  # width and height, in the header of every PNG
        strings = [*(str(number).encode() for number in size), png]
        self._add_strings(tag, strings, create_summary_metadata(tag, ""), step, wall_time)

    def add_params(self, params: Mapping[str, Any], started: float) -> None:
        """What the page HPARAMS tells runs apart by, and since when this one goes."""
        from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

        start = SessionStartInfo(start_time_secs=started)
        for name, value in params.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = "null" if value is None else str(value)
        self._add_hparams(SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start), started)

    def add_ending(self, succeeded: bool, ended: float) -> None:
        """How and when the run ended, for that page."""
        from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
        from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        status = STATUS_SUCCESS if succeeded else STATUS_FAILURE
        end = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=ended))
        self._add_hparams(SESSION_END_INFO_TAG, end, ended)

    def flush(self) -> None:
        """Show what was added to readers."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add_strings(self, tag: str, strings: Sequence[bytes], metadata: Any, step: int, wall_time: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(strings))])
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=strings)
        value = Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
        self._add(wall_time, step=step, summary=Summary(value=[value]))

    def _add_hparams(self, tag: str, data: Any, wall_time: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.metadata import NULL_TENSOR, create_summary_metadata

        value = Summary.Value(tag=tag, tensor=NULL_TENSOR, metadata=create_summary_metadata(data))
        self._add(wall_time, summary=Summary(value=[value]))

    def _add(self, wall_time: float, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=wall_time, **what).SerializeToString())
