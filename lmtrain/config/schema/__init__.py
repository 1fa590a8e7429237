"""Every setting of an experiment: its type, its meaning, its default and the rules it must keep.

Plain dataclasses: no Hydra, no torch. Each option of a config group that has fields of its own is a class of its
own, so a key of another option is refused. `__post_init__` holds the rules inside one group,
`ExperimentConfig.__post_init__` those between groups. Nothing here is changed after construction; what follows
from other fields is a property.
"""

from __future__ import annotations

from lmtrain.config.schema.data import (
    ByteConfig,
    CharConfig,
    DataConfig,
    PythonStdlibConfig,
    SentencePieceBpeConfig,
    TextConfig,
    TokenizerConfig,
)
from lmtrain.config.schema.experiment import SCHEMAS, ExperimentConfig
from lmtrain.config.schema.model import DecoderConfig, ModelConfig
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
from lmtrain.config.schema.tracking import MlflowConfig, NoTrackingConfig, TrackingConfig
from lmtrain.config.schema.trainer import ParallelConfig, PrecisionConfig, TrainerConfig

__all__ = [
    "SCHEMAS",
    "AdafactorConfig",
    "AdamConfig",
    "AdamWConfig",
    "ByteConfig",
    "CharConfig",
    "ConfirmConfig",
    "ConstantConfig",
    "CosineConfig",
    "CosineRestartsConfig",
    "DataConfig",
    "DecayConfig",
    "DecoderConfig",
    "ExperimentConfig",
    "InverseSqrtConfig",
    "LinearConfig",
    "LionConfig",
    "MlflowConfig",
    "ModelConfig",
    "MomentsConfig",
    "MuonConfig",
    "NoTrackingConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlateauConfig",
    "PrecisionConfig",
    "PythonStdlibConfig",
    "SGDConfig",
    "ScheduleConfig",
    "SentencePieceBpeConfig",
    "SweepConfig",
    "TextConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainerConfig",
    "WarmupStableDecayConfig",
]
