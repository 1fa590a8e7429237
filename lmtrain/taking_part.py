"""What a process of a team does that does not lead: it waits for runs, and trains its part of each.

It composes no settings, writes nothing but its share of divided checkpoints, and tells nobody anything.
"""

from __future__ import annotations

import logging

from lmtrain.distributed.team import Team, join_team
from lmtrain.errors import LmtrainError, RunError
from lmtrain.run_dir import RunDir
from lmtrain.shared_run import RunOrder, build, joint_judge
from lmtrain.training.interrupt import StopRequest
from lmtrain.training.trainer import Progress

log = logging.getLogger(__name__)


def take_part() -> None:
    """Train along until the leader dismisses this process. Raises RunError when the processes are out of step."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    team = join_team()
    order: RunOrder | None = None
    while (order := team.begin(None)) is not None:
        try:
            _train(order, team)
        except LmtrainError as error:
            if team.is_broken:
                raise
            # The leader tells of it, and may have another run.
            log.debug("process %d: %s", team.rank, error)
    team.leave()


def _train(order: RunOrder, team: Team) -> None:
    session, _ = build(order.config, team)
    folder, progress = RunDir(order.folder), Progress()
    with team.agreeing():
        if order.resuming:
            progress = session.restore(folder.checkpoints)
    if order.leaves_nothing(session, progress):
        return
    trainer = session.trainer(folder, lambda metrics: None, progress, joint_judge(team, None, judged=order.judged))
    with team.together(f"go on with resume={folder}"), StopRequest() as stop:
        if trainer.fit(stop) == "out_of_memory":
            raise RunError(f"process {team.rank} of {team.size} is out of memory")
