"""Which of the processes that torchrun started this one is. Without torch: known before anything is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

COMMAND = "torchrun --nproc-per-node=N -m lmtrain"
"""How several processes are started; N for the number of GPUs, or of processes on a CPU."""


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Placement:
    """A process among those of a job, by the environment variables of torchrun."""

    rank: int = 0
    size: int = 1  # processes of the job, on all machines
    local_rank: int = 0  # ... of those on this machine
    local_size: int = 1
    by_torchrun: bool = False

    @property
    def leads(self) -> bool:
        """Whether it is the one that composes settings, writes the run folder and tells trackers and studies."""
        return self.rank == 0


def find_placement(environment: Mapping[str, str] = os.environ) -> Placement:
    """That of this process; alone if torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return Placement()
    rank, size, local_rank, local_size = (int(environment[name]) for name in VARIABLES)
    return Placement(rank, size, local_rank, local_size, by_torchrun=True)
