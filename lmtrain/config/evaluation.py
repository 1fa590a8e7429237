"""The settings a trained model is evaluated with: those of its run, but for the text and how that is read.

The shipped options of `data` can be chosen here, which a run's own config refuses: it states every setting.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import EncoderDecoderConfig, ExperimentConfig
from lmtrain.config.schema.rules import require
from lmtrain.errors import ConfigError

ELSEWHERE = {"device": "--device", "precision": "--precision", "precision.format": "--precision"}
"""Settings that the command takes as options."""

BESIDE_DATA = ("trainer.eval_batches", "parallel.num_threads")
"""What may be changed of a run, beside its data."""

OTHER_FILES = ("val_path", "test_path", "target_path", "val_target_path", "test_target_path")
"""Settings of data that belong to the text `path` names."""

HOW_TO_READ = ("seq_len", "batches", "cache_dir")
"""Settings of data that no document depends on."""

_NAMES_TEXT = re.compile(r"data|data@.*|data\.(.*\.)?(\w*path|hub\w*|revision)")
_NO_RAMPS = ["trainer.batch_size_warmup_steps=null", "trainer.seq_len_warmup_steps=null"]  # nothing is trained


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate a model on."""

    config: ExperimentConfig  # of the run, with that text
    other_text: bool  # whether it is named by the words, and not the run's
    other_documents: bool  # whether the words make other documents, or other splits, of the run's own text
    limited: bool  # whether trainer.eval_batches is among the words, so that it is for any text

    def num_batches(self, split: str) -> int | None:
        """What training evaluates on is only so much of its validation text; None: all of a split."""
        in_training = split == "val" and not self.other_text
        return self.config.trainer.eval_batches if self.limited or in_training else None

    def require_stride(self, stride: int) -> None:
        """Raise ConfigError for a stride that sliding windows cannot have."""
        require(
            not isinstance(self.config.model, EncoderDecoderConfig),
            "a stride is for decoders: an encoder-decoder reads each source as a whole",
        )
        require(not self.limited, "with a stride everything is read: leave out trainer.eval_batches")
        seq_len = self.config.data.seq_len
        require(1 <= stride <= seq_len, f"the stride must lie between 1 and data.seq_len={seq_len}, got {stride}")


def compose_evaluation(overrides: Sequence[str], run: Path) -> EvaluationSettings:
    """The settings of a run folder, changed by words such as `data=text` `data.path=FILE`.

    Another option of `data` keeps the run's `seq_len` and `cache_dir`, and that documents do not see each other.
    Another `data.path` keeps everything but the other files. Raises LmtrainError, or an error that `explain` puts into
    words.
    """
    words = {override.partition("=")[0].lstrip("+~"): override for override in overrides}
    for key, override in words.items():
        _require_sensible(key, override)
    of_data = [override for key, override in words.items() if key not in BESIDE_DATA]
    others = [*_NO_RAMPS, *(words[key] for key in BESIDE_DATA if key in words)]
    config = own = compose_config(others, run)
    if "data" in words:
        changed = compose_config(of_data).data
        kept = {name: getattr(own.data, name) for name in ("seq_len", "cache_dir") if f"data.{name}" not in words}
        if own.data.batches == "packed_documents" and changed.batches == "packed" and "data.batches" not in words:
            kept["batches"] = own.data.batches
        config = replace(own, data=replace(changed, **kept))
    elif of_data:
        gone = [name for name in OTHER_FILES if "data.path" in words and f"data.{name}" not in words]
        settings = [field.name for field in dataclasses.fields(own.data)]
        config = compose_config([*others, *(f"data.{name}=null" for name in gone if name in settings), *of_data], run)
    if config.data.seq_len > own.data.seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is more than the model's context of {own.data.seq_len} tokens"
        )
    other_text = any(_NAMES_TEXT.fullmatch(key) for key in words)
    read_alike = replace(config.data, **{name: getattr(own.data, name) for name in HOW_TO_READ})
    return EvaluationSettings(
        config,
        other_text=other_text,
        other_documents=not other_text and read_alike != own.data,
        limited="trainer.eval_batches" in words,
    )


def _require_sensible(key: str, override: str) -> None:
    """Raise ConfigError for a setting that a trained model is not evaluated with."""
    if "=" not in override and not override.startswith("~"):
        raise ConfigError(f"cannot read the argument {override!r}: write key=value")
    if key in ELSEWHERE:
        raise ConfigError(f"{override}: evaluate takes {ELSEWHERE[key]}")
    if key.partition(".")[0] == "tokenizer":
        raise ConfigError(f"{override}: a trained model knows the ids of its own tokenizer only")
    if key not in BESIDE_DATA and re.split(r"[.@]", key)[0] != "data":
        raise ConfigError(
            f"{override}: a trained model is evaluated as it is; what can be set is the text (data=OPTION, "
            f"data.KEY=VALUE), {' and '.join(BESIDE_DATA)}"
        )
