"""A store that is an MLflow Model Registry: the source of a version is an MLflow model that holds an entry.

Owns what is said to the registry. What an MLflow model is made of belongs to `inference/serving.py`, which is handed
in. MLflow is imported where it is used.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ModelNotFoundError, ModelStoreError, RunError
from lmtrain.redaction import redact
from lmtrain.store.entry import METADATA, Metadata, NewEntry, StoredModel, problems, read_metadata
from lmtrain.store.naming import ModelId, require_alias, require_name
from lmtrain.store.registry_client import connect, registry_uri, told
from lmtrain.tracking.mlflow.connection import SERVERS, database_file, known_run, locked
from lmtrain.tracking.mlflow.connection import connect as connect_to_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

WriteModel = Callable[[Path, Path], None]
"""Writes a run folder as an MLflow model into a new folder: `inference.serving.write_mlflow_model`."""

RUN = "artifacts/run"
"""The run folder in an MLflow model."""

SUM = "lmtrain.sha256"
"""The tag of our versions: the sum that `model.json` holds of itself, from which all other sums follow."""

MODEL = "lmtrain.model_id"
"""The tag with the id of the MLflow model that a version was made of."""

AWAIT_SECONDS = 20  # for a version to be ready


class RegistryStore:
    """The models of an MLflow registry that were saved by us."""

    def __init__(self, word: str, write_model: WriteModel | None) -> None:
        """`word`: `mlflow` or an address; `write_model`: needed to save. Raises ModelStoreError for no such kind."""
        self._uri = registry_uri(word)
        self._write_model = write_model

    def __str__(self) -> str:
        return redact(self._uri)

    @cached_property
    def _client(self) -> MlflowClient:
        return connect(self._uri)

    def require_usable(self) -> None:
        """Raise LmtrainError if the registry is away or refuses."""
        assert self._client is not None

    def save(self, run: Path, name: str, *, checkpoint: str | None = None, weights_only: bool = False) -> Metadata:
        """Add the model of a run as the next version of a name; see `NewEntry.read`."""
        require_name(name)
        self.require_usable()
        new = NewEntry.read(run, checkpoint=checkpoint, weights_only=weights_only)
        with tempfile.TemporaryDirectory() as apart:
            entry = Path(apart) / "run"
            entry.mkdir()
            metadata = new.write(entry, name=name, version=None)
            id = self.register(entry, name, run)
        return _named(metadata, id)

    def register(self, entry: Path, name: str, run: Path) -> ModelId:
        """Add the run folder of an entry as the next version of a name.

        `run`: the run it is of, whose MLflow run, if it is in this registry, becomes that of the version.
        """
        require_name(name)
        assert self._write_model is not None
        tags = _tags(read_metadata(entry))
        with tempfile.TemporaryDirectory() as apart:
            model = Path(apart) / "model"
            self._write_model(entry, model)
            with told(self._uri):
                run_id, experiment_id = self._mlflow_run(run)
                logged = self._client.create_logged_model(experiment_id, name=name, source_run_id=run_id)
                try:
                    _name_in(model, logged.model_id, run_id)
                    self._client.log_model_artifacts(logged.model_id, str(model))
                    self._client.finalize_logged_model(logged.model_id, "READY")
                    return self._create_version(name, logged, run_id, tags)
                except BaseException:
                    with suppress(Exception):
                        self._client.delete_logged_model(logged.model_id)
                    raise

    def set_alias(self, id: ModelId, alias: str) -> None:
        """Let an alias name this version, and no other any more."""
        require_alias(alias)
        with told(self._uri):
            self._client.set_registered_model_alias(id.name, alias, str(id.version))

    def models(self, name: str | None = None) -> list[StoredModel]:
        """All models of ours, or all versions of one. Raises ModelNotFoundError if there is none of that name."""
        versions = list(self._versions(name))
        if name is not None and not versions:
            raise self._absent(ModelId(name=name))
        with told(self._uri):
            aliases = {each: self._aliases(each) for each in {version.name for version in versions}}
        found = [_line(version, aliases[version.name]) for version in versions]
        return sorted(found, key=lambda model: (model.name, model.version))

    def resolve(self, id: ModelId) -> ModelId:
        """With the version that an alias names, or the newest. Raises ModelNotFoundError if there is no such model."""
        versions = {int(version.version) for version in self._versions(id.name)}
        wanted = id.version or max(versions, default=0)
        if id.alias is not None and versions:
            with told(self._uri):
                wanted = next((number for alias, number in self._aliases(id.name).items() if alias == id.alias), 0)
        if wanted not in versions:
            raise self._absent(id)
        return ModelId(name=id.name, version=wanted)

    def show(self, id: ModelId) -> Metadata:
        """The metadata of a model. Raises UsageError if it is not there, or damaged."""
        id = self.resolve(id)
        folder = self._fetch(id, f"{RUN}/{METADATA}").parent
        return _named(read_metadata(folder), id) | {"aliases": self._names_of(id)}

    def verify(self, id: ModelId) -> list[str]:
        """What of a model is not as it was saved, a line each; reads all of it."""
        id = self.resolve(id)
        folder = self._fetch(id, RUN)
        return problems(folder) or self._other_metadata(id, folder)

    def path_of(self, id: ModelId) -> Path:
        """The run folder of a model: where the registry has it, or a copy that this process removes when it ends."""
        id = self.resolve(id)
        folder = self._fetch(id, RUN)
        if found := self._other_metadata(id, folder):
            raise ModelStoreError(f"the model {id} in {self} is not as it was saved: {'; '.join(found)}")
        return folder

    def delete(self, id: ModelId) -> None:
        """Remove a version; its files stay until `mlflow gc`."""
        id = self.resolve(id)
        with told(self._uri):
            version = self._client.get_model_version(id.name, str(id.version))
            self._client.delete_model_version(id.name, str(id.version))
            self._client.delete_logged_model(version.tags[MODEL])

    # --------------------------------------------------------------------------------------- MLflow

    def _versions(self, name: str | None) -> Iterator[ModelVersion]:
        """Those saved by us."""
        database = database_file(self._uri)
        if database is not None and not database.exists():  # to ask would make it
            return
        client, token = self._client, None
        with told(self._uri):
            while True:
                page = client.search_model_versions(f"name='{name}'" if name else None, page_token=token)
                yield from (version for version in page if SUM in version.tags)
                token = page.token
                if not token:
                    return

    def _aliases(self, name: str) -> dict[str, int]:
        aliases = self._client.get_registered_model(name).aliases
        return {alias: int(version) for alias, version in aliases.items()}

    def _names_of(self, id: ModelId) -> list[str]:
        with told(self._uri):
            return [alias for alias, version in self._aliases(id.name).items() if version == id.version]

    def _create_version(self, name: str, model: LoggedModel, run_id: str | None, tags: dict[str, str]) -> ModelId:
        from mlflow.exceptions import MlflowException

        # A server wants to know whose the files are. A database would ask the store of the environment, not this one.
        model_id = model.model_id if self._uri.startswith(SERVERS) else None
        with locked(self._uri):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = self._client.create_model_version(
                name,
                model.artifact_location,
                run_id,
                tags | {MODEL: model.model_id},
                await_creation_for=AWAIT_SECONDS,
                model_id=model_id,
            )
        return ModelId(name=name, version=int(version.version))

    def _mlflow_run(self, run: Path) -> tuple[str | None, str]:
        """The MLflow run of a run folder, if it is here, and the experiment that a model of it belongs to."""
        from mlflow.exceptions import MlflowException

        known = known_run(run)
        if known is not None and known["uri"] == redact(self._uri):
            with suppress(MlflowException):  # it was deleted
                info = self._client.get_run(known["run_id"]).info
                return str(info.run_id), str(info.experiment_id)
        return None, connect_to_experiment(TrackingConfig(mlflow=True, uri=self._uri), run).experiment_id

    def _fetch(self, id: ModelId, path: str) -> Path:
        """A file or folder of a version on this machine."""
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        with told(self._uri):
            source = self._client.get_model_version_download_uri(id.name, str(id.version))
            place = {"artifact_uri": f"{source.rstrip('/')}/{path}", "tracking_uri": self._uri}
            try:
                if source.startswith(("file:", "/")):
                    return Path(download_artifacts(**place))
                apart = tempfile.mkdtemp(prefix="lmtrain-")
                atexit.register(shutil.rmtree, apart, ignore_errors=True)
                return Path(download_artifacts(**place, dst_path=apart))
            except (MlflowException, OSError) as error:
                if isinstance(error, MlflowException) and error.get_http_status_code() != 404:  # type: ignore[no-untyped-call]
                    raise
                raise RunError(f"the files of {id} are not where {self} says they are: {redact(source)}") from error

    def _other_metadata(self, id: ModelId, folder: Path) -> list[str]:
        """A line if `model.json` is sound and yet not the one that was registered."""
        with told(self._uri):
            noted = self._client.get_model_version(id.name, str(id.version)).tags[SUM]
        return [] if read_metadata(folder)["sha256"] == noted else [f"changed: {METADATA}"]

    def _absent(self, id: ModelId) -> ModelNotFoundError:
        return ModelNotFoundError(f"there is no model {id} of lmtrain in the registry {self}")


def _name_in(model: Path, model_id: str, run_id: str | None) -> None:
    """Let an MLflow model say where MLflow has it."""
    from mlflow.models import Model

    described = Model.load(str(model))
    described.model_id, described.run_id = model_id, run_id
    described.save(str(model / "MLmodel"))


def _named(metadata: Metadata, id: ModelId) -> Metadata:
    """Metadata under the name and number that a registry gave."""
    return metadata | {"id": str(id), "name": id.name, "version": id.version}


def _tags(metadata: Metadata) -> dict[str, str]:
    """What is found and shown without opening a model."""
    values: dict[str, Any] = {key: metadata[key] for key in ("step", "tokens", "parameters", "bytes", "created", "run")}
    values |= {"objective": metadata["objective"]["name"], "objective_value": metadata["objective"]["value"]}
    values |= {"data": metadata["data"]["name"], "data_fingerprint": metadata["data"]["fingerprint"]}
    values |= {"tokenizer_fingerprint": metadata["tokenizer"]["fingerprint"], "git_commit": metadata["git_commit"]}
    values |= {"training_state": str(metadata["training_state"]).lower(), SUM: metadata["sha256"]}
    return {key: str(value) for key, value in values.items() if value is not None}


def _line(version: ModelVersion, aliases: dict[str, int]) -> StoredModel:
    tags, number = version.tags, int(version.version)
    value = tags.get("objective_value")
    return StoredModel(
        name=version.name,
        version=number,
        parameters=int(tags["parameters"]),
        bytes=int(tags["bytes"]),
        objective_name=tags["objective"],
        objective=None if value is None else float(value),
        data=tags.get("data"),
        created=tags["created"],
        aliases=tuple(sorted(alias for alias, named in aliases.items() if named == number)),
    )
