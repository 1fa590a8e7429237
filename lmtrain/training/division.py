"""What is different of a step's memory where several processes make one run: one process's share, by formula.

`ddp` has all of the model in each process, and its gradients in buckets that are always there. `fsdp` has a part of
weights, gradients and optimizer state in each, and gathers what it computes with: the matrices outside of the blocks,
the block at hand and the next one, or all blocks where they are not dropped after the forward pass. While microbatches
are added up, gradients are whole in each process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lmtrain.training.activations import FP32

BLOCKS_AT_HAND = 2
"""Gathered at a time: the one that is computed with, and the one that is next."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a run is divided among processes, one for each device."""

    strategy: Literal["single", "ddp", "fsdp"] = "single"
    processes: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @property
    def divides_weights(self) -> bool:
        return self.strategy == "fsdp"

    def share(self, size: int) -> int:
        """Of something that each process holds a part of, rounded up."""
        return -(-size // self.processes) if self.divides_weights else size


ONE_PROCESS = Division()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers in the model."""

    total: int
    largest_block: int
    outside: int  # of the blocks: embedding, head, last norm
    largest_matrix: int
    width: int  # bytes of a number that matrix products take


def standing(division: Division, weights: int, state: int) -> tuple[int, int]:
    """Bytes of weights and optimizer state in the device's memory, from those of the whole."""
    if division.cpu_offload:
        return 0, 0
    return division.share(weights), division.share(state)


class Passing(NamedTuple):
    """Bytes of what comes and goes."""

    gradients: int
    gathered_weights: int = 0


def passing(division: Division, sizes: Sizes, gradients: int, *, accumulated: bool, updating: bool) -> Passing:
    """Bytes of gradients and gathered weights at a moment, from the gradients there would be in one process."""
    whole = FP32 * sizes.total
    if division.strategy == "ddp" and division.processes > 1:
        return Passing(whole + FP32 * sizes.largest_matrix)
    if not division.divides_weights:
        return Passing(gradients)
    if updating:
        return Passing(0 if division.cpu_offload else division.share(whole))
    at_hand = min(BLOCKS_AT_HAND * sizes.largest_block, sizes.total - sizes.outside)
    gathered = sizes.outside + at_hand if division.reshard_after_forward else sizes.total
    kept = gradients if accumulated else 0 if division.cpu_offload else division.share(gradients)
    # As the backward pass of a block leaves them, and the copy in fp32 that is added up among the processes.
    new = (sizes.width + FP32) * at_hand + sizes.width * sizes.outside if gradients else 0
    return Passing(kept + new, sizes.width * gathered)


def exchanged(division: Division, sizes: Sizes, passes: int) -> int:
    """Bytes that each process sends in a step of so many microbatches, by rings.

    Gradients are added up in fp32; of a divided model weights are gathered for each forward pass, and for the backward
    pass again if they were dropped.
    """
    others = division.processes - 1
    if division.strategy == "ddp":
        return 2 * others * FP32 * sizes.total // division.processes
    if not division.divides_weights:
        return 0
    gathered = passes * (2 if division.reshard_after_forward else 1) * sizes.width
    return others * (gathered + FP32) * sizes.total // division.processes
