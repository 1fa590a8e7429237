"""Running out of memory: how it is recognised, measured, and what a run under a real limit does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, CommandLine
from torch import nn

from lmtrain.config.schema import SCHEMAS, AdamWConfig, DecoderConfig, OptimizerConfig
from lmtrain.model.building import build_model
from lmtrain.training.activation_checkpointing import checkpoint_activations
from lmtrain.training.checkpoint import CheckpointFolder
from lmtrain.training.losses import sum_loss
from lmtrain.training.memory import (
    PeakMemory,
    optimizer_state_filled,
    out_of_memory_recognized,
    remember_random_state,
)
from lmtrain.training.optimizers import build_optimizers

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 4 bytes"


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(CPU_MESSAGE),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("std::bad_alloc"),
        MemoryError("Unable to allocate 745. GiB for an array"),
    ],
    ids=str,
)
def test_every_kind_of_failed_allocation_is_recognized(problem: Exception) -> None:
    with pytest.raises(torch.OutOfMemoryError), out_of_memory_recognized():
        raise problem


def test_what_the_allocator_says_is_told() -> None:
    expected = r"^DefaultCPUAllocator: can't allocate memory: 4 bytes$"
    with pytest.raises(torch.OutOfMemoryError, match=expected), out_of_memory_recognized():
        raise RuntimeError(CPU_MESSAGE)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, out_of_memory_recognized():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_a_real_allocation_that_fails_is_recognized() -> None:
    with pytest.raises(torch.OutOfMemoryError), out_of_memory_recognized():
        torch.empty(2**60, dtype=torch.uint8)


def test_random_numbers_are_drawn_again() -> None:
    rewind = remember_random_state(torch.device("cpu"))
    first = torch.rand(5)
    rewind()
    assert torch.equal(torch.rand(5), first)
    rewind()
    assert torch.equal(torch.rand(5), first)


def test_peak_memory_counts_what_is_alive_at_one_time() -> None:
    with PeakMemory() as memory:
        a = torch.ones(1000)  # 4,000 bytes
        b = a * 2
        del a, b
        c = torch.ones(1500, dtype=torch.float64)
        assert c.view(3, 500).t().shape == (500, 3)
    assert memory.peak == 12_000


def test_peak_memory_leaves_out_what_was_there() -> None:
    weight = torch.ones(1000, 1000)
    with PeakMemory([weight]) as memory:
        assert weight.t()[0].sum() == 1000  # views, and one number
    assert memory.peak < 100


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_memory_grows_evenly_with_the_sequences(checkpointing: str, dropout: float) -> None:
    """So that two sequences tell what many will take."""
    torch.manual_seed(0)
    model = build_model(
        DecoderConfig(d_model=32, num_layers=2, num_heads=2), vocab_size=50, seq_len=64, dropout=dropout
    )
    checkpoint_activations(model.blocks, checkpointing)  # type: ignore[arg-type]

    def peak(sequences: int) -> int:
        tokens = torch.zeros(sequences, 64, dtype=torch.int64)
        with PeakMemory(model.parameters()) as memory:
            sum_loss(model(tokens), tokens).backward()
        model.zero_grad()
        return memory.peak

    one, two, many = peak(1), peak(2), peak(9)
    assert many == pytest.approx(one + 8 * (two - one), rel=0.1)


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))


@pytest.mark.parametrize("config", SCHEMAS["optimizer"].values())
def test_the_state_an_optimizer_will_have_is_held_and_no_weight_moves(config: type[OptimizerConfig]) -> None:
    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [model[1].weight, model[3].weight]  # type: ignore[index]
        return build_optimizers(config(weight_decay=0.1), model.parameters(), matrices, lr=0.01)

    def state_bytes(optimizers: list[torch.optim.Optimizer]) -> list[int]:
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        return [value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor)]

    moved, model = small_model(), small_model()
    real = build(moved)
    moved(torch.arange(5)).square().sum().backward()
    for optimizer in real:
        optimizer.step()
    optimizers, weights = build(model), [p.detach().clone() for p in model.parameters()]
    with optimizer_state_filled(optimizers):
        assert state_bytes(optimizers) == state_bytes(real)
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert not any(optimizer.state for optimizer in optimizers)
    assert all(p.grad is None for p in model.parameters())
    # ... and the first real step is as if nothing had been.
    model(torch.arange(5)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), moved.parameters(), strict=True))


def test_an_optimizer_that_has_moved_keeps_its_state() -> None:
    model = small_model()
    [optimizer] = build_optimizers(AdamWConfig(), model.parameters(), [], lr=0.01)
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[model[1].weight].items()}
    with optimizer_state_filled([optimizer]):
        pass
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[model[1].weight].items())


SHORT = (*TINY, "trainer.max_steps=1", "trainer.max_epochs=null", "trainer.eval_batches=1", "hydra.run.dir=run")
# Attention with dropout keeps matrices of seq_len squared: much memory for little arithmetic.
HUNGRY = (*SHORT, "dropout=0.1", "batch_size=16")
LIMITED = """
import resource, runpy, sys
import lmtrain.run, psutil  # the libraries take addresses too, how many depends on the build
limit = psutil.Process().memory_info().vms + int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
runpy.run_module("lmtrain", run_name="__main__")
"""
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a limit on addresses is not kept")


def run_limited(lmtrain: CommandLine, mebibytes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The command with so much memory to itself, as by `ulimit -v`."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(mebibytes), *words],
        cwd=lmtrain.folder,
        env=lmtrain.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def result_of(lmtrain: CommandLine) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((lmtrain.folder / "run" / "result.json").read_text())
    return content


@only_linux
def test_a_run_short_of_memory_goes_on_with_less_and_so_does_its_continuation(
    lmtrain: CommandLine, corpus: Path
) -> None:
    words = [*HUNGRY, f"data.path={corpus}", "data.seq_len=1024", "resume=auto"]
    done = run_limited(lmtrain, 550, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(lmtrain)
    assert (result["status"], result["step"]) == ("completed", 1)
    size = result["micro_batch_size"]
    assert size < 16
    assert re.search(rf"microbatch {size}:|going on with {size}\n", done.stdout)
    # With memory again: the same microbatch, for the same rounding.
    lmtrain(*words, "trainer.max_steps=2")
    assert (result_of(lmtrain)["step"], result_of(lmtrain)["micro_batch_size"]) == (2, size)


@only_linux
def test_a_run_of_which_not_one_sequence_fits_says_so(lmtrain: CommandLine, corpus: Path) -> None:
    """By formula before it starts; with force=true, by what memory says."""
    words = (*HUNGRY, f"data.path={corpus}", "data.seq_len=4096")
    refused = run_limited(lmtrain, 350, *words)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "to train on one sequence at a time takes at least" in refused.stderr
    done = run_limited(lmtrain, 350, *words, "force=true")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "out of memory with one sequence at a time (DefaultCPUAllocator: can't allocate" in done.stdout
    assert done.stderr == f"lmtrain: the run ended as out_of_memory; its folder is {lmtrain.folder / 'run'}\n"
    assert (result_of(lmtrain)["status"], result_of(lmtrain)["step"]) == ("out_of_memory", 0)


@pytest.mark.slow
def test_what_auto_stood_for_is_kept(lmtrain: CommandLine, corpus: Path) -> None:
    """Device and number format are written into the folder; a later attempt takes them from there."""
    words = [*SHORT, f"data.path={corpus}", "resume=auto"]
    lmtrain(*words)
    folder = lmtrain.folder / "run"
    config = (folder / "config.yaml").read_text()
    assert re.search(r"^  format: (fp32|bf16)$", config, re.MULTILINE)
    assert re.search(r"^device: (cpu|cuda|mps)$", config, re.MULTILINE)
    assert re.search(r"^  pad_vocab: (true|false)$", config, re.MULTILINE)

    # As if this machine had found bf16 faster; and with a checkpoint of before microbatches were noted.
    (folder / "config.yaml").write_text(re.sub(r"(?m)^  format: .*$", "  format: bf16", config))
    checkpoints = CheckpointFolder(folder / "checkpoints")
    checkpoint = checkpoints.load()
    assert checkpoint.meta.pop("micro_batch_size") == {"setting": "auto", "in_use": 4}
    checkpoints.save(checkpoint, step=1)
    assert " in bf16;" in lmtrain(*words, "trainer.max_steps=2").stdout
    assert result_of(lmtrain)["micro_batch_size"] == 4
    refused = lmtrain(*words, "trainer.max_steps=3", "precision=fp32", status=2).stderr
    assert "precision.format bf16 → fp32" in refused
