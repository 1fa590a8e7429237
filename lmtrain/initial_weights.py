"""What `init_from` names → the weights that a run begins with: of a run, of a stored model, or of one of transformers.

Weights mean what they meant only in the same architecture and with the same tokenizer; anything else is refused.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lmtrain.config.saved import saved_model
from lmtrain.config.schema import ExperimentConfig, ModelConfig, TransformerConfig
from lmtrain.data.prepared import PreparedData
from lmtrain.data.tokenizer import Tokenizer, huggingface_files, load_tokenizer
from lmtrain.errors import DataError, RunFolderError, UsageError
from lmtrain.model.huggingface.reading import is_model_folder, open_model
from lmtrain.run_dir import OWN_TOKENIZER, RunDir
from lmtrain.store.entry import require_as_saved
from lmtrain.store.opening import FoundRun, find_run
from lmtrain.training.checkpoint import CheckpointFolder, load_weights

log = logging.getLogger(__name__)

BEGINNING = ("attention", "init_std", "output_init")
"""Settings of a model that mean nothing to weights which are there already."""

ROTATION = ("rope_theta", "rope_scaling", "rope_factor")

TOKENIZER_JSON = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """A model to start from."""

    folder: Path
    architecture: ModelConfig
    seq_len: int
    vocab_size: int | None  # None: the tokenizer's
    tokenizer_file: Path | None  # ours, if there is one
    load_into: Callable[[nn.Module], None]


def name_version(config: ExperimentConfig) -> ExperimentConfig:
    """With the version of a stored model of which `init_from` gives the name: a repetition starts from the same.

    Raises UsageError if there is no such model.
    """
    if config.init_from is None or _is_of_transformers(Path(config.init_from).expanduser()):
        return config
    id = _find(config).id
    return config if id is None else dataclasses.replace(config, init_from=str(id))


def load_initial_weights(model: nn.Module, config: ExperimentConfig, data: PreparedData) -> None:
    """Copy the weights that `init_from` names, the newest of a run, into a model.

    Raises UsageError unless architecture and tokenizer are the same, naming every setting that is not.
    """
    assert config.init_from is not None
    origin = _open(config)
    reasons, words = _compare_architecture(origin, config)
    if not _same_tokenizer(origin, data.tokenizer):
        theirs, word = _name_tokenizer(origin)
        reasons.append(f"its tokenizer is another ({theirs} there, {_describe(data.tokenizer)} here)")
        words.append(word)
    elif origin.vocab_size not in (None, data.tokenizer.vocab_size):
        here = data.tokenizer.vocab_size
        reasons.append(f"it has rows for {origin.vocab_size:,} ids, and the tokenizer of this text has {here:,}")
    if reasons:
        remedy = f"\nto start from it, add {' '.join(words)}" if words else ""
        raise RunFolderError(f"init_from={config.init_from} is another model: {'; '.join(reasons)}{remedy}")
    origin.load_into(model)


def _is_of_transformers(folder: Path) -> bool:
    return not RunDir(folder).is_run() and is_model_folder(folder)


def _find(config: ExperimentConfig) -> FoundRun:
    """Raises UsageError if there is neither a run nor a stored model of that name."""
    assert config.init_from is not None
    try:
        return find_run(config.init_from, config.model_store)
    except RunFolderError as error:
        raise RunFolderError(
            f"init_from={config.init_from}: {error}; a model folder of transformers would hold config.json"
        ) from error


def _open(config: ExperimentConfig) -> _Origin:
    """Raises UsageError if there is no model, or a damaged one."""
    assert config.init_from is not None
    folder, here = Path(config.init_from).expanduser(), config.model
    if not _is_of_transformers(folder):
        run = RunDir(_find(config).folder)
        require_as_saved(run.path)
        architecture, seq_len = saved_model(run.config.read_text(encoding="utf-8"))
        return _Origin(
            folder=run.path,
            architecture=architecture,
            seq_len=seq_len,
            vocab_size=None,
            tokenizer_file=run.tokenizer,
            load_into=lambda model: load_weights(
                model, CheckpointFolder(run.checkpoints).load_newest(weights_only=True).model
            ),
        )
    stored, own_tokenizer = open_model(folder), folder / OWN_TOKENIZER
    # A model with biases that are all zero is also one without.
    bias = stored.has_biases or (isinstance(here, TransformerConfig) and here.bias)
    return _Origin(
        folder=folder,
        architecture=dataclasses.replace(stored.described.config, bias=bias),
        seq_len=stored.described.seq_len,
        vocab_size=stored.described.vocab_size,
        tokenizer_file=own_tokenizer if own_tokenizer.is_file() else None,
        load_into=stored.load_into,
    )


# ------------------------------------------------------------------------------------------- architecture


def _compare_architecture(origin: _Origin, config: ExperimentConfig) -> tuple[list[str], list[str]]:
    """What differs, and the words that choose what is there."""
    if type(origin.architecture) is not type(config.model):
        kinds = [type(model).__name__.removesuffix("Config") for model in (origin.architecture, config.model)]
        return [f"it is of the kind {kinds[0]}, and these settings make one of the kind {kinds[1]}"], []
    there = _settings(origin.architecture, origin.seq_len)
    here = _settings(config.model, config.data.seq_len)
    if _same_rotation(origin.architecture, config.model):
        there |= {name: here[name] for name in here if name.removeprefix("model.") in ROTATION}
    # What only one of them has follows from a setting that differs.
    differing = [name for name in there if name in here and there[name] != here[name]]
    reasons = [f"{name} is {_word(there[name])} there and {_word(here[name])} here" for name in differing]
    return reasons, [f"{name}={_word(there[name])}" for name in differing]


def _settings(model: ModelConfig, seq_len: int) -> dict[str, Any]:
    """What weights depend on, by the words of the command line."""
    values = {name: value for name, value in dataclasses.asdict(model).items() if name not in BEGINNING}
    settings: dict[str, Any] = {}
    if isinstance(model, TransformerConfig):
        values |= {"num_kv_heads": model.kv_heads, "d_ff": model.hidden_dim}
        if model.position != "rotary":
            values = {name: value for name, value in values.items() if name not in ROTATION}
        if model.position == "learned":
            settings["data.seq_len"] = seq_len
    return {f"model.{name}": value for name, value in values.items()} | settings


def _same_rotation(there: ModelConfig, here: ModelConfig) -> bool:
    """Whether positions turn as they did, or as they did before `rope_scaling` stretches them now."""
    if not isinstance(there, TransformerConfig) or not isinstance(here, TransformerConfig):
        return False
    stretched = there.rope_scaling == "none" and there.rope_theta == here.rope_theta
    return stretched or _rotation(there) == _rotation(here)


def _rotation(model: TransformerConfig) -> tuple[float, float]:
    """The base of the frequencies, and what positions are divided by."""
    return model.rope_base, model.rope_factor if model.rope_scaling == "linear" else 1.0


def _word(value: object) -> str:
    """As typed on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------- tokenizer


def _same_tokenizer(origin: _Origin, tokenizer: Tokenizer) -> bool:
    """Whether ids mean the same there and here; with a warning where nothing tells."""
    ours = origin.tokenizer_file
    if ours is not None and load_tokenizer(ours).fingerprint == tokenizer.fingerprint:
        return True
    try:
        theirs = _vocabulary((origin.folder / TOKENIZER_JSON).read_bytes())
        here = _vocabulary(huggingface_files(tokenizer, model_max_length=origin.seq_len)[TOKENIZER_JSON])
    except (OSError, UsageError):  # no such file, or ids of an unknown tokenizer
        if ours is not None:
            return False
        log.warning(
            "init_from=%s: nothing tells whether its tokenizer is that of this text (%s)",
            origin.folder,
            _describe(tokenizer),
        )
        return True
    return theirs == here


def _vocabulary(content: bytes) -> dict[str, int]:
    """The ids of a tokenizer.json, by token. Raises DataError if it is damaged."""
    from tokenizers import Tokenizer as Library

    try:
        ids: dict[str, int] = Library.from_str(content.decode()).get_vocab()
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"not a tokenizer.json, or damaged ({error})") from error
    return ids


def _name_tokenizer(origin: _Origin) -> tuple[str, str]:
    """What the tokenizer of a model is, and the words to choose it by."""
    if origin.tokenizer_file is None:
        return TOKENIZER_JSON, f"tokenizer=huggingface tokenizer.path={origin.folder}"
    return _describe(load_tokenizer(origin.tokenizer_file)), f"tokenizer=saved tokenizer.path={origin.folder}"


def _describe(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.name} of {tokenizer.vocab_size:,} ids"
