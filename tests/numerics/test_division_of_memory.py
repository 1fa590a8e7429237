"""The memory of one process of several, by formula: what is divided, what is gathered, what stays whole."""

from __future__ import annotations

from typing import Any

import pytest

from lmtrain.config.schema import AdamWConfig, DecoderConfig
from lmtrain.training.activations import Workload
from lmtrain.training.division import Division
from lmtrain.training.footprint import TrainingMemory

MODEL = DecoderConfig(d_model=1024, num_layers=24, num_heads=16, d_ff=4096)


def memory(strategy: Any = "single", processes: int = 1, *, format: Any = "bf16", **settings: Any) -> TrainingMemory:
    work = Workload(model=MODEL, vocab_size=32_000, seq_len=512, format=format, device="cuda")
    division = Division(strategy=strategy, processes=processes, **settings)
    return TrainingMemory(work=work, optimizer=AdamWConfig(), division=division)


def test_one_process_is_what_there_was() -> None:
    assert memory("ddp", 1).footprint(2, 2).moments == memory().footprint(2, 2).moments


def test_ddp_has_all_in_each_and_its_gradients_from_the_first_moment_on() -> None:
    alone, one_of_four = memory().footprint(2, 2), memory("ddp", 4).footprint(2, 2)
    for part in ("weights", "optimizer state", "activations", "logits and loss"):
        assert one_of_four.largest(part) == alone.largest(part)  # type: ignore[arg-type]
    assert one_of_four.moments["loss"]["gradients"] >= alone.largest("weights")
    assert one_of_four.peak >= alone.peak


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_fsdp_divides_what_stands_and_gathers_two_blocks(processes: int) -> None:
    alone, divided = memory().footprint(2, 2), memory("fsdp", processes).footprint(2, 2)
    for part in ("weights", "optimizer state"):
        assert divided.largest(part) == pytest.approx(alone.largest(part) / processes, rel=1e-6)  # type: ignore[arg-type]
    assert divided.moments["update"]["gradients"] == memory().gradient_bytes // processes
    block = 4 * 1024 * 1024 + 3 * 1024 * 4096
    assert divided.moments["loss"]["gathered weights"] == 2 * (2 * block + 32_000 * 1024)
    assert divided.moments["update"].get("gathered weights") == 0
    assert divided.largest("weights in 16 bits") == 0
    assert divided.largest("activations") == alone.largest("activations")


def test_fsdp_keeps_whole_gradients_while_microbatches_are_added_up() -> None:
    """As FSDP2 does: they are divided in the backward pass of the last one."""
    divided = memory("fsdp", 4)
    whole = memory().gradient_bytes
    assert divided.footprint(1, 4).moments["loss"]["gradients"] >= whole
    assert divided.footprint(4, 4).moments["loss"]["gradients"] < whole / 4


def test_weights_that_are_not_dropped_stay_gathered() -> None:
    kept = memory("fsdp", 4, reshard_after_forward=False)
    assert kept.footprint(1, 1).moments["loss"]["gathered weights"] == 2 * kept.parameters.total
    assert kept.exchanged_bytes(1) < memory("fsdp", 4).exchanged_bytes(1)


def test_offloading_moves_what_stands_into_main_memory() -> None:
    offloaded, divided = memory("fsdp", 4, cpu_offload=True), memory("fsdp", 4)
    assert offloaded.footprint(1, 1).largest("weights") == offloaded.footprint(1, 1).largest("optimizer state") == 0
    assert offloaded.offloaded_bytes == 4 * 4 * offloaded.parameters.total // 4
    assert divided.offloaded_bytes == 0
    assert offloaded.footprint(1, 1).peak < divided.footprint(1, 1).peak


def test_what_is_sent_goes_by_rings() -> None:
    total = memory().parameters.total
    assert memory().exchanged_bytes(1) == 0
    assert memory("ddp", 4).exchanged_bytes(3) == 2 * 3 * 4 * total // 4
    assert memory("fsdp", 4).exchanged_bytes(1) == 3 * (2 * 2 + 4) * total // 4
    fp32 = memory("fsdp", 4, format="fp32")
    assert fp32.exchanged_bytes(2) == 3 * (2 * 2 * 4 + 4) * total // 4


def test_of_a_divided_model_less_is_copied_for_checkpoints() -> None:
    assert memory("fsdp", 4).checkpoint_bytes == memory().checkpoint_bytes / 4
    assert memory("ddp", 4).checkpoint_bytes == memory().checkpoint_bytes
