"""Profiled steps: what is written, and that nothing else changes."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import TINY, CommandLine

from lmtrain.training.profiling import StepProfiler, costs, phases

CPU = torch.device("cpu")


def trace_of(folder: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    return events


def names_in(folder: Path) -> set[str]:
    return {event["name"] for event in trace_of(folder) if "name" in event}


def train(profiler: StepProfiler, steps: int, *, fails_in: int | None = None) -> None:
    """A loop like the trainer's, which may fail in the midst of a step."""
    layer = torch.nn.Linear(4, 4)
    with profiler:
        for step in range(steps):
            loss = layer(torch.ones(2, 4)).sum()
            if step == fails_in:
                raise KeyboardInterrupt
            loss.backward()
            profiler.step()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, the same one profiled, and the same profiled in two attempts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("to be or not to be\n" * 400)
    words = [*TINY, f"data.path={folder}/text.txt", "trainer.eval_every=4", "dropout=0.1", "trainer.max_steps=12"]
    cases = {
        "plain": words,
        "profiled": [*words, "trainer.profile=true"],
        "short": [*words, "trainer.profile=true", "trainer.max_steps=1"],
    }
    for name in cases:
        (folder / name).mkdir()
    commands = [(str(folder / name), [*case, "hydra.run.dir=run"]) for name, case in cases.items()]
    commands.append((str(folder / "short"), ["resume=run", "trainer.max_steps=4"]))
    assert CommandLine(folder).fork(commands) == [0, 0, 0, 0]
    return folder


def test_a_profile_names_the_parts_of_a_step_and_their_operators(runs: Path) -> None:
    profile = runs / "profiled" / "run" / "profile"
    assert {"forward", "backward", "optimizer", "aten::mm"} <= names_in(profile)
    steps = {event["name"] for event in trace_of(profile) if str(event.get("name")).startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#7", "ProfilerStep#8", "ProfilerStep#9"}
    with (profile / "operators.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)
    assert [float(row["self_ms"]) for row in rows] == sorted((float(row["self_ms"]) for row in rows), reverse=True)
    assert all(int(row["calls"]) % 3 == 0 for row in rows if row["name"] == "aten::mm")


def test_the_ten_costliest_operators_are_shown_at_the_end(runs: Path) -> None:
    told = (runs / "profiled.out").read_text()
    table = (runs / "profiled" / "run" / "profile" / "operators.txt").read_text()
    assert table in told
    assert "USDT" not in told + (runs / "profiled.err").read_text()
    assert len(table.splitlines()) == 2 + 10
    assert "steps 8 to 10" in table
    assert told.index("step 12/12") < told.index("steps 8 to 10") < told.index("completed")


def test_a_profiled_run_trains_to_the_same_bit(runs: Path) -> None:
    plain, profiled = (runs / name / "run" for name in ("plain", "profiled"))
    weights = [
        hashlib.sha256((run / "checkpoints" / "last" / "model.safetensors").read_bytes()).hexdigest()
        for run in (plain, profiled)
    ]
    assert weights[0] == weights[1]
    losses = [
        [json.loads(line).get(name) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, profiled)
        for name in ("train/loss", "val/loss")
    ]
    assert losses[:2] == losses[2:]
    assert not (plain / "profile").exists()


def test_a_resumed_run_may_be_profiled_too(runs: Path) -> None:
    assert "step 1: the costliest" in (runs / "short" / "run" / "lmtrain.log").read_text()
    assert "steps 2 to 4" in (runs / "short" / "run" / "profile" / "operators.txt").read_text()


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(0, (0, 0, 0)), (1, (0, 0, 1)), (3, (0, 0, 3)), (4, (0, 1, 3)), (7, (2, 2, 3)), (1000, (5, 2, 3))],
)
def test_short_runs_are_profiled_in_what_they_have(num_steps: int, expected: tuple[int, int, int]) -> None:
    assert phases(num_steps) == expected


def test_a_run_that_ends_early_keeps_the_whole_steps_it_had(tmp_path: Path) -> None:
    train(StepProfiler(tmp_path / "profile", CPU, first=0, total_steps=100), 9)
    assert "steps 8 to 9" in (tmp_path / "profile" / "operators.txt").read_text()


def test_a_run_that_ends_before_has_no_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(StepProfiler(tmp_path / "profile", CPU, first=20, total_steps=100), 7)
    assert list(tmp_path.iterdir()) == []
    assert "before step 28" in caplog.text


@pytest.mark.parametrize("step", [0, 6, 7, 9])
def test_a_run_that_breaks_off_inside_a_step_leaves_nothing(tmp_path: Path, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(StepProfiler(tmp_path / "profile", CPU, first=0, total_steps=100), 20, fails_in=step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["start", "step", "export_chrome_trace"])
def test_a_profiler_that_fails_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such counter")

    monkeypatch.setattr(torch.profiler.profile, method, fail)
    train(StepProfiler(tmp_path / "profile", CPU, first=0, total_steps=12), 12)
    assert list(tmp_path.iterdir()) == []
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "no profile: no such counter"
    ]
    monkeypatch.undo()
    train(StepProfiler(tmp_path / "profile", CPU, first=0, total_steps=12), 12)  # nothing was left running
    assert (tmp_path / "profile").is_dir()


def event(name: str, device: str, **times: float) -> SimpleNamespace:
    """As `key_averages` has it, microseconds."""
    zero = dict.fromkeys(("self_cpu_time_total", "cpu_time_total", "self_device_time_total", "device_time_total"), 0.0)
    return SimpleNamespace(
        key=name,
        device_type=SimpleNamespace(name=device),
        is_user_annotation=name == "forward",
        count=4,
        input_shapes=[[2, 3], [], [[1], [2]]],
        **(zero | times),
    )


def test_on_a_gpu_the_time_of_kernels_counts_and_only_once() -> None:
    found = costs(
        [
            event("forward", "CPU", self_cpu_time_total=900, device_time_total=4000),
            event("aten::mm", "CPU", self_cpu_time_total=10, self_device_time_total=3000, device_time_total=3000),
            event("aten::add", "CPU", self_cpu_time_total=80, self_device_time_total=1000, device_time_total=1000),
            event("aten::view", "CPU", self_cpu_time_total=5),
            event("sm90_gemm", "CUDA", self_device_time_total=3000),
        ],
        on_gpu=True,
    )
    assert [(operator.name, operator.self_ms, operator.share) for operator in found] == [
        ("aten::mm", 3.0, 0.75),
        ("aten::add", 1.0, 0.25),
    ]
    assert found[0].shapes == "2×3 (2 tensors)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_a_gpu_are_in_the_trace(tmp_path: Path) -> None:
    layer, inputs = torch.nn.Linear(512, 512, device="cuda"), torch.ones(512, 512, device="cuda")
    with StepProfiler(tmp_path / "profile", torch.device("cuda"), first=0, total_steps=10) as profiler:
        for _ in range(10):
            layer(inputs).sum().backward()
            profiler.step()
    assert "kernel" in {event.get("cat") for event in trace_of(tmp_path / "profile")}
    assert "by GPU time" in (tmp_path / "profile" / "operators.txt").read_text()
