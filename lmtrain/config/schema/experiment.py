"""All settings of a run together, the rules between groups, and the options by their schemas."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from lmtrain.config.schema.data import (
    ChatConfig,
    DataConfig,
    MixtureConfig,
    PairsConfig,
    PythonStdlibConfig,
    RecordsConfig,
    TextConfig,
    TokensConfig,
)
from lmtrain.config.schema.model import (
    AutoModelConfig,
    DecoderConfig,
    EncoderDecoderConfig,
    ModelConfig,
    TransformerConfig,
)
from lmtrain.config.schema.optimizer import (
    AdafactorConfig,
    AdamConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from lmtrain.config.schema.rules import REQUIRED, require, require_fraction, require_positive
from lmtrain.config.schema.schedule import (
    ConstantConfig,
    CosineConfig,
    CosineRestartsConfig,
    InverseSqrtConfig,
    LinearConfig,
    PlateauConfig,
    ScheduleConfig,
    WarmupStableDecayConfig,
)
from lmtrain.config.schema.sweep import SweepConfig
from lmtrain.config.schema.tokenizer import (
    ByteConfig,
    CharConfig,
    HuggingFaceConfig,
    IdsConfig,
    SavedTokenizerConfig,
    SentencePieceBpeConfig,
    SentencePieceModelConfig,
    SentencePieceUnigramConfig,
    TokenizerConfig,
)
from lmtrain.config.schema.tracking import TrackingConfig
from lmtrain.config.schema.trainer import ParallelConfig, PrecisionConfig, TrainerConfig

LOSSES = ("val/loss", "val/perplexity", "val/bits_per_byte", "train/loss")
"""What a run may minimise."""

OBJECTIVES = (*LOSSES, "train/tokens_per_second", "run/parameters", "run/seconds")
"""... and what a sweep may weigh against it."""

WHOLE_MODEL = "needs the whole model in one process, with parallel=fsdp each has a part of it: choose parallel=ddp"


def default_model_store() -> str:
    """Where models are kept unless something else is said: `$LMTRAIN_MODELS`, else the folder `models` here."""
    return os.environ.get("LMTRAIN_MODELS") or "models"


@dataclass(kw_only=True)
class ExperimentConfig:
    """One run. The root keys live here only and are passed to whoever needs them."""

    model: ModelConfig = REQUIRED
    data: DataConfig = REQUIRED
    tokenizer: TokenizerConfig = REQUIRED
    optimizer: OptimizerConfig = REQUIRED
    schedule: ScheduleConfig = REQUIRED
    precision: PrecisionConfig = REQUIRED
    trainer: TrainerConfig = REQUIRED
    parallel: ParallelConfig = REQUIRED
    tracking: TrackingConfig = REQUIRED
    sweep: SweepConfig = REQUIRED

    lr: float = REQUIRED  # peak learning rate, for every optimizer
    dropout: float = REQUIRED  # embedding, attention and residual dropout
    batch_size: int = REQUIRED  # sequences an optimizer step
    seed: int = 0  # everything random in the run follows from it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    objective: Any = "val/loss"  # one of LOSSES, or a list that begins with one and goes on with any of OBJECTIVES
    """What sweeps optimise; best and patience go by the first. Each as it stands at an evaluation."""
    resume: str | None = None  # null, auto, or a run folder to continue
    force: bool = False  # go on although settings or data differ from those of the run, or memory cannot suffice
    init_from: str | None = None  # run folder, stored model or folder of transformers whose weights to start from
    model_store: str = field(default_factory=default_model_store)  # folder or MLflow registry where init_from looks

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of what sweeps optimise."""
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)

    def __post_init__(self) -> None:
        self._require_objectives()
        require_positive("", lr=self.lr, batch_size=self.batch_size)
        require_fraction("", dropout=self.dropout)
        require(0 <= self.seed < 2**63, f"seed must be at least 0 and below 2**63, got {self.seed}")
        micro = self.trainer.micro_batch_size
        require(
            micro == "auto" or micro <= self.batch_size,
            f"trainer.micro_batch_size ({micro}) must not exceed batch_size ({self.batch_size})",
        )
        if isinstance(self.schedule, PlateauConfig) and self.trainer.patience is not None:
            require(
                self.trainer.patience > self.schedule.patience,
                f"trainer.patience ({self.trainer.patience}) must be above schedule.patience "
                f"({self.schedule.patience}), or the run ends before its rate is lowered",
            )
        self._require_ramps()
        self._require_architecture()
        self._require_divisible()

    def _require_objectives(self) -> None:
        names = self.objectives if isinstance(self.objective, str | list) else (str(self.objective),)
        require(
            bool(names) and names[0] in LOSSES, f"objective must be one of {', '.join(LOSSES)}, got {self.objective}"
        )
        for name in names:
            require(name in OBJECTIVES, f"objective {name!r} is never measured; there are {', '.join(OBJECTIVES)}")
        require(
            "val/bits_per_byte" not in names or not isinstance(self.tokenizer, IdsConfig),
            "objective=val/bits_per_byte needs text: the ids of tokenizer=ids stand for no bytes",
        )
        require(len(set(names)) == len(names), f"objective names {self.objective} twice")

    def _require_ramps(self) -> None:
        for ramp in ("batch_size_warmup_steps", "seq_len_warmup_steps"):
            require(
                self.data.batches != "padded" or getattr(self.trainer, ramp) is None,
                f"trainer.{ramp} is for packed sequences: set it to null with data.batches=padded",
            )
        if self.trainer.batch_size_warmup_steps is not None:
            initial = self.trainer.initial_batch_size
            require(
                initial <= self.batch_size,
                f"trainer.initial_batch_size ({initial}) must not exceed batch_size ({self.batch_size})",
            )
        if self.trainer.seq_len_warmup_steps is not None:
            initial, full = self.trainer.initial_seq_len, self.data.seq_len
            require(
                full % initial == 0 and (full // initial).bit_count() == 1,
                f"data.seq_len ({full}) must be trainer.initial_seq_len ({initial}) times a power of two",
            )

    def _require_divisible(self) -> None:
        """What cannot be done with a part of the model in each process."""
        if self.parallel.strategy != "fsdp":
            return
        require(not isinstance(self.optimizer, AdafactorConfig), f"optimizer=adafactor {WHOLE_MODEL}")
        require(self.precision.format != "fp16", f"precision=fp16 {WHOLE_MODEL}, or precision=bf16")
        require(not self.trainer.diagnostics, f"trainer.diagnostics {WHOLE_MODEL}")

    def _require_architecture(self) -> None:
        if isinstance(self.model, TransformerConfig):
            require(
                self.model.attention != "flex" or self.dropout == 0,
                f"model.attention=flex cannot drop out attention: use dropout=0 (got {self.dropout}) or another",
            )
        if isinstance(self.model, EncoderDecoderConfig):
            sources = self.data.sources.values() if isinstance(self.data, MixtureConfig) else [self.data]
            require(
                all(isinstance(source, PairsConfig) and source.targets == "target" for source in sources),
                "an encoder-decoder is trained on pairs of a source and a target: choose data=multi30k or data=pairs "
                "(with data.targets=target), or a decoder such as model=nano",
            )
            require(
                self.data.batches == "padded",
                f"an encoder-decoder needs data.batches=padded, got {self.data.batches}",
            )


# Group → name of its bare typed option (`model=_decoder`): what a YAML option names first in its defaults list.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"_decoder": DecoderConfig, "_encoder_decoder": EncoderDecoderConfig, "_auto": AutoModelConfig},
    "data": {
        "_python_stdlib": PythonStdlibConfig,
        "_text": TextConfig,
        "_records": RecordsConfig,
        "_chat": ChatConfig,
        "_pairs": PairsConfig,
        "_tokens": TokensConfig,
        "_mixture": MixtureConfig,
    },
    "tokenizer": {
        "_sentencepiece_bpe": SentencePieceBpeConfig,
        "_sentencepiece_unigram": SentencePieceUnigramConfig,
        "_sentencepiece_model": SentencePieceModelConfig,
        "_huggingface": HuggingFaceConfig,
        "_saved": SavedTokenizerConfig,
        "_char": CharConfig,
        "_byte": ByteConfig,
        "_ids": IdsConfig,
    },
    "optimizer": {
        "_adamw": AdamWConfig,
        "_adam": AdamConfig,
        "_muon": MuonConfig,
        "_sgd": SGDConfig,
        "_lion": LionConfig,
        "_adafactor": AdafactorConfig,
    },
    "schedule": {
        "_cosine": CosineConfig,
        "_cosine_restarts": CosineRestartsConfig,
        "_linear": LinearConfig,
        "_wsd": WarmupStableDecayConfig,
        "_constant": ConstantConfig,
        "_inverse_sqrt": InverseSqrtConfig,
        "_plateau": PlateauConfig,
    },
    "precision": {"_precision": PrecisionConfig},
    "trainer": {"_trainer": TrainerConfig},
    "parallel": {"_parallel": ParallelConfig},
    "tracking": {"_tracking": TrackingConfig},
    "sweep": {"_sweep": SweepConfig},
}
