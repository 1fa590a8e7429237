"""How well a trained model predicts a text: nats of its targets, together, by source and by document.

Owns the counting. Which text is in `evaluated_text`, which windows are read in `data/evaluation`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lmtrain.config.evaluation import EvaluationSettings
from lmtrain.config.schema import ExperimentConfig, TransformerConfig
from lmtrain.data.batches import IGNORED, Batch, EvalBatches, Rows, Source
from lmtrain.data.documents import Documents
from lmtrain.data.evaluation import eval_batches, sliding_batches
from lmtrain.data.prepared import SPLIT_WORDS
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, HardwareError
from lmtrain.hardware import available_memory, choose_format, require_format
from lmtrain.inference.evaluated_text import EvaluatedText, Part
from lmtrain.inference.trained import TrainedModel
from lmtrain.training.evaluation import measure, metrics
from lmtrain.training.memory import out_of_memory_recognized
from lmtrain.training.precision import Precision
from lmtrain.training.step import half

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DocumentLosses:
    """Of each document of a part. All arrays (D,)."""

    nats: NDArray[np.float64]
    num_targets: NDArray[np.int64]  # that count; 0 of a document that was left out
    first: NDArray[np.int64]  # position of the first of them in the tokens
    last: NDArray[np.int64]

    def num_bytes(self, number: int, documents: Documents, tokenizer: Tokenizer) -> int:
        """UTF-8 bytes of the text that the targets of a document decode to."""
        if not self.num_targets[number]:
            return 0
        targets = slice(self.first[number], self.last[number] + 1)
        ids = documents.tokens[targets]
        if documents.counted is None:
            return len(tokenizer.decode(ids.tolist()).encode())
        counted = documents.counted[targets]
        runs = np.split(ids, 1 + np.flatnonzero(np.diff(counted)))  # of answers, and of what is read between them
        return sum(len(tokenizer.decode(run.tolist()).encode()) for run in runs[::2])


@dataclass(frozen=True, kw_only=True)
class PartLosses:
    """Of the documents of one split of one source."""

    part: Part
    nats: float
    num_targets: int  # that count
    documents: DocumentLosses | None  # None: not asked for


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured."""

    text: EvaluatedText
    nats: float
    num_targets: int  # that count
    parts: tuple[PartLosses, ...]
    note: str  # why some of the targets do not count; empty if all do

    @property
    def metrics(self) -> dict[str, float]:
        """Loss, perplexity and bits per byte, as in training."""
        return metrics(self.text.split, self.nats, self.num_targets, self.text.bytes_per_target())

    def metrics_of(self, source: str) -> dict[str, float]:
        """The same of one source of a mixture. Empty if none of its targets counts."""
        parts = [one for one in self.parts if one.part.source == source]
        nats, num_targets = sum(one.nats for one in parts), sum(one.num_targets for one in parts)
        return metrics(self.text.split, nats, num_targets, self.text.bytes_per_target(source)) if num_targets else {}


def choose_precision(trained: TrainedModel, wanted: str | None = None) -> Precision:
    """The number format to evaluate in: fp32, or on CUDA that of the run, unless `wanted`. Raises HardwareError."""
    device = trained.model.device
    of_run = trained.config.precision.format
    wanted = wanted or (("bf16" if of_run == "fp8" else of_run) if device.type == "cuda" else "fp32")
    require_format(wanted, device)
    return Precision(device, *choose_format(wanted, device, lambda: 1.0))


def evaluate_text(
    trained: TrainedModel,
    settings: EvaluationSettings,
    text: EvaluatedText,
    precision: Precision,
    *,
    stride: int | None = None,
    per_document: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure every target once.

    Args:
        stride: None: in the batches that training evaluates on. Else in windows of `data.seq_len` tokens that move on
            by so many, inside each document.
        on_progress: told the batches that are done and those that there are.

    Raises:
        ConfigError: `stride` is out of range, or for an encoder-decoder.
        DataError: not one target counts.
        HardwareError: one sequence does not fit into memory.
    """
    batches = _batches(trained, settings, text, stride)
    meter = _Meter(trained, precision, settings.config)
    tallies = [_Tally(part.documents, per_document) for part in text.parts]
    nats = 0.0
    for done, (rows, batch) in enumerate(batches.located(), start=1):
        losses_BT = meter(batch)
        nats += losses_BT.sum(dtype=torch.float64).item()
        losses, counted = losses_BT.double().numpy(), (batch.targets != IGNORED).numpy()
        for source in np.unique(rows.sources).tolist():
            of_it = rows.sources == source
            tallies[source].add(rows[of_it], losses[of_it], counted[of_it])
        if on_progress is not None:
            on_progress(done, len(batches))
    num_targets = sum(tally.num_targets for tally in tallies)
    if not num_targets:
        raise DataError(f"not one target of {text.name} counts; give more text, or other documents")
    return Evaluation(
        text=text,
        nats=nats,
        num_targets=num_targets,
        parts=tuple(
            PartLosses(part=part, nats=tally.nats, num_targets=tally.num_targets, documents=tally.documents)
            for part, tally in zip(text.parts, tallies, strict=True)
        ),
        note=batches.note if num_targets < text.num_targets else "",
    )


def _batches(
    trained: TrainedModel, settings: EvaluationSettings, text: EvaluatedText, stride: int | None
) -> EvalBatches:
    config, end_id = settings.config, trained.tokenizer.end_id
    named = len(text.parts) > 1
    sources = [Source(part.documents, name=(part.source or part.split) if named else "") for part in text.parts]
    if stride is not None:
        settings.require_stride(stride)
        return sliding_batches(config.data, sources, stride=stride, batch_size=config.batch_size, end_id=end_id)
    return eval_batches(
        config.data,
        sources,
        split="evaluated" if text.split == "all" else SPLIT_WORDS[text.split],
        batch_size=config.batch_size,
        source_end_id=end_id if trained.reads_from_the_start else None,
        num_batches=settings.num_batches(text.split),
    )


class _Meter:
    """Measures batches, in parts that fit into memory."""

    def __init__(self, trained: TrainedModel, precision: Precision, config: ExperimentConfig) -> None:
        self._model = trained.model
        self._precision = precision
        self._rows = config.batch_size
        if precision.device.type == "cpu":  # which promises memory that is not there
            row = _bytes_of_row(trained, config.data.seq_len)
            self._rows = max(1, min(self._rows, int(available_memory() / 2 / row)))

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Nats of every target, (B, T)."""
        while True:
            try:
                with out_of_memory_recognized():
                    return measure(self._model, batch, self._precision, self._rows)
            except torch.OutOfMemoryError as error:
                if self._rows == 1:
                    raise HardwareError(
                        f"one sequence does not fit into the memory of device={self._precision.device.type}: "
                        "take a smaller data.seq_len, or another device"
                    ) from error
                log.warning("out of memory with %d sequences at a time, going on with %d", self._rows, half(self._rows))
                self._rows = half(self._rows)


def _bytes_of_row(trained: TrainedModel, seq_len: int) -> int:
    """What a forward pass of one sequence stays below: logits in several forms, and the widest results of a block."""
    config = trained.config.model
    assert isinstance(config, TransformerConfig)
    widest = max(matrix.size(0) for matrix in trained.model.block_matrices())
    return 4 * seq_len * (4 * trained.model.vocab_size + 8 * widest + config.num_heads * seq_len)


class _Tally:
    """The nats of a part, added up row by row."""

    def __init__(self, documents: Documents, per_document: bool) -> None:
        self.nats = 0.0
        self.num_targets = 0
        self.documents: DocumentLosses | None = None
        self._ends = np.asarray(documents.ends)
        if per_document:
            number = len(documents)
            self.documents = DocumentLosses(
                nats=np.zeros(number),
                num_targets=np.zeros(number, np.int64),
                first=np.full(number, len(documents.tokens)),
                last=np.full(number, -1),
            )

    def add(self, rows: Rows, losses: NDArray[np.float64], counted: NDArray[np.bool_]) -> None:
        """All arrays (B, T)."""
        self.nats += float(losses.sum())
        self.num_targets += int(np.count_nonzero(counted))
        if self.documents is None:
            return
        positions = (rows.starts[:, None] + 1 + np.arange(losses.shape[1]))[counted] % self._ends[-1]
        numbers = self._ends.searchsorted(positions, side="right")
        np.add.at(self.documents.nats, numbers, losses[counted])
        np.add.at(self.documents.num_targets, numbers, 1)
        np.minimum.at(self.documents.first, numbers, positions)
        np.maximum.at(self.documents.last, numbers, positions)
