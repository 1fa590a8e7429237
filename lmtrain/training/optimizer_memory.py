"""How much memory optimizers take, by formula: what they keep from step to step, and what they take while they move.

Owns the rule by which Muon takes matrices together, which the latter follows from. No tensors, no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from lmtrain.config.schema import AdafactorConfig, LionConfig, MuonConfig, OptimizerConfig, SGDConfig
from lmtrain.model.sizing import ParameterCount, Shape, num_weights
from lmtrain.training.activations import FP32

MAX_STACK_BYTES = 256 * 2**20
"""Of the matrices that Muon takes together, unless a single one is larger: more of them would not be faster.

Its working memory is a few times as much. Without a bound it was six times the weights of the largest shape: 24 GiB
beside a model of 1.4 G parameters.
"""

GRAM_STEPS = 3
"""Of Muon on Gram matrices until they are made anew: their rounding errors grow twelvefold each."""

_Matrix = TypeVar("_Matrix")


def in_stacks(
    matrices: Iterable[_Matrix], kind: Callable[[_Matrix], Hashable], size: Callable[[_Matrix], int]
) -> list[list[_Matrix]]:
    """Matrices of one kind together, in their order, as many as take no more than `MAX_STACK_BYTES`."""
    stacks: list[list[_Matrix]] = []
    open_stacks: dict[Hashable, list[_Matrix]] = {}
    filled: dict[Hashable, int] = defaultdict(int)
    for matrix in matrices:
        own = kind(matrix)
        filled[own] += size(matrix)
        if own not in open_stacks or filled[own] > MAX_STACK_BYTES:
            open_stacks[own], filled[own] = [], size(matrix)
            stacks.append(open_stacks[own])
        open_stacks[own].append(matrix)
    return stacks


def state_bytes(
    optimizer: OptimizerConfig, count: ParameterCount, in_blocks: Sequence[Shape], tables: Sequence[Shape]
) -> int:
    """What an optimizer keeps from step to step of the matrices in the blocks, of those outside, and of the rest."""
    match optimizer:
        case MuonConfig():
            return FP32 * (2 * count.total - num_weights(in_blocks))
        case LionConfig():
            return FP32 * count.total
        case SGDConfig():
            return FP32 * count.total if optimizer.momentum else 0
        case AdafactorConfig():
            rows_and_columns = sum(map(sum, (*in_blocks, *tables)))
            return FP32 * (rows_and_columns + count.bias + count.norm)
    return 2 * FP32 * count.total


def update_bytes(
    optimizer: OptimizerConfig,
    count: ParameterCount,
    in_blocks: Sequence[Shape],
    tables: Sequence[Shape],
    *,
    by_gram_matrix: bool,
) -> int:
    """What an optimizer takes while it moves. Fused ones take nothing. `by_gram_matrix`: how Muon iterates."""
    match optimizer:
        case MuonConfig() if (
            by_gram_matrix
        ):  # updates, factors, and those they are made anew from; squares to iterate on
            stacks = in_stacks(in_blocks, min, _size)
            times = 3 if optimizer.ns_steps > GRAM_STEPS else 2
            return max(sum(times * _size(shape) + 5 * FP32 * min(shape) ** 2 for shape in stack) for stack in stacks)
        case MuonConfig():  # updates, stacked, normalised, iterated; and products
            stacks = in_stacks(in_blocks, lambda shape: shape, _size)
            return max(sum(4 * _size(shape) + 2 * FP32 * min(shape) ** 2 for shape in stack) for stack in stacks)
        case LionConfig():
            return FP32 * count.total
        case AdafactorConfig():  # one tensor after the other, with its rows and columns
            return FP32 * max(rows * columns + rows + columns for rows, columns in (*in_blocks, *tables))
    return 0


def _size(shape: Shape) -> int:
    return FP32 * num_weights([shape])
