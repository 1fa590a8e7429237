"""What all processes of a run do: the one that leads (`run.py`) and the others (`taking_part.py`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.prepare import prepare
from lmtrain.data.prepared import PreparedData
from lmtrain.distributed.team import Team, require_devices
from lmtrain.hardware import choose_device, keep_freed_memory, require_format, set_threads
from lmtrain.initial_weights import name_version
from lmtrain.room import require_room
from lmtrain.session import Session, build_session
from lmtrain.training.trainer import Judge, Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOrder:
    """What the processes of a team hear from the one that leads."""

    config: ExperimentConfig
    folder: Path
    resuming: bool
    ended: bool
    judged: bool

    def leaves_nothing(self, session: Session, progress: Progress) -> bool:
        """Whether the run is complete. Not so if it was killed between its last checkpoint and its result."""
        return self.resuming and self.ended and progress.step >= session.total_steps


def build(
    config: ExperimentConfig, team: Team, read: Callable[[Mapping[str, str]], None] | None = None
) -> tuple[Session, PreparedData]:
    """Everything that can be refused: hardware, data, model. Writes nothing but the data cache.

    `read` is told the fingerprints of the texts, and may refuse them.
    """
    with team.agreeing():
        device = choose_device(config.device)
        require_devices(team, device, cpu_offload=config.parallel.cpu_offload)
        require_format(config.precision.format, device)
        require_room(config, device)
        set_threads(config.parallel.num_threads, processes=team.local_size)
        config = name_version(config)  # refused before text is prepared, which may take long
        data = prepare(config.data, config.tokenizer, on_progress=log.info)
        if read is not None:
            read(data.texts)
    if device.type == "cpu":
        keep_freed_memory()
    return build_session(config, data, device, team), data


def joint_judge(team: Team, judge: Judge | None, *, judged: bool = False) -> Judge | None:
    """A judge whose verdict all processes of a team hear; the leader has it, the others know that they are `judged`."""
    if judge is None and not judged:
        return None

    def verdict(tokens: int, score: float) -> bool:
        with team.agreeing():
            own = judge is not None and judge(tokens, score)
        return team.from_leader(own)

    return verdict
