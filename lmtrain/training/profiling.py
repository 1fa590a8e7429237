"""What a few steps of a run spend their time on: a trace to open, and a table of the costliest operators.

Watches and changes nothing: a profiled run trains to the same bit as any other, and goes on if profiling fails. The
names of the parts of a step (`forward`, `backward`, `optimizer`) are given in `step`.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lmtrain.new_folder import appearing_whole
from lmtrain.tracking.background import one_line

log = logging.getLogger(__name__)

WAIT, WARMUP, ACTIVE = 5, 2, 3
"""Steps left alone, which allocate, tune and compile; steps the profiler itself warms up in; steps profiled."""

TRACE, TABLE, ROWS = "trace.json.gz", "operators.txt", "operators.csv"
"""In the folder of a profile: for Perfetto and TensorBoard, for people, and for programs."""

NUM_SHOWN = 10

LOG_LEVEL = "6"
"""Above all that libkineto writes to standard error, where it would tear the progress line."""


@dataclass(frozen=True)
class Operator:
    """An operator on inputs of the same shapes, over all profiled steps."""

    name: str
    shapes: str
    calls: int
    self_ms: float  # without the operators it calls: of its kernels on a GPU, of the operator itself on a CPU
    share: float  # of the time of all
    total_ms: float  # with the operators it calls


class StepProfiler:
    """Profiles a few steps after warm-up: enter it around the loop, and call `step` after each step.

    A run that is shorter, or ends early, is profiled in what there is of it. `folder` is there whole or not at all.
    """

    def __init__(self, folder: Path, device: torch.device, *, first: int, total_steps: int) -> None:
        """The run goes from `first` steps made to `total_steps`."""
        self._folder = folder
        self._on_gpu = device.type == "cuda"
        self._wait, self._warmup, self._active = phases(total_steps - first)
        self._first, self._made = first, 0
        self._profile: profile | None = None
        self._table = ""

    def __enter__(self) -> StepProfiler:
        if self._active == 0:
            return self
        os.environ.setdefault("KINETO_LOG_LEVEL", LOG_LEVEL)
        with self._failure_is_told(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # short runs have no step to warm up in
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
                schedule=schedule(wait=self._wait, warmup=self._warmup, active=self._active, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profile.start()
        return self

    def step(self) -> None:
        """A step was made. Writes the profile after the last of those profiled."""
        if self._profile is None:
            return
        self._made += 1
        with self._failure_is_told():
            self._profile.step()
        if self._recorded == self._active:
            self._stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # in the midst of a step, which tells nothing
            self._made = 0
        elif self._profile is not None and self._recorded <= 0:
            log.warning("no profile: the run ended before step %d", self._first + self._wait + self._warmup + 1)
        self._stop()
        if self._table:
            log.info("\n%s", self._table)

    @property
    def _recorded(self) -> int:
        return self._made - self._wait - self._warmup

    def _stop(self) -> None:
        running, self._profile = self._profile, None
        if running is not None:
            with self._failure_is_told():
                running.stop()

    def _write(self, profiled: profile) -> None:
        if self._recorded <= 0:
            return
        operators = costs(profiled.key_averages(group_by_input_shape=True), on_gpu=self._on_gpu)
        last = self._first + self._made
        table = _as_text(operators, self._recorded, _named(last - self._recorded + 1, last), on_gpu=self._on_gpu)
        with appearing_whole(self._folder) as draft:
            profiled.export_chrome_trace(str(draft / TRACE))
            (draft / TABLE).write_text(table + "\n", encoding="utf-8")
            _write_csv(draft / ROWS, operators)
            shutil.rmtree(self._folder, ignore_errors=True)  # of an earlier attempt
        self._table = f"{table}\nthe trace, for ui.perfetto.dev: {os.path.relpath(self._folder / TRACE)}"

    @contextlib.contextmanager
    def _failure_is_told(self) -> Iterator[None]:
        """Nothing that goes wrong here may end a run."""
        try:
            yield
        except Exception as error:
            self._profile = None
            log.warning("no profile: %s", one_line(error))


def phases(num_steps: int) -> tuple[int, int, int]:
    """How many steps of a run to leave alone, to warm up in, and to profile: all of a short one are profiled."""
    active = min(ACTIVE, max(0, num_steps))
    warmup = min(WARMUP, num_steps - active)
    return min(WAIT, num_steps - active - warmup), warmup, active


def costs(events: Sequence[Any], *, on_gpu: bool) -> list[Operator]:
    """The operators among the events of a profile that took time of their own, the costliest first.

    Args:
        events: `key_averages(group_by_input_shape=True)`; times in microseconds.
        on_gpu: whether the time of a GPU's kernels counts, not that of the CPU.
    """
    kind = "device" if on_gpu else "cpu"
    # Kernels have events of their own, and their time is that of the operator that launched them too.
    own = [event for event in events if event.device_type.name == "CPU" and not event.is_user_annotation]
    total = sum(getattr(event, f"self_{kind}_time_total") for event in own)
    found = [
        Operator(
            name=event.key,
            shapes=_shapes(event.input_shapes),
            calls=event.count,
            self_ms=getattr(event, f"self_{kind}_time_total") / 1e3,
            share=getattr(event, f"self_{kind}_time_total") / total,
            total_ms=getattr(event, f"{kind}_time_total") / 1e3,
        )
        for event in own
        if getattr(event, f"self_{kind}_time_total") > 0
    ]
    return sorted(found, key=lambda operator: -operator.self_ms)


def _shapes(inputs: Sequence[Any]) -> str:
    """`8×64 64×64`; what is no tensor is left out, a list of tensors is counted."""
    words = []
    for shape in inputs:
        if shape and all(isinstance(size, int) for size in shape):
            words.append("×".join(map(str, shape)))
        elif shape:
            words.append(f"({len(shape)} tensors)")
    return " ".join(words)


def _as_text(operators: Sequence[Operator], num_steps: int, which: str, *, on_gpu: bool) -> str:
    rows = [("operator", "share", "ms a step", "calls a step", "shapes")]
    for operator in operators[:NUM_SHOWN]:
        a_step = (f"{operator.self_ms / num_steps:.3f}", f"{operator.calls / num_steps:g}")
        rows.append((operator.name, f"{operator.share:.1%}", *a_step, operator.shapes))
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    whose = "GPU" if on_gpu else "CPU"
    title = f"{which}: the costliest operators, by {whose} time of their own"
    lines = [
        f"  {name:{wide[0]}}  {share:>{wide[1]}}  {ms:>{wide[2]}}  {calls:>{wide[3]}}  {shapes}".rstrip()
        for name, share, ms, calls, shapes in rows
    ]
    return "\n".join([title, *lines])


def _write_csv(path: Path, operators: Sequence[Operator]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Operator)])
        writer.writeheader()
        writer.writerows(asdict(operator) for operator in operators)


def _named(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"
