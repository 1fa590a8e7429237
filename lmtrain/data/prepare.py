"""Prepared data: the sources of a run divided, tokenised and kept on disk as memory-mapped arrays.

Owns when an entry of the cache may be used, and when one is made. Does not write it (`entry`), make entries appear or
go (`cache`) or cut sequences (`batches`).

An entry `<cache>/prepared/<key>/` holds the arrays of every source and split, tokenizer.model and manifest.json. It
appears by a rename when it is complete, so a kill at any moment leaves no half entry; the next build goes on with what
the killed one had done.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lmtrain.config.schema import DataConfig, MixtureConfig, TokenizerConfig, TokensConfig
from lmtrain.data import checksums
from lmtrain.data.build import TOKENIZER_FILE, SplitFiles
from lmtrain.data.cache import building, cache_folder, draft_of, manifests, publish
from lmtrain.data.encoding import has_prompts
from lmtrain.data.entry import MANIFEST, OpenedSource, write_entry
from lmtrain.data.prepared import PreparedData, PreparedSource, SplitName
from lmtrain.data.sources import open_corpus
from lmtrain.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    sample_for,
    tokenizer_file,
)
from lmtrain.errors import DataError

log = logging.getLogger(__name__)

PREPARE_VERSION = 3  # raise it when the same settings would give other tokens: older entries are then not used

# Settings that do not change the tokens of the same content.
_NOT_IN_KEY = {
    *("seq_len", "batches", "weight", "cache_dir", "sources"),
    *("path", "val_path", "test_path", "target_path", "val_target_path", "test_target_path"),
    *("hub", "hub_config", "hub_split", "revision"),  # what they name is in the text
}


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    on_progress: Callable[[str], None] | None = None,
    *,
    make_splits: bool = True,
) -> PreparedData:
    """Find the prepared data of these settings in the cache, or build it.

    Without `make_splits`, data that have no splits of their own are one, `train`.

    Any number of processes may call this at once: one builds, the others wait. The cache is `data.cache_dir`,
    else $LMTRAIN_CACHE, else the user's cache folder. `on_progress` gets short messages while something is
    built, the first of them why. Raises DataError for unusable text, a vocabulary the text does not allow, or an
    unwritable cache.
    """
    report = on_progress or (lambda message: None)
    cache = cache_folder(data)
    sources = _open(data, cache, make_splits=make_splits)
    _require_given(tokenizer, sources)
    identity = _identity(sources, tokenizer)
    folder = cache / "prepared" / _key(identity)
    log.debug("prepared data belong into %s", folder)
    if found := _load(folder, sources, built=False, tell=False):
        return found
    try:
        with building(folder, report):
            if found := _load(folder, sources, built=False):
                return found
            report(f"preparing {' + '.join(source.corpus.name for source in sources)}: {_why(cache, identity)}")
            with draft_of(folder) as draft:
                write_entry(draft, sources, tokenizer, identity, report)
                if any(source.corpus.fingerprint(cache) != source.content for source in sources):
                    raise DataError(f"{sources[0].corpus.name} changed while it was being prepared; start again")
                publish(draft, folder)
            built = _load(folder, sources, built=True)
    except OSError as error:
        raise DataError(
            f"cannot write prepared data to {cache}: {error.strerror or error}; "
            "name another folder by data.cache_dir=... or LMTRAIN_CACHE"
        ) from error
    assert built is not None, f"{folder} was damaged while it was built"
    return built


def find_prepared(data: DataConfig, tokenizer: TokenizerConfig) -> PreparedData | None:
    """What `prepare` would find in the cache; None if it would have to build. Raises DataError if there is no text."""
    cache = cache_folder(data)
    sources = _open(data, cache, make_splits=True)
    return _load(cache / "prepared" / _key(_identity(sources, tokenizer)), sources, built=False, tell=False)


def was_prepared(data: DataConfig, tokenizer: TokenizerConfig) -> bool:
    """Whether the cache has data of these settings, though maybe of another text. Neither reads nor fetches any."""
    settings = _tokenizer_identity(tokenizer)
    for name, config in _configs(data).items():
        settings |= _source_settings(name, config)
    identities = (manifest.get("identity") or {} for manifest in manifests(cache_folder(data)))
    return any(settings.items() <= identity.items() for identity in identities)


def _configs(data: DataConfig) -> dict[str, DataConfig]:
    """The settings of every source, by its name in a mixture, or an empty one."""
    if not isinstance(data, MixtureConfig):
        return {"": data}
    return {name: replace(one, cache_dir=data.cache_dir) for name, one in data.sources.items()}


def _open(data: DataConfig, cache: Path, *, make_splits: bool) -> list[OpenedSource]:
    configs = _configs(data)
    corpora = {name: open_corpus(config) for name, config in configs.items()}
    sums = {name: corpus.fingerprint(cache) for name, corpus in corpora.items()}
    return [OpenedSource(name, configs[name], corpora[name], sums[name], make_splits) for name in configs]


def _require_given(tokenizer: TokenizerConfig, sources: list[OpenedSource]) -> None:
    """Raise DataError for token arrays with a tokenizer that would have to be trained on their text."""
    arrays = [source for source in sources if isinstance(source.config, TokensConfig)]
    if arrays and sample_for(tokenizer) is not None:
        raise DataError(
            f"{arrays[0].corpus.name} holds token ids, no text: name the tokenizer that made them, by "
            "tokenizer=sentencepiece_model or tokenizer=huggingface, or take tokenizer=ids tokenizer.vocab_size=N"
        )


# ------------------------------------------------------------------------------------------- identity


def _identity(sources: list[OpenedSource], tokenizer: TokenizerConfig) -> dict[str, Any]:
    """All that the tokens follow from, as flat settings."""
    identity = _tokenizer_identity(tokenizer)
    for source in sources:
        prefix = _prefix(source.name)
        identity |= _source_settings(source.name, source.config) | {f"{prefix} text": source.content}
        if not source.make_splits:
            identity |= {f"{prefix}.split": "none", f"{prefix}.val_fraction": 0, f"{prefix}.test_fraction": 0}
    return identity


def _source_settings(name: str, config: DataConfig) -> dict[str, Any]:
    prefix = _prefix(name)
    settings = {f"{prefix}.{key}": value for key, value in asdict(config).items() if key not in _NOT_IN_KEY}
    return {prefix: type(config).__name__} | settings


def _prefix(source: str) -> str:
    return f"data.sources.{source}" if source else "data"


def _tokenizer_identity(tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Of a tokenizer, and of how all is prepared."""
    identity = {"version": PREPARE_VERSION, "tokenizer": type(tokenizer).__name__}
    identity |= {f"tokenizer.{key}": value for key, value in asdict(tokenizer).items() if key != "path"}
    if file := tokenizer_file(tokenizer):
        identity["tokenizer file"] = _file_sum(file)
    return identity


def _key(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _file_sum(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def _why(cache: Path, identity: Mapping[str, Any]) -> str:
    """Why nothing in the cache will do: how the most similar entry differs."""
    texts = {key for key in identity if key.endswith(" text")}
    differences = [
        sorted(key for key in {**identity, **other} if other.get(key) != identity.get(key))
        for manifest in manifests(cache)
        if (other := manifest.get("identity")) and any(other.get(key) == identity[key] for key in texts)
    ]
    if not differences:
        return "this text is not in the cache"
    nearest = min(differences, key=len)
    if not nearest:
        return "what the cache has of it is damaged"
    return f"the cache has it with another {', '.join(nearest)}"


# ------------------------------------------------------------------------------------------- reading


def _load(folder: Path, sources: list[OpenedSource], *, built: bool, tell: bool = True) -> PreparedData | None:
    """Open a cache entry; None if there is none or it is damaged, which is logged unless it will be looked at again."""
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksums.verify(folder, manifest["files"])
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        prepared = tuple(
            _loaded(folder, source, tokenizer, manifest["sources"][source.name], built=built) for source in sources
        )
        return PreparedData(sources=prepared, tokenizer=tokenizer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        if tell:
            log.warning("prepared data in %s is damaged (%s); building it again", folder, error)
        return None


def _loaded(
    folder: Path, source: OpenedSource, tokenizer: Tokenizer, content: Mapping[str, Any], *, built: bool
) -> PreparedSource:
    prompts = has_prompts(source.config)
    num_bytes: dict[SplitName, int] = content["num_bytes"]
    return PreparedSource(
        name=source.corpus.name,
        weight=source.config.weight,
        splits={
            split: SplitFiles(folder, source.name, split, prompts=prompts).load(tokenizer.vocab_size, size)
            for split, size in num_bytes.items()
        },
        left_out=content["left_out"],
        duplicates=content["duplicates"],
        deduplicated=source.config.deduplicate,
        content=source.content,
        fingerprint=f"{folder.name}{source.name}",
        folder=folder,
        built=built,
    )
