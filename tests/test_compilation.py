"""Compiled steps: when they are taken, what they keep, and that they train to the same."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY
from torch import nn

from lmtrain import compiling
from lmtrain.config.compose import compose_config
from lmtrain.config.schema import AdamWConfig, DecoderConfig
from lmtrain.data.batches import Batch
from lmtrain.data.prepare import prepare
from lmtrain.errors import HardwareError
from lmtrain.model.building import build_model
from lmtrain.session import build_session
from lmtrain.training import compilation
from lmtrain.training.compilation import (
    CompileChoice,
    CompileRecords,
    Known,
    choose_to_compile,
    keep_compiled_code,
    require_compiler,
)
from lmtrain.training.optimizers import build_optimizers
from lmtrain.training.precision import Precision
from lmtrain.training.step import TrainingStep

CPU = torch.device("cpu")


class Machine:
    """Passes that take given times by a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, eager: float, compiled: float, compiling: float) -> None:
        self.now, self.compiled_once = 0.0, False
        self.times = {"eager": eager, "compiled": compiled, "compiling": compiling}
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def eager(self) -> None:
        self.now += self.times["eager"]

    def compiled(self) -> None:
        self.now += self.times["compiled" if self.compiled_once else "compiling"]
        self.compiled_once = True

    def choose(self, passes: int, records: CompileRecords) -> CompileChoice:
        self.compiled_once = False
        return choose_to_compile(
            dry_passes=self.eager,
            compiled_passes=self.compiled,
            passes=passes,
            num_blocks=4,
            device=CPU,
            records=records,
        )


def test_a_run_that_could_not_save_what_compiling_takes_does_not_try(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine, records = Machine(monkeypatch, eager=0.01, compiled=0.005, compiling=20.0), CompileRecords(tmp_path, {})
    choice = machine.choose(1000, records)
    assert not choice.compile
    assert choice.reason == "no: at best 1.5× as fast, it would save 3 s for 22 s of compiling"
    assert machine.now < 0.2
    assert records.read() is None


def test_a_long_run_compiles_and_what_it_measures_helps_a_shorter_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine, records = Machine(monkeypatch, eager=0.01, compiled=0.008, compiling=20.0), CompileRecords(tmp_path, {})
    choice = machine.choose(100_000, records)
    assert choice.compile
    assert choice.reason == "yes: 1.25× as fast; 20 s to compile pay after 10,000 of 100,000 passes"
    machine.times["compiling"] = 2.0  # out of the cache, which was taken to need a third of what it took
    assert not machine.choose(6_000, records).compile
    assert machine.choose(8_000, records).compile
    known = records.read()
    assert known is not None
    assert known.first == pytest.approx(20.0)
    assert known.cached == pytest.approx(2.0)
    assert machine.choose(6_000, records).compile
    assert CompileRecords(tmp_path, {"another": "shape"}).read() is None


def test_code_that_is_no_faster_is_not_taken_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine, records = Machine(monkeypatch, eager=0.01, compiled=0.0099, compiling=20.0), CompileRecords(tmp_path, {})
    choice = machine.choose(100_000, records)
    assert (choice.compile, choice.reason) == (False, "no: 1.01× as fast")
    before = machine.now
    assert not machine.choose(10_000_000, records).compile
    assert machine.now - before < 0.2


def test_a_compiler_that_breaks_is_no_reason_not_to_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, eager=0.01, compiled=0.005, compiling=20.0)

    def broken() -> None:
        raise RuntimeError("C++ compile error\nmany lines")

    monkeypatch.setattr(machine, "compiled", broken)
    choice = machine.choose(100_000, CompileRecords(tmp_path, {}))
    assert (choice.compile, choice.reason) == (False, "no: it failed (C++ compile error)")


def test_a_record_that_is_broken_counts_as_none(tmp_path: Path) -> None:
    records = CompileRecords(tmp_path, {"model": "x"})
    records.write(Known(speedup=2.0, first=3.0))
    assert records.read() == Known(speedup=2.0, first=3.0)
    [path] = tmp_path.rglob("*.json")
    path.write_text("{")
    assert records.read() is None


def test_without_a_compiler_it_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(HardwareError, match="there is no C\\+\\+ compiler no-such-compiler: install one"):
        require_compiler(CPU)
    monkeypatch.delenv("CXX")
    with pytest.raises(HardwareError, match="this run is on mps"):
        require_compiler(torch.device("mps"))


def test_a_cache_that_the_user_named_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compilation.CACHE_VARIABLE, "/named/by/the/user")
    keep_compiled_code(tmp_path)
    assert os.environ[compilation.CACHE_VARIABLE] == "/named/by/the/user"


def step_of(lr: float, seed: int = 0) -> TrainingStep:
    torch.manual_seed(seed)
    model = build_model(DecoderConfig(d_model=16, num_layers=1, num_heads=2), vocab_size=11, seq_len=8, dropout=0.0)
    optimizers = build_optimizers(AdamWConfig(), model.parameters(), model.block_matrices(), lr)
    return TrainingStep(model, optimizers, Precision(CPU, torch.float32), grad_clip=1.0, micro_batch_size=None)


def train(step: TrainingStep, lr: float, steps: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        inputs, targets = (torch.randint(11, (4, 8), generator=generator) for _ in range(2))
        losses.append(step(Batch(inputs, targets, 32), lr).loss.item())
    return losses


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_model_and_are_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second trial in the process compiles nothing; a second process, as it were, takes the code from the cache."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv(compilation.CACHE_VARIABLE, "")
    monkeypatch.delenv(compilation.CACHE_VARIABLE)
    keep_compiled_code(tmp_path)
    expected = train(step_of(0.01), 0.01)
    torch._dynamo.reset()
    counters.clear()
    first = step_of(0.01)
    first.compile(dynamic=False)
    assert train(first, 0.01) == pytest.approx(expected, rel=1e-5)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 0

    with torch.compiler.set_stance("fail_on_recompile"):
        second = step_of(0.02)
        second.compile(dynamic=False)
        assert train(second, 0.02) == pytest.approx(train(step_of(0.02), 0.02), rel=1e-5)

    torch._dynamo.reset()
    again = step_of(0.01)
    again.compile(dynamic=False)
    train(again, 0.01)
    assert counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"] > 0
    assert weights(again.model) == weights(first.model)
    assert list((tmp_path / "compiled").iterdir())
    torch._dynamo.reset()


def weights(model: nn.Module) -> list[list[float]]:
    return [parameter.flatten().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("words", "at_once"),
    [
        ([], 1),
        (["data.batches=padded", "data.document=line"], 5),
        (["trainer.batch_size_warmup_steps=100"], 5),
        (["trainer.seq_len_warmup_steps=100", "trainer.initial_seq_len=4"], 5),
    ],
)
def test_batches_of_many_sizes_are_judged_by_some_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Path, words: list[str], at_once: int
) -> None:
    asked: list[dict[str, Any]] = []

    def choose(**question: Any) -> CompileChoice:
        question["dry_passes"]()
        asked.append(question)
        return CompileChoice(compile=False, reason="no")

    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "choose_to_compile", choose)
    monkeypatch.setattr(compiling, "keep_compiled_code", lambda _: None)
    config = compose_config([*TINY, f"data.path={corpus}", "device=cpu", "trainer.max_steps=500", *words])
    session = build_session(config, prepare(config.data, config.tokenizer), CPU)
    assert session.config.trainer.compile is False
    [question] = asked
    assert (question["at_once"], question["passes"]) == (at_once, 500)
