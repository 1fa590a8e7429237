"""CPU threads of a run: how many `parallel.num_threads=auto` comes to, and that finding it leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import TINY, CommandLine

from lmtrain import hardware, threads
from lmtrain.config.compose import compose_config, group_options
from lmtrain.config.saved import to_yaml, with_choices_of
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.prepare import prepare
from lmtrain.hardware import CoresLeft
from lmtrain.machine import available_cores
from lmtrain.session import Session, build_session
from lmtrain.threads import candidates, choose, time_threads

WITHOUT_THREADS = [word for word in TINY if not word.startswith("parallel")]


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (8, [8, 4, 2, 1]), (48, [48, 32, 16, 8, 4, 2, 1])],
)
def test_all_cores_and_powers_of_two_are_tried(cores: int, expected: list[int]) -> None:
    assert candidates(cores) == expected


class Machine:
    """Steps that take given seconds by a clock of their own; some of the first may be disturbed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Mapping[int, float]) -> None:
        self.seconds, self.now, self.visits, self.disturbed = seconds, 0.0, list[int](), dict[int, float]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self, count: int) -> float:
        self.visits.append(count)
        seconds = self.disturbed.pop(len(self.visits), self.seconds[count])
        self.now += 2 * seconds
        return seconds

    def time(self, affordable_steps: float = 1000.0) -> int:
        return choose(time_threads(self.step, list(self.seconds), affordable_steps=affordable_steps))


SMALL_MODEL = {64: 30.0, 32: 20.0, 16: 14.0, 8: 11.0, 4: 13.0, 2: 20.0, 1: 36.0}


def test_a_small_model_has_the_threads_it_is_fastest_with(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, SMALL_MODEL)
    assert machine.time() == 8
    assert 1 not in machine.visits  # two are clearly slower than eight
    assert machine.visits[-4:] == [64, 8, 64, 8]


def test_a_model_that_uses_all_cores_costs_little_to_recognize(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {2: 1.0, 1: 1.8})
    assert machine.time() == 2
    assert machine.visits == [2, 1]


def test_fewer_threads_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine(monkeypatch, {2: 1.0, 1: 0.95}).time() == 2
    assert Machine(monkeypatch, {2: 1.0, 1: 0.9}).time() == 1


def test_one_disturbance_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {4: 1.0, 2: 1.1, 1: 2.0})
    machine.disturbed = {1: 5.0}
    assert machine.time() == 4


def test_timing_ends_where_its_share_does(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, SMALL_MODEL)
    machine.time(affordable_steps=9)
    assert machine.now <= 9 * SMALL_MODEL[64]
    assert machine.visits[-2:] == [64, machine.visits[-1]]  # confirmed all the same


@pytest.fixture
def settings(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExperimentConfig]:
    """Of a run on a machine of four cores."""
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for module in (hardware, threads):
        monkeypatch.setattr(module, "available_cores", lambda: 4)
    monkeypatch.setattr(threads, "SEEN_FROM", float("inf"))  # what else runs on this machine

    plain = (f"data.path={corpus}", "device=cpu", "trainer.max_steps=1000", "trainer.compile=false", "dropout=0.1")

    def compose(*words: str) -> ExperimentConfig:
        return compose_config([*WITHOUT_THREADS, *plain, *words])

    return compose


def built(config: ExperimentConfig) -> Session:
    hardware.set_threads(config.parallel.num_threads)
    try:
        return build_session(config, prepare(config.data, config.tokenizer), torch.device("cpu"))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("optimizer", group_options("optimizer"))
def test_nothing_of_the_timed_steps_stays(
    settings: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    measured = []

    def seconds_of(*arguments: object, **more: object) -> dict[int, float]:
        step = arguments[0]
        assert callable(step)
        measured.append({count: step(count) for count in (2, 1)})
        return {4: 2.0, 1: 1.0}

    monkeypatch.setattr(threads, "time_threads", seconds_of)
    words = (f"optimizer={optimizer}", "model.init_std=0.3")
    timed, random_timed = built(settings(*words)), torch.get_rng_state()
    assert measured
    assert timed.config.parallel.num_threads == 1
    plain, random_plain = built(settings(*words, "parallel.num_threads=1")), torch.get_rng_state()
    assert torch.equal(random_timed, random_plain)
    for ours, theirs in zip(timed.step.optimizers, plain.step.optimizers, strict=True):
        assert not ours.state
        assert str(ours.param_groups) == str(theirs.param_groups)
    assert all(parameter.grad is None for parameter in timed.model.parameters())
    pairs = list(zip(timed.model.parameters(), plain.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    for session in (timed, plain):
        torch.manual_seed(5)
        session.step(session.batches[0], 0.01)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("words", "omp", "expected"),
    [
        (["parallel.num_threads=3"], None, 3),
        (["parallel.num_threads=null"], None, None),
        ([], "2", 2),
        ([], "2,1", 2),
        ([], "many", 4),
        (["trainer.max_steps=100"], None, 4),  # not worth it
    ],
)
def test_nothing_is_timed_where_it_is_known_or_would_not_pay(
    settings: Callable[..., ExperimentConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    words: list[str],
    omp: str | None,
    expected: int | None,
) -> None:
    caplog.set_level("INFO")
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(threads, "_measure", lambda *_: pytest.fail("timed"))
    chosen = built(settings(*words, *([] if omp != "many" else ["trainer.max_steps=100"])))
    assert chosen.config.parallel.num_threads == expected
    assert "threads" not in caplog.text


def test_what_was_measured_holds_for_the_next_run_of_that_shape(
    settings: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    measured = []

    def measure(*_: object) -> dict[int, float]:
        measured.append(1)
        return {4: 0.0021, 2: 0.0014, 1: 0.0016}

    monkeypatch.setattr(threads, "_measure", measure)
    first = built(settings())
    assert "threads: 2 of 4: 1.4 ms a step (4: 2.1, 1: 1.6); fewer than all must be 1.1× as fast\n" in caplog.text
    assert built(settings("lr=0.1", "seed=3", "trainer.max_steps=20")).config.parallel.num_threads == 2
    assert caplog.text.count("(measured before)") == 1
    assert built(settings("batch_size=8")).config.parallel.num_threads == 2
    assert len(measured) == 2
    saved = to_yaml(first.config)
    assert "  num_threads: 2\n" in saved
    assert with_choices_of(saved, settings()).parallel.num_threads == 2


def test_on_a_busy_machine_nothing_is_concluded_or_kept(
    settings: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    idle = [0.0]
    monkeypatch.setattr(threads, "SEEN_FROM", 0.25)

    def measure(*_: object, left: float) -> dict[int, float]:
        time.sleep(0.3)
        idle[0] += 4 * 0.3 * left
        return {4: 0.0021, 2: 0.0014, 1: 0.0016}

    monkeypatch.setattr(hardware, "_idle_seconds", lambda: idle[0])
    monkeypatch.setattr(threads, "_measure", partial(measure, left=0.1))
    assert built(settings()).config.parallel.num_threads == 4
    assert "other programs keep cores busy" in caplog.text
    monkeypatch.setattr(threads, "_measure", partial(measure, left=1e9))
    assert built(settings()).config.parallel.num_threads == 2


def test_cores_that_others_leave_are_seen() -> None:
    with CoresLeft() as cores:
        time.sleep(0.3)
    assert cores.seconds > 0
    assert 0.0 <= cores.share(1) <= 1.0


def test_memory_that_does_not_suffice_is_left_for_the_run_to_tell(
    settings: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> dict[int, float]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(threads, "_measure", measure)
    assert built(settings()).config.parallel.num_threads == 4


def test_more_threads_than_cores_are_told(
    settings: Callable[..., ExperimentConfig], caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    try:
        assert hardware.set_threads(5) == 5
        assert "parallel.num_threads=5 on 4 cores" in caplog.text
        assert hardware.set_threads("auto") == hardware.set_threads(None) == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_run_names_its_threads_and_keeps_them(lmtrain: CommandLine, corpus: Path) -> None:
    """With the cores there are: one leaves nothing to choose."""
    words = [*WITHOUT_THREADS, f"data.path={corpus}", "trainer.eval_every=600", "trainer.max_steps=600"]
    short = ["trainer.eval_batches=1", "trainer.sample_tokens=0", "trainer.compile=false", "trainer.log_every=600"]
    told = lmtrain(*words, *short, "hydra.run.dir=run", OMP_NUM_THREADS="").stdout
    config = (lmtrain.folder / "run/config.yaml").read_text()
    [number] = [line.split()[-1] for line in config.splitlines() if "num_threads" in line]
    assert int(number) >= 1
    assert told.count("threads: ") == (1 if available_cores() > 1 else 0)
    lmtrain("resume=run", "trainer.max_steps=610", OMP_NUM_THREADS="")
    assert (lmtrain.folder / "run/config.yaml").read_text() == config.replace("max_steps: 600", "max_steps: 610")
