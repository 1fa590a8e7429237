"""What an outage of MLflow's server adds to a run, apart from the noise of training.

A run that sleeps where another trains is mirrored to a server that is there, comes up in the middle, is killed in the
middle, or answers every request after 10 s. Told are the processor time of its process, which is the tracker's, imports
included, and the time its end waits; together they are the most that the run can become slower. `tracking.py` times
whole runs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import ROOT, Figure, parser, publish

sys.path.append(str(ROOT / "tests"))  # where a server for tests is
from mirrored_runs import end, record, run_info
from mlflow_server import MlflowServer
from tracking import condition

from lmtrain.config.schema import TrackingConfig
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import MetricsFile
from lmtrain.tracking.tracker import build_tracker

MAX_SHARE = 1.0  # percent
MINUTE = 60.0  # seconds of the run that the share is of
RECORDS_A_SECOND = 4
WORKER = "--worker"  # first word of this script as the process of a run
CONDITIONS = ("none", "there", "there from the middle", "killed in the middle", "slow")


def work(uri: str, folder: Path, seconds: float) -> None:
    """A run that sleeps; prints processor time and seconds of its end."""
    import torch  # as a run has it before its tracker starts

    assert torch.get_num_threads()
    logging.disable()
    began = time.process_time()
    tracker = build_tracker(TrackingConfig() if uri == "none" else TrackingConfig(mlflow=True, uri=uri))
    tracker.start(run_info(folder))
    metrics = MetricsFile(RunDir(folder).metrics)
    for step in range(1, round(seconds * RECORDS_A_SECOND) + 1):
        metrics.append(record(step))
        tracker.log(record(step))
        time.sleep(1 / RECORDS_A_SECOND)
    metrics.close()
    end(folder, "completed")
    ending = time.perf_counter()
    tracker.finish()
    print(json.dumps({"processor": time.process_time() - began, "end": time.perf_counter() - ending}))


def time_conditions(folder: Path, rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    """What each condition took in each round."""
    server = MlflowServer(folder / "server")
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in CONDITIONS}
    try:
        for turn in range(rounds):
            for name in CONDITIONS:
                with condition(name, server, seconds / 2) as (to, *uri):
                    address = uri[0].removeprefix("tracking.uri=") if uri else to.removeprefix("tracking=")
                    command = [sys.executable, __file__, WORKER, address, str(folder / f"{turn} {name}"), str(seconds)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                taken[name].append(json.loads(done.stdout))
                print(f"round {turn + 1}, {name}: {taken[name][-1]}", flush=True)
    finally:
        server.kill()
    return taken


def main() -> int:
    if sys.argv[1:2] == [WORKER]:
        work(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
        return 0
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=3, help="runs of each condition (default 3)")
    arguments = command_line.parse_args()
    rounds, seconds = (1, 10.0) if arguments.quick else (arguments.rounds, MINUTE / 2)
    with tempfile.TemporaryDirectory() as temporary:
        taken = time_conditions(Path(temporary), rounds, seconds)
    medians = {
        name: {part: statistics.median(sample[part] for sample in samples) for part in ("processor", "end")}
        for name, samples in taken.items()
    }
    figures = []
    for name in CONDITIONS[1:]:
        figures.append(Figure(name=f"server {name}: processor", value=medians[name]["processor"], unit="s"))
        figures.append(Figure(name=f"server {name}: the end waits", value=medians[name]["end"], unit="s"))
    for name in CONDITIONS[2:]:
        added = sum(medians[name].values()) - sum(medians["there"].values())
        title = f"server {name}: adds to a run of a minute, beside one that is there"
        figures.append(Figure(name=title, value=100 * added / MINUTE, unit="%", at_most=MAX_SHARE))
    config = dataclasses.asdict(TrackingConfig(mlflow=True))
    return publish("tracking_outage", figures, config=config, samples=taken, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
