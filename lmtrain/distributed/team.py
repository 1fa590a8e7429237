"""The processes of a job as one: what they agree on, add up and hear from the one that leads.

Everything here is a collective: each process must make the same calls in the same order. Alone, all of it is free.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lmtrain.distributed.placement import COMMAND, Placement, find_placement
from lmtrain.errors import HardwareError, RunError

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""Processes wait for each other while one prepares text. A process that died is noticed by torchrun, at once."""

Strategy = Literal["single", "ddp", "fsdp"]


class Team:
    """The processes of a run."""

    def __init__(self, placement: Placement) -> None:
        self.rank, self.size = placement.rank, placement.size
        self.local_rank, self.local_size = placement.local_rank, placement.local_size
        self._agreed = False  # the latest error is known to all
        self.is_broken = False  # the processes are not at the same place any more

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
        if not self.has_others:
            return number
        numbers = torch.tensor(number)  # in main memory: no GPU is waited for
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers)

    def least(self, number: int) -> int:
        """The least of the numbers that the processes give."""
        return -self.largest(-number)

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

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What goes wrong inside in one process goes wrong in all. Raises RunError where it was another's."""
        try:
            yield
        except BaseException as error:
            self.gather(str(error) or type(error).__name__)
            self._agreed = True
            raise
        problems = [problem for problem in self.gather("") if problem]
        if problems:
            self._agreed = True
            raise RunError(f"another process of this job cannot go on: {problems[0]}")

    @contextmanager
    def together(self, remedy: str) -> Iterator[None]:
        """Around what all processes do in step. When it fails in one alone, they are out of step for good.

        Raises RunError, with the remedy, if another process has gone.
        """
        self._agreed = False
        try:
            yield
        except BaseException as error:
            self.is_broken = self.has_others and not self._agreed
            if self.has_others and _tells_of_a_loss(error):
                _hear_no_termination()
                raise RunError(
                    f"another process of this job has ended: what it said is above, its status below; {remedy}"
                ) from error
            raise

    def begin(self, order: T) -> T:
        """What is to be done next, told by the leader. Raises RunError if the processes are out of step."""
        if self.is_broken:
            raise RunError("an earlier run of this job ended in some of its processes only: start the job again")
        return self.from_leader(order)

    def dismiss(self) -> None:
        """As the leader: tell the others that nothing is left to do."""
        if self.has_others and not self.is_broken:
            self.from_leader(None)
            self.leave()

    def leave(self) -> None:
        """End the connections to the others."""
        if self.has_others:
            dist.destroy_process_group()


def _hear_no_termination() -> None:
    """torchrun sends SIGTERM when a process has gone; until SIGKILL there is time to write how the run ended."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
    if placement.by_torchrun and multiprocessing.parent_process() is not None:
        raise HardwareError(
            "the processes of torchrun make one run at a time: leave hydra/launcher as it is (basic), or start a sweep "
            "of many runs at a time without torchrun"
        )
    if not placement.by_torchrun:
        raise HardwareError(
            f"parallel.strategy={strategy} is for the processes of torchrun: {COMMAND} ... parallel={strategy}; "
            "to go on with one process, parallel.strategy=single"
        )
    return join_team()


def require_devices(team: Team, device: torch.device, *, cpu_offload: bool) -> None:
    """Raise HardwareError if there are not GPUs enough for the processes on this machine, or none to offload from."""
    if cpu_offload and device.type == "cpu":
        raise HardwareError("parallel.cpu_offload=true is for GPUs: on a CPU all is in main memory already")
    if device.type == "cuda" and team.local_size > torch.cuda.device_count():
        raise HardwareError(
            f"{team.local_size} processes on a machine with {torch.cuda.device_count()} GPUs: start as many"
        )


def _tells_of_a_loss(error: BaseException) -> bool:
    """Whether an error of a collective says that another process has gone."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "remote process exited")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
