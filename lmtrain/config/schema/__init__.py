"""Every setting of an experiment: its type, its meaning, its default and the rules it must keep.

Plain dataclasses: no Hydra, no torch. Each option of a config group that has fields of its own is a class of its
own, so a key of another option is refused. `__post_init__` holds the rules inside one group,
`ExperimentConfig.__post_init__` those between groups. Nothing here is changed after construction; what follows
from other fields is a property.
"""

from __future__ import annotations

from lmtrain.config.schema.data import (
    ChatConfig,
    DataConfig,
    FilesConfig,
    MixtureConfig,
    PairsConfig,
    PythonStdlibConfig,
    RecordsConfig,
    TextConfig,
    TokensConfig,
    is_of_pairs,
)
from lmtrain.config.schema.experiment import SCHEMAS, ExperimentConfig, default_model_store
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
    MomentsConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from lmtrain.config.schema.schedule import (
    ConstantConfig,
    CosineConfig,
    CosineRestartsConfig,
    DecayConfig,
    InverseSqrtConfig,
    LinearConfig,
    PlateauConfig,
    ScheduleConfig,
    WarmupStableDecayConfig,
)
from lmtrain.config.schema.sweep import ConfirmConfig, SweepConfig
from lmtrain.config.schema.tokenizer import (
    ByteConfig,
    CharConfig,
    HuggingFaceConfig,
    IdsConfig,
    SavedTokenizerConfig,
    SentencePieceBpeConfig,
    SentencePieceConfig,
    SentencePieceModelConfig,
    SentencePieceUnigramConfig,
    TokenizerConfig,
)
from lmtrain.config.schema.tracking import TrackingConfig
from lmtrain.config.schema.trainer import ParallelConfig, PrecisionConfig, TrainerConfig

__all__ = [
    "SCHEMAS",
    "AdafactorConfig",
    "AdamConfig",
    "AdamWConfig",
    "AutoModelConfig",
    "ByteConfig",
    "CharConfig",
    "ChatConfig",
    "ConfirmConfig",
    "ConstantConfig",
    "CosineConfig",
    "CosineRestartsConfig",
    "DataConfig",
    "DecayConfig",
    "DecoderConfig",
    "EncoderDecoderConfig",
    "ExperimentConfig",
    "FilesConfig",
    "HuggingFaceConfig",
    "IdsConfig",
    "InverseSqrtConfig",
    "LinearConfig",
    "LionConfig",
    "MixtureConfig",
    "ModelConfig",
    "MomentsConfig",
    "MuonConfig",
    "OptimizerConfig",
    "PairsConfig",
    "ParallelConfig",
    "PlateauConfig",
    "PrecisionConfig",
    "PythonStdlibConfig",
    "RecordsConfig",
    "SGDConfig",
    "SavedTokenizerConfig",
    "ScheduleConfig",
    "SentencePieceBpeConfig",
    "SentencePieceConfig",
    "SentencePieceModelConfig",
    "SentencePieceUnigramConfig",
    "SweepConfig",
    "TextConfig",
    "TokenizerConfig",
    "TokensConfig",
    "TrackingConfig",
    "TrainerConfig",
    "TransformerConfig",
    "WarmupStableDecayConfig",
    "default_model_store",
    "is_of_pairs",
]
