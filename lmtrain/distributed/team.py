"""The processes of a job as one: what they agree on, add up and hear from the one that leads.

Everything here is a collective: each process must make the same calls in the same order. Alone, all of it is free.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lmtrain.distributed.placement import COMMAND, Placement, find_placement
from lmtrain.errors import HardwareError, LmtrainError, RunError

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""Processes wait for each other while one prepares text. A process that died is noticed by torchrun, at once."""

Strategy = Literal["single", "ddp", "fsdp"]


class Team:
    """The processes of a run."""

    def __init__(self, placement: Placement) -> None:
        self.rank, self.size = placement.rank, placement.size
        self.local_rank, self.local_size = placement.local_rank, placement.local_size
        self._phase: Literal["idle", "preparing", "training", "broken"] = "idle"

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def has_others(self) -> bool:
        return self.size > 1

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.has_others:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes give."""
        return max(self.gather(number)) if self.has_others else number

    def least(self, number: int) -> int:
        """The least of the numbers that the processes give."""
        return min(self.gather(number)) if self.has_others else number

    def from_leader(self, value: T) -> T:
        """What the leading process gives."""
        if not self.has_others:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """What every process gives, by rank."""
        if not self.has_others:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def begin(self, order: T) -> T:
        """Hear, or as the leader tell, which run is next. `ready` and `end` must follow."""
        if self._phase == "broken":
            raise RunError("an earlier run of this job ended in one of its processes only: start the job again")
        order = self.from_leader(order)
        self._phase = "preparing"
        return order

    def ready(self, problem: LmtrainError | None = None) -> None:
        """Begin training when every process can. Raises RunError if one cannot."""
        self._phase = "idle"
        problems = [text for text in self.gather(None if problem is None else str(problem)) if text is not None]
        if problem is not None:
            raise problem
        if problems:
            raise RunError(f"another process of the job cannot train: {problems[0]}")
        self._phase = "training"

    def trained(self) -> None:
        """Training came to an end that all processes know of."""
        self._phase = "idle"

    def end(self) -> None:
        """Say, before `ready` was called, that there is nothing to train; after a failure in training, take note."""
        if self._phase == "preparing":
            self._phase = "idle"
            self.gather("there is nothing to train")
        elif self._phase == "training" and self.has_others:
            self._phase = "broken"

    def dismiss(self) -> None:
        """Tell the others that no run is left."""
        if self.has_others and self._phase == "idle":
            self.from_leader(None)
            dist.destroy_process_group()


ALONE = Team(Placement())


@functools.cache
def join_team() -> Team:
    """The team of this process, which waits until all have come."""
    placement = find_placement()
    if placement.size == 1:
        return Team(placement)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(placement.local_rank % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=PATIENCE)
    return Team(placement)


def require_team(strategy: Strategy) -> Team:
    """The team that a run of this strategy is made by. Raises HardwareError if the program was not started so."""
    placement = find_placement()
    if strategy == "single":
        if placement.size > 1:
            raise HardwareError(
                f"{placement.size} processes were started for a run of one: add parallel=ddp or parallel=fsdp "
                "(parallel.strategy=... to a run that is continued), or start it without torchrun"
            )
        return ALONE
    if not placement.by_torchrun:
        raise HardwareError(
            f"parallel.strategy={strategy} is for the processes of torchrun: {COMMAND} ... parallel={strategy}; "
            "to go on with one process, parallel.strategy=single"
        )
    return join_team()


def require_devices(team: Team, device: torch.device) -> None:
    """Raise HardwareError if there are not GPUs enough for the processes on this machine."""
    if device.type == "cuda" and team.local_size > torch.cuda.device_count():
        raise HardwareError(
            f"{team.local_size} processes on a machine with {torch.cuda.device_count()} GPUs: start as many"
        )


def lost_process(error: BaseException) -> bool:
    """Whether an error of a collective says that another process has gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "remote process exited")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
