"""Data sets of the Hugging Face Hub, and folders laid out like them: which files belong to which split.

The `datasets` library resolves names, configurations and splits; a name and a folder go through the same call. What it
found is noted, so that a name means the same text until the notes are deleted (`data clean-cache`), and a warm start
needs neither the library nor a network. Reads no record.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmtrain.config.schema import FilesConfig
from lmtrain.data.prepared import SPLITS, SplitName
from lmtrain.data.sources.files import LocalFile, SourceFile, State, in_short, read_note, write_note
from lmtrain.data.sources.finding import files_below
from lmtrain.data.sources.splits import KEYWORDS, words_of
from lmtrain.errors import DataError

log = logging.getLogger(__name__)

_HUB_CONFIG = "data.hub_config=NAME chooses one of several configurations"
_SECONDS = 10  # that the Hub may take to answer
_HUB_URL = re.compile(r"hf://datasets/(?P<repository>[^/]+/[^/]+)@(?P<commit>[^/]+)/(?P<path>.+)")
# Settings of a `datasets` builder that do not change how a file is read.
_NAMES = {"name", "version", "data_dir", "data_files", "description"}


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the Hub, which is fetched once into the Hub's own cache."""

    repository: str  # OWNER/NAME
    commit: str
    path: str

    @property
    def name(self) -> str:
        """What its format is told by."""
        return posixpath.basename(self.path)

    def local(self) -> Path:
        """Where it can be read. Raises DataError if it cannot be fetched."""
        with _asking_the_hub(self.repository):
            with suppress(FileNotFoundError):
                return self._download(local_files_only=True)
            _commit_of(self.repository, self.commit)  # fails at once without a network, a download tries for long
            return self._download(local_files_only=False)

    def _download(self, *, local_files_only: bool) -> Path:
        from huggingface_hub import hf_hub_download

        found = hf_hub_download(
            self.repository,
            self.path,
            repo_type="dataset",
            revision=self.commit,
            local_files_only=local_files_only,
        )
        return Path(found)

    def state(self) -> State:
        """A commit does not change."""
        return f"hf://datasets/{self.repository}@{self.commit}/{self.path}", 0, 0

    def digest(self) -> bytes:
        """Stands for the content, without fetching it."""
        return self.state()[0].encode()


@dataclass(frozen=True, kw_only=True)
class HubData:
    """What a data set consists of."""

    commit: str | None  # None: of a folder
    builder: str  # of `datasets`, that reads these files
    options: Mapping[str, Any]  # of that builder, where they are not its defaults
    splits: Mapping[str, Sequence[str]]  # files, by the data set's own names of splits

    def name(self, config: FilesConfig) -> str:
        """In words."""
        source = config.hub if config.path is None else config.path
        return " ".join(filter(None, [source, config.hub_config, self.commit and f"at {self.commit[:7]}"]))

    def files(self, config: FilesConfig) -> dict[SplitName, tuple[SourceFile, ...]]:
        """The files of our splits. Raises DataError if none is clearly for training."""
        chosen = _our_splits(list(self.splits), config)
        return {split: tuple(map(_file, self.splits[name])) for split, name in chosen.items()}


def _file(address: str) -> SourceFile:
    match = _HUB_URL.fullmatch(address)
    return HubFile(**match.groupdict()) if match else LocalFile(Path(address))


def resolve(config: FilesConfig, folder: Path | None, cache: Path) -> HubData:
    """The files of the data set `config.hub`, or of a folder laid out like one.

    Raises DataError if there is no such data set or configuration, or no network.
    """
    states = [] if folder is None else [LocalFile(path).state() for path in files_below(folder, hidden=False)]
    source = config.hub if folder is None else str(folder.absolute())
    key = ["resolved", source, config.hub_config, None if folder else config.revision, states]
    with suppress(TypeError, ValueError):
        if note := read_note(cache, key):
            return HubData(**json.loads(note))
    if folder is None:
        assert config.hub is not None
        with _asking_the_hub(config.hub):
            commit = _commit_of(config.hub, config.revision)
            found = _resolved(config.hub, config.hub_config, commit)
    else:
        try:
            found = _resolved(str(folder.absolute()), config.hub_config, None)
        except Exception as error:  # whatever the library raises for what it does not understand
            raise DataError(f"data.path={config.path}: {in_short(error)} ({_HUB_CONFIG})") from error
    write_note(cache, key, json.dumps(dataclasses.asdict(found)), states)
    return found


def _commit_of(repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(repository, revision=revision, timeout=_SECONDS).sha
    assert commit is not None
    return commit


def _resolved(name: str, config_name: str | None, commit: str | None) -> HubData:
    import datasets

    # The library wants a folder for tables it is never asked to build.
    with tempfile.TemporaryDirectory() as scratch:
        builder = datasets.load_dataset_builder(name, name=config_name, revision=commit, cache_dir=scratch)
    default = type(builder.config)()
    values = {field.name: getattr(builder.config, field.name) for field in dataclasses.fields(builder.config)}
    options = {
        option: value
        for option, value in values.items()
        if option not in _NAMES and value != getattr(default, option) and isinstance(value, str | int | float | list)
    }
    return HubData(
        commit=commit,
        builder=builder.name,
        options=options,
        splits={split: list(files) for split, files in builder.config.data_files.items()},
    )


@contextmanager
def _asking_the_hub(repository: str) -> Iterator[None]:
    """Turns what goes wrong at the Hub, or on the way to it, into DataError."""
    from huggingface_hub import errors

    remedy = "name a local copy by data.path=PATH"
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{repository} has no revision of this name (data.revision) on the Hugging Face Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"the Hugging Face Hub has no data set {repository} (data.hub), or it asks to log in: hf auth login"
        ) from error
    except errors.HfHubHTTPError as error:
        raise DataError(f"the Hugging Face Hub does not give {repository} ({in_short(error)}); {remedy}") from error
    except (ConnectionError, TimeoutError, errors.LocalEntryNotFoundError) as error:
        raise _unreachable(repository, error) from error
    except (ValueError, FileNotFoundError) as error:  # an unknown configuration, or files of no known kind
        raise DataError(f"{repository}: {in_short(error)} ({_HUB_CONFIG})") from error
    except OSError as error:
        raise DataError(f"cannot keep files of {repository}: {in_short(error)}; HF_HOME names their folder") from error
    except Exception as error:  # of whichever library makes the connections
        raise _unreachable(repository, error) from error


def _unreachable(repository: str, error: Exception) -> DataError:
    return DataError(
        f"cannot reach the Hugging Face Hub for {repository} ({in_short(error)}); "
        "without network, name a local copy by data.path=PATH"
    )


def _our_splits(names: Sequence[str], config: FilesConfig) -> dict[SplitName, str]:
    """Which of a data set's splits are ours: those that are called so, or the one that `hub_split` names."""
    source = config.hub if config.path is None else config.path
    chosen: dict[SplitName, str] = {}
    for split in SPLITS:
        exact = [name for name in names if name in KEYWORDS[split]]
        alike = [name for name in names if words_of(name) & KEYWORDS[split]]
        found = exact or alike
        if split == "train" and config.hub_split is not None:
            found = [name for name in names if name == config.hub_split]
        elif split == "train" and len(names) == 1:
            found = list(names)
        if split == "train" and len(found) != 1:
            raise DataError(
                f"{source} has the splits {', '.join(names)}: choose one to train on by data.hub_split=NAME"
            )
        if len(found) == 1 and found[0] not in chosen.values():
            chosen[split] = found[0]
    if unused := [name for name in names if name not in chosen.values()]:
        log.info("%s: not used are the splits %s", source, ", ".join(unused))
    return chosen


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder has a data set card that says which files make which configuration."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        card = (folder / "README.md").read_text(encoding="utf-8")
        if match := re.match(r"---\s*\n(.*?)\n---\s*(\n|\Z)", card, re.DOTALL):
            settings = yaml.safe_load(match[1])
            return isinstance(settings, dict) and "configs" in settings
    return False
