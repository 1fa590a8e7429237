"""A store that is a folder: the version V of the model N is the run folder `STORE/N/V`.

Appears whole or not at all: it is written beside its place, under the lock of the store, and renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from lmtrain.config.schema.rules import require
from lmtrain.errors import ModelNotFoundError, ModelStoreError
from lmtrain.new_folder import appearing_whole, cannot_write
from lmtrain.run_dir import RunDir
from lmtrain.store.entry import Metadata, NewEntry, StoredModel, problems, read_metadata
from lmtrain.store.naming import ModelId, is_name, is_version, require_name


class FolderStore:
    """A folder of models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()

    def __str__(self) -> str:
        return str(RunDir(self.folder))

    def save(self, run: Path, name: str, *, checkpoint: str | None = None, weights_only: bool = False) -> Metadata:
        """Add the model of a run as the next version of a name; see `NewEntry.read`.

        Raises UsageError; RunError when the disk is full. Nothing is left of it then.
        """
        require_name(name)
        self._own(name)
        entry = NewEntry.read(run, checkpoint=checkpoint, weights_only=weights_only)  # others need not wait for that
        with self._locked(name):
            version = max(self._versions(name), default=0) + 1
            with appearing_whole(self._own(name, version)) as draft:
                return entry.write(draft, name=name, version=version)

    def models(self, name: str | None = None) -> list[StoredModel]:
        """All models, or all versions of one. Raises ModelStoreError if there is none of that name."""
        names = self._names() if name is None else [name]
        if name is not None and not self._versions(name):
            raise self._absent(ModelId(name=name))
        return [self._line(each, version) for each in names for version in self._versions(each)]

    def resolve(self, id: ModelId) -> ModelId:
        """With the newest version for one that is not named. Raises UsageError if there is no such model."""
        require(id.alias is None, f"{id}: aliases are a registry's, and {self} is a folder; name a version")
        versions = self._versions(id.name)
        if not versions or (id.version is not None and id.version not in versions):
            raise self._absent(id)
        return ModelId(name=id.name, version=id.version or max(versions))

    def show(self, id: ModelId) -> Metadata:
        """The metadata of a model. Raises UsageError if it is not there, or damaged."""
        return read_metadata(self.path_of(id))

    def verify(self, id: ModelId) -> list[str]:
        """What of a model is not as it was saved, a line each; reads all of it. Raises UsageError if there is none."""
        return problems(self.path_of(id))

    def delete(self, id: ModelId) -> None:
        """Remove a model. Raises UsageError if it is not there or cannot be removed."""
        self.resolve(id)
        with self._locked(id.name):
            folder = self.path_of(id)
            gone = folder.with_name(f".{folder.name}.deleted")
            folder.rename(gone)  # at once: no half of it is ever seen
            shutil.rmtree(gone)
            with suppress(OSError):
                folder.parent.rmdir()  # unless it holds other versions

    def path_of(self, id: ModelId) -> Path:
        """The run folder of a model, unchecked. Raises UsageError if it is not there."""
        found = self.resolve(id)
        assert found.version is not None
        return self._own(found.name, found.version)

    def _own(self, name: str, version: int | None = None) -> Path:
        """The folder of a model or of a version. Raises ModelStoreError if a link leads to another place."""
        parts = [name] if version is None else [name, str(version)]
        folder = self.folder.joinpath(*parts)
        if folder.resolve() != self.folder.resolve().joinpath(*parts):
            raise ModelStoreError(f"{RunDir(folder)} is no folder of the store: a link leads to {folder.resolve()}")
        return folder

    def _names(self) -> list[str]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in found if is_name(path.name) and path.is_dir() and not path.is_symlink())

    def _versions(self, name: str) -> list[int]:
        folder = self._own(name)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(version) for version in names if is_version(version))

    def _line(self, name: str, version: int) -> StoredModel:
        try:
            metadata = read_metadata(self._own(name, version))
        except ModelStoreError as error:
            return StoredModel(name=name, version=version, problem=str(error))
        return StoredModel(
            name=name,
            version=version,
            parameters=metadata["parameters"],
            bytes=metadata["bytes"],
            objective_name=metadata["objective"]["name"],
            objective=metadata["objective"]["value"],
            data=metadata["data"]["name"],
            created=metadata["created"],
        )

    def _absent(self, id: ModelId) -> ModelNotFoundError:
        versions, names = self._versions(id.name), self._names()
        there = f"of {id.name} there are {', '.join(map(str, versions))}" if versions else _some(names)
        return ModelNotFoundError(f"there is no model {id} in the store {self}: {there}")

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """While entered, no other process changes the store; what kills have left of this model is removed first."""
        new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        lock = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                folder = self._own(name)
                for left_over in [*folder.glob(".*.partial"), *folder.glob(".*.deleted")]:
                    shutil.rmtree(left_over, ignore_errors=True)
                try:
                    yield
                finally:
                    if not self._names():
                        lock.unlink(missing_ok=True)  # who waits for it notices, and makes another
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        finally:
            for folder in new:
                with suppress(OSError):
                    folder.rmdir()  # unless it holds something


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"it holds {shown}{' and more' if len(names) > 8 else ''}" if names else "it holds none"
