"""What the machine can do: which number format `auto` takes, how much memory there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from lmtrain import hardware
from lmtrain.data.batches import Batch
from lmtrain.errors import HardwareError
from lmtrain.hardware import (
    available_memory,
    choose_format,
    memory_left_in_control_groups,
    require_format,
    total_memory,
)
from lmtrain.machine import available_cores
from lmtrain.training.precision import Precision, bf16_speedup

BATCH = Batch(torch.zeros((1, 5), dtype=torch.int64), torch.zeros((1, 5), dtype=torch.int64), num_targets=5)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def no_probe() -> float:
    raise AssertionError("nothing is to be timed")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_a_gpu_is_judged_by_its_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    format, reason = choose_format("auto", CUDA, no_probe)
    assert format == expected
    assert reason == f"the GPU has compute capability {capability[0]}.{capability[1]}"


def test_a_format_asked_for_is_taken_without_a_word() -> None:
    assert choose_format("bf16", CPU, no_probe) == (torch.bfloat16, "")
    assert choose_format("fp16", CUDA, no_probe) == (torch.float16, "")


def test_a_cpu_without_bf16_instructions_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert choose_format("auto", CPU, no_probe) == (torch.float32, "this CPU has no bf16 instructions")


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16"])
@pytest.mark.parametrize(("speedup", "expected"), [(0.8, torch.float32), (1.14, torch.float32), (1.3, torch.bfloat16)])
def test_bf16_must_be_clearly_faster_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, instructions: str, speedup: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    format, reason = choose_format("auto", CPU, lambda: speedup)
    assert format == expected
    assert reason.startswith(f"bf16 is {speedup:.2f}× as fast on this CPU")


def test_fp16_needs_cuda() -> None:
    require_format("fp16", CUDA)
    require_format("bf16", CPU)
    with pytest.raises(HardwareError, match="precision=fp16 needs a CUDA device, this run is on cpu"):
        require_format("fp16", CPU)


class CountingModel(nn.Module):
    """Counts its passes, by number format."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(11, 8), nn.Dropout(0.3), nn.Linear(8, 11))
        self.formats: list[torch.dtype] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(tokens)
        self.formats.append(logits.dtype)
        return logits


def test_the_probe_takes_turns_and_leaves_nothing() -> None:
    model = CountingModel()
    weights, random_state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    assert bf16_speedup(model, BATCH) > 0
    assert model.formats[:4] == [torch.bfloat16, torch.float32] * 2
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_probe_of_a_large_model_is_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmtrain.training.precision.PROBE_SECONDS", 1e-9)
    model = CountingModel()
    bf16_speedup(model, BATCH)
    assert model.formats == [torch.bfloat16, torch.float32]


def test_the_speedup_is_that_of_the_fastest_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.bfloat16: [9.0, 2.0, 4.0], torch.float32: [3.0, 5.0, 8.0]}
    monkeypatch.setattr("lmtrain.training.precision.PROBE_SECONDS", 2.5)
    clock = iter(range(100))
    monkeypatch.setattr("lmtrain.training.precision.time.perf_counter", lambda: next(clock))

    def scripted(model: nn.Module, batch: Batch, precision: Precision) -> float:
        return seconds[precision.format].pop(0)

    monkeypatch.setattr("lmtrain.training.precision._time_pass", scripted)
    assert bf16_speedup(CountingModel(), BATCH) == 3.0 / 2.0


def test_memory_is_what_is_free() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="no such limit on this system")
def test_a_limit_on_addresses_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = psutil.Process().memory_info().vms + 10_000_000
    monkeypatch.setattr(psutil.Process, "rlimit", lambda self, kind: (limit, limit))
    assert 0 <= available_memory() <= 10_000_000


def test_the_tightest_control_group_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/elsewhere\n0::/job/step\n")
    root = tmp_path / "cgroup"
    for folder, limit, used in (("job/step", "max", 7), ("job", "1000", 700), (".", "5000", 900)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "memory.max").write_text(f"{limit}\n")
        (root / folder / "memory.current").write_text(f"{used}\n")
        (root / folder / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert list(memory_left_in_control_groups(root, own)) == [1000 - (700 - 200), 5000 - (900 - 200)]
    monkeypatch.setattr(hardware, "memory_left_in_control_groups", lambda: [500.0])
    assert available_memory() == 500.0


def test_all_memory_is_that_of_the_machine_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else takes of it now."""
    monkeypatch.setattr(hardware, "_control_groups", lambda: iter(()))
    monkeypatch.setattr(hardware, "_addresses_left", lambda: iter(()))
    assert total_memory(CPU) == psutil.virtual_memory().total
    monkeypatch.setattr(hardware, "_control_groups", lambda: iter([(5000, 4000), (7000, 10)]))
    assert total_memory(CPU) == 5000
    monkeypatch.setattr(hardware, "_addresses_left", lambda: iter([-3.0]))
    assert total_memory(CPU) == 0


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert list(memory_left_in_control_groups(tmp_path, tmp_path / "absent")) == []
    (tmp_path / "own").write_text("0::/\n")
    assert list(memory_left_in_control_groups(tmp_path, tmp_path / "own")) == []


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        (["max 100000", "150000 100000"], 2),
        (["400000 100000", "50000 100000"], 1),
        (["max 100000", "max 100000"], 64),
        ([], 64),
    ],
)
def test_cores_are_those_that_the_control_groups_let_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limits: list[str], cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)), raising=False)
    own, folder = tmp_path / "own", tmp_path / "groups" / "a" / "b"
    own.write_text("0::/a/b\n")
    folder.mkdir(parents=True)
    for place, limit in zip((folder, folder.parent), limits, strict=False):
        (place / "cpu.max").write_text(limit + "\n")
    assert available_cores(tmp_path / "groups", own) == cores


@pytest.mark.parametrize(
    ("format", "wanted", "expected"),
    [
        (torch.float32, "auto", "highest"),
        (torch.bfloat16, "auto", "high"),
        (torch.float32, True, "high"),
        (torch.float16, False, "highest"),
    ],
)
def test_who_asks_for_32_bits_gets_them(
    monkeypatch: pytest.MonkeyPatch, format: torch.dtype, wanted: Any, expected: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    Precision(CUDA, format).set_tf32(wanted)
    Precision(CPU, format).set_tf32(wanted)
    assert told == [expected]


STEPS = """
import resource, torch
from lmtrain.config.compose import compose_config
from lmtrain.data.batches import Batch
from lmtrain.hardware import keep_freed_memory
from lmtrain.step_building import build_step
torch.set_num_threads(1)
if {keep}:
    keep_freed_memory()
words = ["data=text", "data.path=x", "data.seq_len=64", "tokenizer=byte", "batch_size=12", "trainer.compile=false"]
tokens = torch.zeros(12, 64, dtype=torch.int64)
batch = Batch(tokens, tokens, tokens.numel())
_, step = build_step(compose_config(words), batch, 256, torch.device("cpu"))

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step(batch, 1e-3)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

faults(10)
print(faults(12))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_a_step_has_freed_is_there_for_the_next() -> None:
    """Page faults of a small model's step: thousands by default, hardly any when memory is kept."""
    faults = [
        float(subprocess.run([sys.executable, "-c", STEPS.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    ]
    assert faults[0] > 500
    assert faults[1] < faults[0] / 10
