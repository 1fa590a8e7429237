"""Words of the user → a store, or the run folder of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lmtrain.errors import ConfigError, ModelNotFoundError, RunFolderError
from lmtrain.run_dir import RunDir
from lmtrain.store.entry import Metadata, StoredModel, is_entry
from lmtrain.store.folder import FolderStore
from lmtrain.store.naming import ModelId, is_registry, parse_id, store_word

if TYPE_CHECKING:
    from lmtrain.store.registry import RegistryStore, WriteModel


class ModelStore(Protocol):
    """Numbered versions of named models. Every method raises LmtrainError for what cannot be done."""

    def save(self, run: Path, name: str, *, checkpoint: str | None = None, weights_only: bool = False) -> Metadata:
        """Add the model of a run folder as the next version of a name; returns its metadata."""

    def models(self, name: str | None = None) -> list[StoredModel]:
        """All models, or all versions of one, in order."""

    def resolve(self, id: ModelId) -> ModelId:
        """The version that is meant."""

    def show(self, id: ModelId) -> Metadata:
        """What is known of a model."""

    def verify(self, id: ModelId) -> list[str]:
        """What of a model is not as it was saved, a line each."""

    def delete(self, id: ModelId) -> None:
        """Remove a model."""

    def path_of(self, id: ModelId) -> Path:
        """The run folder of a model on this machine, unchecked."""


def open_store(word: str | None = None, write_model: WriteModel | None = None) -> ModelStore:
    """The store that a word names: a folder, `mlflow`, or the address of an MLflow registry; None: the default.

    `write_model`: needed to save into a registry.
    """
    word = store_word(word)
    return open_registry(word, write_model) if is_registry(word) else FolderStore(Path(word))


def open_registry(word: str, write_model: WriteModel | None = None) -> RegistryStore:
    """An MLflow registry, by `mlflow` or its address. Raises ModelStoreError for one of an unknown kind."""
    from lmtrain.store.registry import RegistryStore

    return RegistryStore(word, write_model)


def require_no_entry(run: RunDir) -> RunDir:
    """The same. Raises RunFolderError if it is the run folder of a model in a store, where nothing is trained."""
    if is_entry(run.path):
        name, version = run.path.resolve().parts[-2:]
        in_default = run.path.resolve() == Path(store_word(None)).resolve() / name / version
        word = f"{name}:{version}" if in_default else run
        raise RunFolderError(f"{run} is a model of a store, which stays as it was saved: start with init_from={word}")
    return run


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A run folder that a word names."""

    folder: Path
    id: ModelId | None  # if the word is that of a model in a store, with its version


def find_run(word: str | Path, store: str | None = None) -> FoundRun:
    """The run folder that a word names: a run folder of that path if there is one, else a model of the store.

    Raises UsageError if there is neither.
    """
    folder, word = Path(word).expanduser(), str(word)
    if RunDir(folder).is_run():
        return FoundRun(folder=folder, id=None)
    shown = word if word.isprintable() else repr(word)
    absent = f"there is no run folder {shown} (it would hold config.yaml), and"
    if "/" in word:
        raise RunFolderError(f"{absent} no model of a store has '/' in its name")
    try:
        models = open_store(store)
        id = models.resolve(parse_id(word))
        return FoundRun(folder=models.path_of(id), id=id)
    except (ConfigError, ModelNotFoundError) as error:
        raise RunFolderError(f"{absent} {error}") from error
