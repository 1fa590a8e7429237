"""What mirrors cost a run: a logged step on the training thread, the whole command, and eight processes at one store.

The run is the default model on one thread, logging every step, so that a core is left for what goes on in the
background. Conditions take turns: no tracker; MLflow's own server, which is there, comes up only in the middle of the
run, is killed in the middle of it, or answers every request after 10 s. Outages are compared with a server that is
there, in the same round. `log` is called 2,000 times, 2 ms apart, while the tracker's thread sends what came before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from report import ROOT, Figure, median_figure, parser, publish, run_lmtrain

sys.path.append(str(ROOT / "tests"))  # where a server for tests is
from mirrored_runs import end, run_info
from mlflow_server import MlflowServer, SlowProxy, free_port

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import TrackingConfig
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import MetricsFile
from lmtrain.tracking.tracker import build_tracker

MAX_MICROSECONDS, MAX_RATIO = 50.0, 1.01
CALLS, PAUSE = 2000, 0.002
DELAY = 10.0  # seconds before each answer of the slow server
PROCESSES, RECORDS = 8, 500
WORKER = "--worker"  # first word of this script as one of the eight
CONDITIONS = ("none", "there", "there from the middle", "killed in the middle", "slow")
NAMES = ("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "train/memory_gib", "tokens")


def record(step: int) -> dict[str, float]:
    return {"step": step, "time": 1e9 + step, "attempt": 0, **dict.fromkeys(NAMES, 1 / step)}


# ---------------------------------------------------------------------------------------------------- one call


def time_calls(config: TrackingConfig, folder: Path, calls: int) -> list[float]:
    """Microseconds of each call of `log`."""
    tracker = build_tracker(config)
    tracker.start(run_info(folder))
    metrics, taken = MetricsFile(RunDir(folder).metrics), []
    for step in range(1, calls + 1):
        one = record(step)
        metrics.append(one)
        started = time.perf_counter()
        tracker.log(one)
        taken.append(1e6 * (time.perf_counter() - started))
        time.sleep(PAUSE)
    metrics.close()
    end(folder, "completed")
    tracker.finish()
    return taken


def time_trackers(folder: Path, calls: int) -> dict[str, list[float]]:
    """Microseconds of the calls by tracker."""
    database, nowhere = f"sqlite:///{folder}/mlflow.db", f"http://127.0.0.1:{free_port()}"
    configs = {
        "none": TrackingConfig(),
        "mlflow": TrackingConfig(mlflow=True, uri=database),
        "mlflow with its server down": TrackingConfig(mlflow=True, uri=nowhere),
        "tensorboard": TrackingConfig(tensorboard=True),
        "wandb offline": TrackingConfig(wandb=True, wandb_mode="offline"),
        "all three": TrackingConfig(mlflow=True, uri=database, tensorboard=True, wandb=True, wandb_mode="offline"),
    }
    return {name: time_calls(config, folder / name, calls) for name, config in configs.items()}


# ------------------------------------------------------------------------------------------------- whole runs


@contextmanager
def condition(name: str, server: MlflowServer, middle: float) -> Iterator[list[str]]:
    """The server as it is to be while a run takes place; the middle of it is so many seconds away. Gives settings."""
    server.start()  # unless it runs; its own start would cost a run on the same machine more than its absence
    proxy = SlowProxy(server.port, DELAY if name == "slow" else 0)
    if name == "slow":
        proxy.open()
    changes = {"there from the middle": proxy.open, "killed in the middle": server.kill}
    change = threading.Timer(middle, changes.get(name, lambda: None))
    change.start()
    uri = proxy.uri if name in ("there from the middle", "slow") else server.uri
    yield ["tracking=none"] if name == "none" else ["tracking=mlflow", f"tracking.uri={uri}"]
    change.cancel()
    change.join()
    proxy.close()


def time_runs(folder: Path, settings: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the whole command and of its training, by condition."""
    server = MlflowServer(folder / "server")
    taken: dict[str, dict[str, list[float]]] = {name: {"command": [], "training": []} for name in CONDITIONS}

    def run(name: str, place: str, middle: float) -> tuple[float, float]:
        with condition(name, server, middle) as to:
            words = [*settings, *to, f"hydra.run.dir={folder / place}"]
            whole = run_lmtrain(words, folder=folder, cache=folder / "cache")
        result = json.loads(RunDir(folder / place).result.read_text())
        return whole, float(result["training_seconds"])

    try:
        middle = run("none", "warm-up", 0)[0] / 2  # prepares the data as well
        for turn in range(rounds):
            for name in CONDITIONS if turn % 2 == 0 else reversed(CONDITIONS):
                whole, training = run(name, f"{turn} {name}", middle)
                print(f"round {turn + 1}, {name}: {whole:.2f} s, {training:.2f} s of them training", flush=True)
                taken[name]["command"].append(whole)
                taken[name]["training"].append(training)
    finally:
        server.kill()
    return taken


# -------------------------------------------------------------------------------------- eight at one database


def work(uri: str, folder: Path) -> None:
    """One of the eight: a run of RECORDS records."""
    logging.basicConfig(level=logging.WARNING)
    tracker = build_tracker(TrackingConfig(mlflow=True, uri=uri))
    tracker.start(run_info(folder))
    metrics = MetricsFile(RunDir(folder).metrics)
    for step in range(1, RECORDS + 1):
        metrics.append(record(step))
        tracker.log(record(step))
        time.sleep(PAUSE)
    metrics.close()
    end(folder, "completed")
    tracker.finish()


def time_processes(folder: Path) -> tuple[float, float]:
    """Seconds until all eight have ended, and the share of their records that the database has."""
    uri = f"sqlite:///{folder}/shared.db"
    started = time.perf_counter()
    command = [sys.executable, __file__, WORKER, uri]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([*command, str(folder / f"p{n}")], env=environment) for n in range(PROCESSES)]
    assert [process.wait(300) for process in processes] == [0] * PROCESSES
    seconds = time.perf_counter() - started
    with closing(sqlite3.connect(folder / "shared.db")) as database:
        query = "SELECT count(*) FROM (SELECT DISTINCT run_uuid, key, step, value FROM metrics WHERE key IN ({}))"
        distinct = database.execute(query.format(", ".join(map(repr, NAMES)))).fetchone()[0]
        rows = database.execute("SELECT count(*) FROM metrics").fetchone()[0]
    assert rows == distinct, "none is there twice"
    return seconds, rows / (PROCESSES * RECORDS * len(NAMES))


def figures_of(
    calls: dict[str, list[float]], runs: dict[str, dict[str, list[float]]], processes: tuple[float, float]
) -> list[Figure]:
    figures = []
    for name, taken in calls.items():
        median, p99 = statistics.median(taken), statistics.quantiles(taken, n=100)[98]
        figures.append(Figure(name=f"log, {name}: median", value=median, unit="µs", at_most=MAX_MICROSECONDS))
        figures.append(Figure(name=f"log, {name}: 99th percentile", value=p99, unit="µs", at_most=MAX_MICROSECONDS))
    for what in ("command", "training"):
        for name, seconds in runs.items():
            beside = "none" if name == "there" else "there"
            ratios = [a / b for a, b in zip(seconds[what], runs[beside][what], strict=True)]
            if name not in ("none", "there"):
                figures.append(median_figure(f"{what}, MLflow's server {name} / there", ratios, at_most=MAX_RATIO))
            elif name == "there":
                figures.append(median_figure(f"{what}, MLflow's server there / no tracker", ratios))
    figures.append(median_figure("training without a tracker", runs["none"]["training"], unit="s"))
    seconds, share = processes
    figures.append(
        Figure(name=f"records of {PROCESSES} processes in one database", value=100 * share, unit="%", at_least=100)
    )
    figures.append(Figure(name="... until all have ended, imports included", value=seconds, unit="s"))
    return figures


def main() -> int:
    if sys.argv[1:2] == [WORKER]:
        work(sys.argv[2], Path(sys.argv[3]))
        return 0
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=3, help="runs of each condition (default 3)")
    command_line.add_argument("--steps", type=int, default=300, help="of each run (default 300; one takes about 0.2 s)")
    arguments = command_line.parse_args()
    rounds, steps = (1, 20) if arguments.quick else (arguments.rounds, arguments.steps)
    settings = ["parallel.num_threads=1", "trainer.log_every=1", f"trainer.max_steps={steps}", "trainer.eval_every=100"]
    config: dict[str, Any] = dataclasses.asdict(compose_config(settings))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        calls = time_trackers(folder, 200 if arguments.quick else CALLS)
        processes = time_processes(folder)
        runs = time_runs(folder, settings, rounds)
    figures = figures_of(calls, runs, processes)
    percentiles = {name: statistics.quantiles(taken, n=100) for name, taken in calls.items()}
    samples = {"percentiles of log": percentiles, "runs": runs, "processes": processes}
    return publish("tracking", figures, config=config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
