"""How much memory training takes, part by part, by formula: no tensors, no torch.

A step is fullest where logits become a loss, in the backward pass of some block, or when the optimizer moves: that
depends on the shape, so all are computed, from what `activations.py` says of a sequence. Weights, gradients and
optimizer state are in fp32.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from lmtrain.config.schema import EncoderDecoderConfig, OptimizerConfig
from lmtrain.model.sizing import ParameterCount, Shape, block_shapes, count_parameters, embedding_shapes, num_weights
from lmtrain.training.activations import FP32, SequenceMemory, Workload, sequence_memory, shared_mask
from lmtrain.training.division import ONE_PROCESS, Division, Sizes, exchanged, passing, standing
from lmtrain.training.optimizer_memory import state_bytes, update_bytes

Part = Literal[
    "weights",
    "gradients",
    "optimizer state",
    "checkpoint copy",
    "weights in 16 bits",
    "gathered weights",
    "activations",
    "logits and loss",
    "working memory",
    "allocator's gaps",
    "program",
]

PARTS: tuple[Part, ...] = get_args(Part)

PROGRAM_BYTES = {"cpu": int(0.385 * 2**30), "cuda": int(0.8 * 2**30), "mps": int(0.8 * 2**30)}
"""What a process takes of the device's memory that has imported all it needs and trained nothing yet.

On a GPU that is its context, the kernels, and the workspace of matrix products.
"""

BYTES_IN_16_BITS = int(0.13 * 2**30)
"""What was seen of a run in 16 bits besides, on a CPU without instructions for them; another took nothing of it."""

GAPS = {"cuda": 0.05, "mps": 0.05}
"""What a GPU's allocator holds between tensors, as a share of these."""

KEPT_BELOW = 8 * 2**20
"""Bytes: what is smaller, the C library takes from what it keeps (`hardware.keep_freed_memory`) and leaves gaps in."""

GAPS_OF_SMALL = {"none": 0.35, "selective": 0.45, "full": 0.25}
"""On a CPU, as a share of small tensors that come and go, by checkpointing: the most that was seen of resident memory.

Weights and what else stays leaves no gaps. With `selective` checkpointing some of a block goes and some stays, with
`full` all that stays is of one size.
"""

GAPS_OF_LARGE = 0.1
"""... as a share of large ones at the least, some of which are not."""

MOST_SEQUENCES = 2**30


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of the device's memory in one step, at each moment that may be the fullest."""

    moments: Mapping[str, Mapping[Part, int]]

    @property
    def fullest(self) -> str:
        """The name of the moment when all parts together are largest."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Of all parts together, then."""
        return sum(self.moments[self.fullest].values())

    def largest(self, part: Part) -> int:
        """Of one part, when that is largest."""
        return max(moment.get(part, 0) for moment in self.moments.values())


LOGITS_SHARE = 1 / 8
"""Of a device's memory, for logits and what the loss makes of them: more are made in chunks, and each chunk twice."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """The memory of a run, for any microbatch."""

    work: Workload
    optimizer: OptimizerConfig
    division: Division = ONE_PROCESS  # each part is then of one process
    beside_training: int = 0  # bytes of the device's memory that the program takes for other things
    device_memory: float = math.inf  # bytes; a share of it is for logits

    @property
    def positions(self) -> int | None:
        """Of how many positions the logits are in memory at a time, where those of a sequence are too many; None: all.

        Those that fit into `LOGITS_SHARE` of the device's memory, on their way back.
        """
        of_one = self._sequence.loss_backward / self.work.seq_len
        if math.isinf(self.device_memory):
            return None
        return max(1, int(LOGITS_SHARE * self.device_memory / of_one))

    def footprint(self, micro_batch_size: int, batch_size: int) -> Footprint:
        """Of a step over `batch_size` sequences, of which `micro_batch_size` go through the model at a time."""
        work, sequence, size = self.work, self._sequence, min(micro_batch_size, batch_size)
        # Sequences whose logits are there at a time; of chunks, the gradients of what they are made of come together.
        with_logits = min(size, (self.positions or math.inf) / work.seq_len)
        chunked = with_logits < size
        accumulated = size < batch_size  # then all gradients are there from the second microbatch on
        before = self.gradient_bytes if accumulated else 0
        tables_in_16_bits = self._table // 2 if work.mixed else 0
        all_in_16_bits = tables_in_16_bits + sum(self._blocks_in_16_bits)
        left_in_16_bits = all_in_16_bits if work.checkpointing == "none" else tables_in_16_bits
        held = sequence.embedded + sum(block.held for block in sequence.blocks)
        held += sequence.last_norm * (2 if self._num_encoder_blocks else 1)
        activations = size * held + shared_mask(work)
        moments: dict[str, dict[Part, int]] = {
            "loss": {
                "gradients": before,
                "weights in 16 bits": all_in_16_bits,
                "activations": activations,
                "logits and loss": self._padded_head + int(with_logits * sequence.loss_forward),
            },
            "gradient of the loss": {
                "gradients": before + chunked * self._table,
                "weights in 16 bits": left_in_16_bits,
                "activations": activations + chunked * size * sequence.last_norm,
                "logits and loss": self._padded_head + int(with_logits * sequence.loss_backward),
            },
            "gradient of the head": {
                "gradients": before + self._table * (1 + chunked),
                "weights in 16 bits": left_in_16_bits + tables_in_16_bits,
                "activations": activations + chunked * size * sequence.last_norm,
                "logits and loss": self._padded_head + int(with_logits * sequence.logits_gradient),
            },
            "forward pass of the last block": {
                "gradients": before,
                "weights in 16 bits": all_in_16_bits - tables_in_16_bits,
                "activations": activations,
                "working memory": size * sequence.blocks[-1].making,
            },
            # From the last to the first, gradients grow and activations go.
            "backward pass of a block": max(
                (self._backward_of_block(number, size, accumulated) for number in range(len(sequence.blocks))),
                key=lambda parts: sum(parts.values()),
            ),
            "gradient of the embedding": {
                "gradients": self.gradient_bytes + self._table * (2 * self._summed + accumulated),
                "working memory": size * FP32 * work.seq_len * work.model.d_model,
            },
            "update": {"gradients": self.gradient_bytes, "working memory": self._update_bytes},
        }
        return Footprint(
            moments={
                name: self._with_standing(moment, size, accumulated=accumulated, updating=name == "update")
                for name, moment in moments.items()
            }
        )

    def largest_micro_batch(self, room: float) -> int:
        """Most sequences at a time for which `room` bytes suffice, if their gradients are added up; 0: not even one."""
        sizes = range(1, MOST_SEQUENCES)
        return bisect.bisect_right(sizes, room, key=lambda size: self.footprint(size, size + 1).peak)

    def chosen_micro_batch(self, room: float, batch_size: int) -> int:
        """What `trainer.micro_batch_size=auto` should come to: the batch, its half, quarter …; 0: not one sequence."""
        size = batch_size
        while self.footprint(size, batch_size).peak > room:
            if size == 1:
                return 0
            size = (size + 1) // 2
        return size

    @property
    def weight_bytes(self) -> int:
        return FP32 * self.parameters.total

    @property
    def gradient_bytes(self) -> int:
        return self.weight_bytes

    @cached_property
    def state_bytes(self) -> int:
        """What the optimizer keeps from step to step."""
        return state_bytes(self.optimizer, self.parameters, self._in_blocks, self._tables)

    @property
    def checkpoint_bytes(self) -> int:
        """The copy in main memory that checkpoints are written from: of a process, what it holds."""
        return self.division.share(self.weight_bytes + self.state_bytes)

    @property
    def offloaded_bytes(self) -> int:
        """Main memory that takes what the device does not hold: weights, gradients, optimizer state."""
        whole = self.weight_bytes + self.gradient_bytes + self.state_bytes
        return self.division.share(whole) if self.division.cpu_offload else 0

    def exchanged_bytes(self, passes: int) -> int:
        """What each of several processes sends to the others in a step of so many microbatches."""
        return exchanged(self.division, self._sizes, passes)

    @property
    def sequence_bytes(self) -> int:
        """What one more sequence of a microbatch takes at the most."""
        sequence = self._sequence
        blocks = sum(block.held for block in sequence.blocks)
        passing = max(block.kept - block.held + block.working for block in sequence.blocks)
        ends = sequence.embedded + 2 * sequence.last_norm
        return blocks + ends + max(passing, sequence.loss_forward, sequence.loss_backward)

    @cached_property
    def parameters(self) -> ParameterCount:
        return count_parameters(self.work.model, self.work.vocab_size, self.work.seq_len)

    def _backward_of_block(self, number: int, size: int, accumulated: bool) -> dict[Part, int]:
        """The fullest moment of one block's; blocks are numbered from the input on."""
        work, sequence, blocks = self.work, self._sequence, block_shapes(self.work.model)
        shapes, block, in_encoder = blocks[number], sequence.blocks[number], number < self._num_encoder_blocks
        if accumulated:
            gradients = self.gradient_bytes + FP32 * max(num_weights([shape]) for shape in shapes.matrices)
        else:
            later = sum(num_weights(one.matrices) for one in blocks[number + 1 :])
            gradients = FP32 * (later + num_weights(shapes.feed_forward))
        # Of the head; and of the embedding, where one waits for another that it will be added to: that of a tied head,
        # or of the decoder's tokens while the encoder is passed.
        tied = work.model.tie_embeddings
        tables = (not tied and not accumulated) + (tied or in_encoder)
        held = sequence.embedded + sum(one.held for one in sequence.blocks[: number + 1])
        if self._num_encoder_blocks and not in_encoder:
            held += sequence.last_norm  # of the encoder
        first_cast = 0 if work.checkpointing == "none" else number
        return {
            "gradients": gradients + tables * self._table,
            "weights in 16 bits": sum(self._blocks_in_16_bits[first_cast : number + 1]),
            "activations": size * (held + block.kept - block.held) + shared_mask(work),
            "working memory": size * block.working,
        }

    def _gaps_on_cpu(self, tensors: Mapping[Part, int], size: int) -> int:
        """Between tensors that come and go: as large as the stream of `size` sequences, or as a matrix of the model."""
        of_stream = size * FP32 * self.work.seq_len * self.work.model.d_model
        of_matrix = FP32 * max(num_weights([shape]) for shape in self._in_blocks)
        passes = sum(tensors.get(part, 0) for part in ("activations", "logits and loss", "working memory"))
        passes += tensors.get("weights in 16 bits", 0)
        moves = tensors["gradients"] + self._update_bytes  # which does not find all that the passes have left
        most = GAPS_OF_SMALL[self.work.checkpointing]
        # No more sequences have smaller gaps, so that the largest microbatch that fits is the only one of its kind.
        gaps = [
            max(GAPS_OF_LARGE, most * min(1.0, KEPT_BELOW / piece)) * size_of_all
            for piece, size_of_all in ((of_stream, passes), (of_matrix, moves))
        ]
        return int(sum(gaps))

    def _with_standing(
        self, moment: Mapping[Part, int], size: int, *, accumulated: bool, updating: bool
    ) -> dict[Part, int]:
        """A moment with what is there from the first step to the last, and what the allocator adds to it."""
        device, division = self.work.device, self.division
        weights, state = standing(division, self.weight_bytes, self.state_bytes)
        gradients, gathered = passing(
            division, self._sizes, moment["gradients"], accumulated=accumulated, updating=updating
        )
        tensors: dict[Part, int] = {
            "weights": weights,
            "optimizer state": state,
            "checkpoint copy": self.checkpoint_bytes if device == "cpu" else 0,
            **moment,
            "gradients": gradients,
            "gathered weights": gathered,
        }
        if division.divides_weights:
            tensors["weights in 16 bits"] = 0  # they are gathered so
        gaps = self._gaps_on_cpu(tensors, size) if device == "cpu" else int(GAPS[device] * sum(tensors.values()))
        program = PROGRAM_BYTES[device] + self.beside_training
        program += BYTES_IN_16_BITS if device == "cpu" and self.work.mixed else 0
        return tensors | {"allocator's gaps": gaps, "program": program}

    @cached_property
    def _update_bytes(self) -> int:
        """What the optimizer takes while it moves."""
        by_gram_matrix = self.work.device == "cpu" and not self.division.divides_weights
        return update_bytes(
            self.optimizer, self.parameters, self._in_blocks, self._tables, by_gram_matrix=by_gram_matrix
        )

    @cached_property
    def _sequence(self) -> SequenceMemory:
        return sequence_memory(self.work)

    @cached_property
    def _in_blocks(self) -> list[Shape]:
        """The matrices of all blocks, in their order."""
        return [shape for block in block_shapes(self.work.model) for shape in block.matrices]

    @property
    def _tables(self) -> list[Shape]:
        """The matrices outside of the blocks."""
        model, vocab_size = self.work.model, self.work.vocab_size
        head = [] if model.tie_embeddings else [(vocab_size, model.d_model)]
        return [*embedding_shapes(model, vocab_size, self.work.seq_len), *head]

    @cached_property
    def _blocks_in_16_bits(self) -> list[int]:
        return [2 * num_weights(block.matrices) * self.work.mixed for block in block_shapes(self.work.model)]

    @property
    def _summed(self) -> bool:
        """Whether the gradient of the embedding is a sum: of head and tokens, or of a source's and a target's."""
        return self.work.model.tie_embeddings or self._num_encoder_blocks > 0

    @property
    def _num_encoder_blocks(self) -> int:
        model = self.work.model
        return model.num_encoder_layers if isinstance(model, EncoderDecoderConfig) else 0

    @cached_property
    def _sizes(self) -> Sizes:
        blocks = [num_weights(block.matrices) for block in block_shapes(self.work.model)]
        matrices = [rows * columns for rows, columns in (*self._in_blocks, *self._tables)]
        return Sizes(
            total=self.parameters.total,
            largest_block=max(blocks),
            outside=num_weights(self._tables),
            largest_matrix=max(matrices),
            width=self.work.width,
        )

    @property
    def _padded_head(self) -> int:
        """The copy of the output matrix that is padded; in 16 bits there is one anyway."""
        padded = self.work.output_rows > self.work.vocab_size and not self.work.mixed
        return FP32 * self.work.output_rows * self.work.model.d_model * padded

    @property
    def _table(self) -> int:
        """Bytes of a matrix of vocabulary and width."""
        return FP32 * self.work.vocab_size * self.work.model.d_model
