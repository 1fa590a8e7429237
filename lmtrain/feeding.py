"""What a run is fed with: from its settings and its prepared data to batches, and how many of them there are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmtrain.config.schema import EncoderDecoderConfig, ExperimentConfig
from lmtrain.data.batches import Batch, EvalBatches, Source, TrainBatches
from lmtrain.data.evaluation import eval_batches
from lmtrain.data.packed import PackedBatches
from lmtrain.data.padded import PaddedBatches
from lmtrain.data.prepared import SPLIT_WORDS, PreparedData, SplitName
from lmtrain.data.ramps import Ramp
from lmtrain.data.sequence_to_sequence import document_rows
from lmtrain.distributed.team import Team


@dataclass(frozen=True)
class OwnShare:
    """Of each batch what this process trains on."""

    batches: TrainBatches
    team: Team

    def __getitem__(self, step: int) -> Batch:
        return self.batches[step].share(self.team.rank, self.team.size)


def train_batches(config: ExperimentConfig, data: PreparedData) -> TrainBatches:
    """What the steps of a run train on. Raises DataError if the text is too short for a sequence."""

    def ramp(initial: int, steps: int | None) -> Ramp | None:
        return None if steps is None else Ramp(initial=initial, steps=steps)

    sources, trainer = _sources(data, "train"), config.trainer
    if config.data.batches == "padded":
        return PaddedBatches(
            document_rows(
                sources,
                seq_len=config.data.seq_len,
                split=SPLIT_WORDS["train"],
                source_end_id=_source_end_id(config, data),
            ),
            [source.weight for source in sources],
            batch_size=config.batch_size,
            seed=config.seed,
        )
    return PackedBatches(
        sources,
        seq_len=config.data.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        separate_documents=config.data.batches == "packed_documents",
        batch_size_ramp=ramp(trainer.initial_batch_size, trainer.batch_size_warmup_steps),
        seq_len_ramp=ramp(trainer.initial_seq_len, trainer.seq_len_warmup_steps),
    )


def val_batches(config: ExperimentConfig, data: PreparedData) -> EvalBatches:
    """What a run is evaluated on. Raises DataError if there is no target."""
    return eval_batches(
        config.data,
        _sources(data, "val"),
        split=SPLIT_WORDS["val"],
        batch_size=config.batch_size,
        source_end_id=_source_end_id(config, data),
        num_batches=config.trainer.eval_batches,
    )


def _source_end_id(config: ExperimentConfig, data: PreparedData) -> int | None:
    """What the targets of an encoder-decoder begin after."""
    return data.tokenizer.end_id if isinstance(config.model, EncoderDecoderConfig) else None


def _sources(data: PreparedData, split: SplitName) -> list[Source]:
    """Named if there are several."""
    several = len(data.sources) > 1
    return [
        Source(source.splits[split].documents, source.weight, source.name if several else "")
        for source in data.sources
        if split in source.splits
    ]


def count_steps(config: ExperimentConfig, batches: TrainBatches) -> int:
    """Optimizer steps of the budget, whichever of the three gives it."""
    trainer = config.trainer
    if trainer.max_steps is not None:
        return trainer.max_steps
    if trainer.max_epochs is not None:
        return batches.steps_for(sequences=math.ceil(trainer.max_epochs * batches.epoch_size))
    assert trainer.max_tokens is not None
    return batches.steps_for(sequences=math.ceil(trainer.max_tokens / batches.mean_targets))
