"""How fast a run trains in several processes side by side, each with so many threads: timed, not estimated.

The processes are started once and asked for one division of the cores after another. What is made of the speeds is
in `core_division`.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import threading
import time
from types import TracebackType

from lmtrain.config.schema import ExperimentConfig

START_DELAY = 0.02
"""Seconds in which all processes hear when to begin."""


class Trainees:
    """Processes that train the same run, each for itself, when they are told to. Nothing of it is kept."""

    def __init__(self, config: ExperimentConfig, number: int, *, time_limit: float) -> None:
        """The text of the run is prepared already. After `time_limit` seconds the processes are ended."""
        self._config, self._number = config, number
        self._processes: list[subprocess.Popen[bytes]] = []
        self._alarm = threading.Timer(time_limit, self._end)

    def __enter__(self) -> Trainees:
        path = os.pathsep.join(sys.path)
        command = [sys.executable, "-c", f"from {__name__} import train_on_demand; train_on_demand()"]
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            )
            for _ in range(self._number)
        ]
        self._alarm.daemon = True
        self._alarm.start()
        try:
            for process in self._processes:
                self._tell(process, pickle.dumps(self._config))
            for process in self._processes:
                self._answer(process)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alarm.cancel()
        self._end()
        for process in self._processes:
            process.communicate()

    def steps_per_second(self, workers: int, threads: int, seconds: float) -> float:
        """Optimizer steps of all together, over so many seconds or one step. Raises OSError if a process is lost."""
        order = f"{threads} {time.time() + START_DELAY} {seconds}\n".encode()
        for process in self._processes[:workers]:
            self._tell(process, order)
        return sum(self._answer(process) for process in self._processes[:workers])

    def _tell(self, process: subprocess.Popen[bytes], message: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(message)
        process.stdin.flush()

    def _answer(self, process: subprocess.Popen[bytes]) -> float:
        assert process.stdout is not None
        answer = process.stdout.readline()
        if not answer:
            raise OSError("a process that was to be timed has ended")
        return float(answer)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()


def train_on_demand() -> None:
    """Be one of the processes: settings come on standard input, then orders; steps per second go out."""
    config = pickle.load(sys.stdin.buffer)

    import torch

    from lmtrain.data.prepare import prepare
    from lmtrain.session import build_session

    plain = dataclasses.replace(config.trainer, compile=False, diagnostics=False)
    told = dataclasses.replace(config.parallel, num_threads=None)
    config = dataclasses.replace(config, trainer=plain, parallel=told, init_from=None, device="cpu")
    session = build_session(config, prepare(config.data, config.tokenizer), torch.device("cpu"))
    batch = session.batches.largest
    session.step(batch, config.lr)
    print(0.0, flush=True)
    for order in sys.stdin.buffer:
        threads, start, seconds = order.split()
        torch.set_num_threads(int(threads))
        time.sleep(max(0.0, float(start) - time.time()))
        began, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - began < float(seconds):
            session.step(batch, config.lr)
            steps += 1
        print(steps / (time.perf_counter() - began), flush=True)
