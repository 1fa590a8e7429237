"""Prepared data: the sources of a run divided, tokenised and kept on disk as memory-mapped arrays.

Owns what an entry of the cache holds and when it may be used. Does not read files (`sources`), choose what validates
(`survey`), write tokens (`build`), make entries appear or go (`cache`) or cut sequences (`batches`).

An entry `<cache>/prepared/<key>/` holds the arrays of every source and split, tokenizer.model and manifest.json. It
appears by a rename when it is complete, so a kill at any moment leaves no half entry; the next build goes on with what
the killed one had done.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.config.schema import DataConfig, IdsConfig, MixtureConfig, TokenizerConfig, TokensConfig
from lmtrain.data import checksums
from lmtrain.data.build import ALONE_CHARS, TOKENIZER_FILE, SplitFiles, remove_marks, write_tokens
from lmtrain.data.cache import building, cache_folder, draft_of, manifests, publish
from lmtrain.data.division import place
from lmtrain.data.encoding import has_prompts, special_tokens
from lmtrain.data.prepared import PreparedData, PreparedSource, SplitName
from lmtrain.data.sources import Corpus, open_corpus
from lmtrain.data.survey import Survey, stretches, survey, texts_of
from lmtrain.data.tokenizer import (
    TextSample,
    Tokenizer,
    load_tokenizer,
    sample_for,
    tokenizer_file,
    train_tokenizer,
)
from lmtrain.errors import DataError

log = logging.getLogger(__name__)

PREPARE_VERSION = 3  # raise it when the same settings would give other tokens: older entries are then not used

MANIFEST = "manifest.json"

# Settings that do not change the tokens of the same content.
_NOT_IN_KEY = {
    *("seq_len", "batches", "weight", "cache_dir", "sources"),
    *("path", "val_path", "test_path", "target_path", "val_target_path", "test_target_path"),
    *("hub", "hub_config", "hub_split", "revision"),  # what they name is in the text
}


@dataclass(frozen=True)
class _Source:
    """One data set of a run, opened."""

    name: str  # in a mixture; else empty
    config: DataConfig
    corpus: Corpus
    content: str  # its fingerprint
    make_splits: bool  # whether splits that the data lack are made


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
    if found := _load(folder, sources, built=False, tell=False):
        return found
    try:
        with building(folder, report):
            if found := _load(folder, sources, built=False):
                return found
            report(f"preparing {' + '.join(source.corpus.name for source in sources)}: {_why(cache, identity)}")
            with draft_of(folder) as draft:
                _build(draft, sources, tokenizer, identity, report)
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


def _open(data: DataConfig, cache: Path, *, make_splits: bool) -> list[_Source]:
    configs = {"": data}
    if isinstance(data, MixtureConfig):
        configs = {name: replace(one, cache_dir=data.cache_dir) for name, one in data.sources.items()}
    corpora = {name: open_corpus(config) for name, config in configs.items()}
    sums = {name: corpus.fingerprint(cache) for name, corpus in corpora.items()}
    return [_Source(name, configs[name], corpora[name], sums[name], make_splits) for name in configs]


def _require_given(tokenizer: TokenizerConfig, sources: list[_Source]) -> None:
    """Raise DataError for token arrays with a tokenizer that would have to be trained on their text."""
    arrays = [source for source in sources if isinstance(source.config, TokensConfig)]
    if arrays and sample_for(tokenizer) is not None:
        raise DataError(
            f"{arrays[0].corpus.name} holds token ids, no text: name the tokenizer that made them, by "
            "tokenizer=sentencepiece_model or tokenizer=huggingface, or take tokenizer=ids tokenizer.vocab_size=N"
        )


# ------------------------------------------------------------------------------------------- identity


def _identity(sources: list[_Source], tokenizer: TokenizerConfig) -> dict[str, Any]:
    """All that the tokens follow from, as flat settings."""
    identity: dict[str, Any] = {"version": PREPARE_VERSION}
    for source in sources:
        prefix = f"data.sources.{source.name}" if source.name else "data"
        identity[prefix] = type(source.config).__name__
        identity[f"{prefix} text"] = source.content
        identity |= {f"{prefix}.{k}": v for k, v in asdict(source.config).items() if k not in _NOT_IN_KEY}
        if not source.make_splits:
            identity |= {f"{prefix}.split": "none", f"{prefix}.val_fraction": 0, f"{prefix}.test_fraction": 0}
    identity["tokenizer"] = type(tokenizer).__name__
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


def _load(folder: Path, sources: list[_Source], *, built: bool, tell: bool = True) -> PreparedData | None:
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
    folder: Path, source: _Source, tokenizer: Tokenizer, content: Mapping[str, Any], *, built: bool
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


# ------------------------------------------------------------------------------------------- building


def _build(
    draft: Path,
    sources: list[_Source],
    config: TokenizerConfig,
    identity: Mapping[str, Any],
    report: Callable[[str], None],
) -> None:
    """Write a complete entry into `draft`, going on with what is there."""
    path = draft / TOKENIZER_FILE
    sample = None if path.exists() else sample_for(config)
    if sample is None and not path.exists():
        _make_tokenizer(path, sources, {}, config, None)
    if any(isinstance(source.config, TokensConfig) for source in sources):
        sources = _cut(sources, config, load_tokenizer(path).end_id)
    surveys: dict[str, Survey] = {}
    num_documents = 0
    for source in sources:
        report(f"reading {source.corpus.name}")
        see = None if sample is None else functools.partial(_add, sample, num_documents)
        surveys[source.name] = survey(source.corpus, source.config, report, see, make_splits=source.make_splits)
        num_documents += len(surveys[source.name].sides)
    if sample is not None:
        report("training the tokenizer")
        _make_tokenizer(path, sources, surveys, config, sample)
    progress = _Progress(sum(found.num_chars for found in surveys.values()), report)
    contents = {}
    for source in sources:
        found = surveys[source.name]
        num_bytes = write_tokens(
            draft,
            source.name,
            found.splits,
            stretches(source.corpus, source.config, found),
            prompts=has_prompts(source.config),
            alone=found.num_chars < ALONE_CHARS,
            report=progress.tell,
        )
        progress.before += found.num_chars
        contents[source.name] = {
            "name": source.corpus.name,
            "num_bytes": num_bytes,
            "left_out": found.left_out,
            "duplicates": found.duplicates,
        }
    remove_marks(draft)
    report("checksums")
    files = checksums.of_files(path for path in sorted(draft.iterdir()) if path.name != MANIFEST)
    corpus = " + ".join(source.corpus.name for source in sources)
    manifest = {"corpus": corpus, "identity": identity, "sources": contents, "files": files}
    (draft / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


class _Progress:
    """How much of all text is tokenised, told in hundredths."""

    def __init__(self, num_chars: int, report: Callable[[str], None]) -> None:
        self.before = 0  # characters of the sources that are done
        self._num_chars = num_chars
        self._report = report
        self._told = ""

    def tell(self, chars: int) -> None:
        message = f"tokenising: {(self.before + chars) / self._num_chars:.0%}"
        if message != self._told:
            self._report(message)
        self._told = message


def _cut(sources: list[_Source], config: TokenizerConfig, end_id: int) -> list[_Source]:
    """Token arrays are cut into documents at the tokenizer's end token, if the settings name no other."""
    if isinstance(config, IdsConfig) and config.end_id is None:
        return sources  # none of their ids is the end
    return [
        replace(source, corpus=open_corpus(replace(source.config, end_id=end_id)))
        if isinstance(source.config, TokensConfig) and source.config.end_id is None
        else source
        for source in sources
    ]


def _add(sample: TextSample, first: int, text: str, number: int) -> None:
    sample.add(text, first + number)


def _make_tokenizer(
    path: Path,
    sources: list[_Source],
    surveys: Mapping[str, Survey],
    config: TokenizerConfig,
    sample: TextSample | None,
) -> None:
    """Save the tokenizer of all sources, made from the `sample` of their documents unless it is given."""
    lines, characters = [], ""
    if sample is not None:
        characters = sample.characters
        sides = np.concatenate([found.sides for found in surveys.values()])
        train = place("train")
        lines = sample.lines(lambda number: sides[number] == train)
        if any(division.cuts for found in surveys.values() for division in found.divisions.values()):
            lines = _lines_before_cuts(sources, surveys, config)
    special = list(dict.fromkeys(name for source in sources for name in special_tokens(source.config)))
    tokenizer = train_tokenizer(config, lines, characters, special)
    if missing := [name for name in special if name not in tokenizer.special]:
        raise DataError(f"the tokenizer {tokenizer.name} has no token {missing[0]}, which conversations need")
    draft = path.with_name(f".{path.name}")
    tokenizer.save(draft)
    draft.replace(path)


def _lines_before_cuts(sources: list[_Source], surveys: Mapping[str, Survey], config: TokenizerConfig) -> list[str]:
    """A sample of the training text where a document is cut: its end is not to be learnt from."""
    sample = sample_for(config)
    assert sample is not None
    for source in sources:
        for stretch in stretches(source.corpus, source.config, surveys[source.name]):
            if stretch.split == "train":
                for text in texts_of(stretch.record):
                    sample.add(text, 0)
    return sample.lines(lambda number: True)
