"""One MLflow run, written to directly: every method waits for MLflow, raises what it raises, sends only what differs.

An MLflow run is found by the id that its folder keeps, so a folder has one in every store, wherever it is moved to.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtrain.errors import LmtrainError
from lmtrain.redaction import redact
from lmtrain.run_dir import RunDir, write_atomically
from lmtrain.tracking.background import one_line
from lmtrain.tracking.metrics_file import PLACE
from lmtrain.tracking.mlflow.connection import RUN_FILE, Store, is_transient, known_run
from lmtrain.tracking.run_info import DIED, DatasetInfo, RunInfo
from lmtrain.tracking.tracker import ModelWriter

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

ID_TAG, FOLDER_TAG, HOST_TAG = "lmtrain.id", "lmtrain.folder", "lmtrain.host"
FILES_TAG, MODEL_TAG = "lmtrain.files", "lmtrain.model"  # sums of what was sent, so that it is not sent again
PARENT_TAG = "mlflow.parentRunId"
_ORIGIN_TAGS = {
    "user": "mlflow.user",
    "host": HOST_TAG,
    "program": "mlflow.source.name",
    "git.commit": "mlflow.source.git.commit",
    "git.branch": "mlflow.source.git.branch",
}

_MAX_METRICS, _MAX_PARAMS, _MAX_TAGS, _MAX_PARAM_CHARS = 1000, 100, 100, 6000  # what MLflow takes in one call
_MAX_DIGEST_CHARS = 36
_STATUS = {
    "completed": "FINISHED",
    "early_stopped": "FINISHED",
    "pruned": "FINISHED",
    "interrupted": "KILLED",
    DIED: "KILLED",
    "failed": "FAILED",
    "diverged": "FAILED",
    "out_of_memory": "FAILED",
}
log = logging.getLogger(__name__)

Point = tuple[str, int, int, float | None]
"""Metric, step, milliseconds since the epoch, value as MLflow keeps it; None for NaN."""


class MlflowRun:
    """One run of a store."""

    def __init__(self, store: Store, run: Run) -> None:
        self.store = store
        self.id = str(run.info.run_id)
        self._info, self._data = run.info, run.data
        self._has_dataset = run.inputs is not None and bool(run.inputs.dataset_inputs)
        self._histories = {key: store.client.get_metric_history(self.id, key) for key in run.data.metrics}
        self._last_steps = {  # per metric: the last step MLflow has
            key: max(metric.step for metric in history) for key, history in self._histories.items()
        }

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Set the tags that differ, and the params that are new: MLflow does not let one change."""
        from mlflow.entities import Param, RunTag

        new = [Param(key, _format_param(value)) for key, value in params.items() if key not in self._data.params]
        changed = [RunTag(key, value) for key, value in tags.items() if self._data.tags.get(key) != value]
        for start in range(0, len(new), _MAX_PARAMS):
            self.store.client.log_batch(self.id, params=new[start : start + _MAX_PARAMS])
        for start in range(0, len(changed), _MAX_TAGS):
            self.store.client.log_batch(self.id, tags=changed[start : start + _MAX_TAGS])

    def log_dataset(self, dataset: DatasetInfo | None) -> None:
        """Tell what the run is trained on, unless it was told before."""
        if dataset is None or self._has_dataset:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        size = {"num_documents": dataset.documents, "num_tokens": dataset.tokens}
        theirs = Dataset(
            name=dataset.name,
            digest=dataset.digest[:_MAX_DIGEST_CHARS],
            source_type="lmtrain",
            source=json.dumps({"source": redact(dataset.source)}),
            profile=json.dumps(size),
        )
        context = InputTag("mlflow.data.context", "training")
        self.store.client.log_inputs(self.id, [DatasetInput(theirs, [context])])
        self._has_dataset = True

    def log(self, records: Iterable[Mapping[str, float]]) -> None:
        """Send of each metric the steps MLflow does not have yet. Doing it again changes nothing."""
        from mlflow.entities import Metric

        metrics = []
        last_steps = dict(self._last_steps)
        for record in records:
            step, timestamp = int(record["step"]), _milliseconds(record["time"])
            for key in record.keys() - PLACE:
                if step > last_steps.get(key, -1):
                    last_steps[key] = step
                    metrics.append(Metric(key, float(record[key]), timestamp, step))
        self._send(metrics)
        self._last_steps = last_steps

    def add(self, points: Iterable[Point]) -> None:
        """Send points wherever they lie."""
        from mlflow.entities import Metric

        ordered = sorted(points, key=lambda point: (point[1], point[0]))
        self._send(
            [Metric(key, math.nan if value is None else value, time, step) for key, step, time, value in ordered]
        )
        for key, step, _, _ in ordered:
            self._last_steps[key] = max(step, self._last_steps.get(key, -1))

    def points(self) -> set[Point]:
        """All that MLflow held of the metrics of records when the run was found."""
        return {
            (key, metric.step, metric.timestamp, _as_kept(metric.value))
            for key, history in self._histories.items()
            if not key.startswith("summary/")
            for metric in history
        }

    def log_files(self, files: Mapping[Path, str | None]) -> None:
        """Send files, each under a folder, unless just these were sent before. Warns of one that is refused."""
        contents = {path: path.read_bytes() for path in files if path.is_file()}
        digest = sha256(repr([(p.name, files[p], sha256(c).hexdigest()) for p, c in contents.items()]).encode())
        if not contents or self._data.tags.get(FILES_TAG) == digest.hexdigest():
            return
        for path in contents:
            try:
                self.store.client.log_artifact(self.id, str(path), files[path])
            except Exception as error:
                if is_transient(error):
                    raise
                log.warning("MLflow did not take %s (%s)", path.name, one_line(error))
        self.store.client.set_tag(self.id, FILES_TAG, digest.hexdigest())

    def log_model(self, folder: Path, write_model: ModelWriter | None) -> None:
        """Send the best checkpoint of a run folder as an MLflow model, unless it was sent before or there is none."""
        checkpoints = RunDir(folder).checkpoints
        manifests = (checkpoints / name / "manifest.json" for name in ("best", "last"))
        manifest = next((path for path in manifests if path.is_file()), None)
        if write_model is None or manifest is None:
            return
        digest = sha256(manifest.read_bytes()).hexdigest()
        if self._data.tags.get(MODEL_TAG) == digest:
            return
        with tempfile.TemporaryDirectory() as apart:
            written = Path(apart) / "model"
            try:
                write_model(folder, written)
            except LmtrainError as error:
                log.warning("the model of %s is not mirrored: %s", folder.name, error)
                return
            self._send_model(written, RunInfo.read(folder).params)
        self.store.client.set_tag(self.id, MODEL_TAG, digest)

    def _send_model(self, written: Path, params: Mapping[str, Any]) -> None:
        """`params` are those of the run it comes from, which for a multirun is the best of its runs."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        client = self.store.client
        texts = {key: _format_param(value) for key, value in params.items()}
        logged = client.create_logged_model(self.store.experiment_id, "model", source_run_id=self.id, params=texts)
        described = Model.load(str(written))
        described.model_id, described.run_id = logged.model_id, self.id
        described.save(str(written / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(written))
        client.finalize_logged_model(logged.model_id, "READY")
        step = max(self._last_steps.values(), default=0)
        client.log_outputs(self.id, [LoggedModelOutput(logged.model_id, step=step)])

    def finish(self, status: str, summary: Mapping[str, float], end_time: float) -> None:
        """End the run; the numbers of the summary become metrics `summary/...`, the status also a tag."""
        from mlflow.entities import Metric

        step, timestamp = max(self._last_steps.values(), default=0), _milliseconds(end_time)
        known = self._data.metrics
        named = {f"summary/{key}": float(value) for key, value in summary.items()}
        self._send([Metric(key, value, timestamp, step) for key, value in named.items() if known.get(key) != value])
        self.describe({}, {"status": status})
        if (self._info.status, self._info.end_time) != (_STATUS[status], timestamp):
            self.store.client.set_terminated(self.id, _STATUS[status], timestamp)

    def _send(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), _MAX_METRICS):
            self.store.client.log_batch(self.id, metrics=metrics[start : start + _MAX_METRICS])


def find_run(store: Store, folder: Path, id: str) -> MlflowRun | None:
    """The MLflow run of that id, or None; first the one that the folder names is tried."""
    from mlflow.exceptions import MlflowException

    known = known_run(folder)
    if known is not None:
        try:
            run = store.client.get_run(known["run_id"])
            if run.data.tags.get(ID_TAG) == id and run.info.lifecycle_stage == "active":
                return MlflowRun(store, run)
        except MlflowException as error:
            if is_transient(error):
                raise  # otherwise the run was deleted, or lives in another store
    found = store.client.search_runs([store.experiment_id], f"tags.`{ID_TAG}` = '{id}'", max_results=1)
    return MlflowRun(store, found[0]) if found else None


def create_run(store: Store, folder: Path, id: str, name: str, start_time: float) -> MlflowRun:
    """A new MLflow run for a folder, named in it."""
    tags = {ID_TAG: id}
    run = store.client.create_run(store.experiment_id, _milliseconds(start_time), tags=tags, run_name=name)
    note_run(store, folder, str(run.info.run_id))
    return MlflowRun(store, run)


def note_run(store: Store, folder: Path, run_id: str) -> None:
    """Keep in a folder where its MLflow run is."""
    content = {"uri": redact(store.uri), "experiment_id": store.experiment_id, "run_id": run_id}
    if known_run(folder) != content:
        write_atomically(folder / RUN_FILE, json.dumps(content) + "\n")


def points_of(records: Iterable[Mapping[str, float]]) -> set[Point]:
    """All points of the records of a metrics file, as MLflow would hold them: one a metric and step.

    Two records of a step, of training and of an evaluation, share the count of tokens.
    """
    points: dict[tuple[str, int], Point] = {}
    for record in records:
        step, timestamp = int(record["step"]), _milliseconds(record["time"])
        for key in record.keys() - PLACE:
            points.setdefault((key, step), (key, step, timestamp, _as_kept(float(record[key]))))
    return set(points.values())


def tags_of(origin: Mapping[str, str]) -> dict[str, str]:
    """Who runs what, and where, under the names that MLflow itself has for it."""
    names = {_ORIGIN_TAGS.get(name, name): value for name, value in origin.items()}
    return names | {"mlflow.source.type": "LOCAL"} if names else {}


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _as_kept(value: float) -> float | None:
    """MLflow keeps the largest double for an infinity."""
    if math.isnan(value):
        return None
    return max(-sys.float_info.max, min(sys.float_info.max, value))


def _format_param(value: Any) -> str:
    """The value as one writes it on the command line, cut to what MLflow stores."""
    if value is None:
        return "null"
    return (str(value).lower() if isinstance(value, bool) else str(value))[:_MAX_PARAM_CHARS]
