"""`model=auto`: which preset it comes to, why, and that a run keeps it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from command_line import TINY, CommandLine

from lmtrain import fitting
from lmtrain.config.compose import compose_config
from lmtrain.config.presets import preset_of, sized_presets
from lmtrain.config.schema import AutoModelConfig, ExperimentConfig
from lmtrain.errors import ConfigError, HardwareError
from lmtrain.fitting import settle_model, training_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VOCAB_SIZE = 32_000
GIB = 2**30


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return compose_config(["model=auto", "precision=bf16", "optimizer=adamw", "batch_size=4"])


def settle(
    monkeypatch: pytest.MonkeyPatch,
    config: ExperimentConfig,
    device: torch.device = CPU,
    **found: float,
) -> tuple[str | None, str]:
    """The preset and the reason, where so much memory is found, in bytes by kind of device."""
    monkeypatch.setattr(fitting, "total_memory", lambda device: found[device.type])
    settled, reason = settle_model(config, vocab_size=VOCAB_SIZE, device=device)
    return preset_of(settled.model), reason


def needed(config: ExperimentConfig, preset: str, device: torch.device = CPU) -> int:
    memory = training_memory(config, sized_presets()[preset], vocab_size=VOCAB_SIZE, device=device)
    return memory.footprint(1, config.batch_size).peak


@pytest.mark.parametrize(("preset", "larger"), [("nano", "tiny"), ("tiny", "small"), ("small", "medium")])
def test_it_is_the_largest_preset_that_needs_no_more_than_its_share(
    monkeypatch: pytest.MonkeyPatch, config: ExperimentConfig, preset: str, larger: str
) -> None:
    limit = needed(config, larger) / 0.8
    assert settle(monkeypatch, config, cpu=limit + 2)[0] == larger
    chosen, reason = settle(monkeypatch, config, cpu=limit - 2)
    assert chosen == preset
    assert f"model={preset}, the largest preset that fits" in reason
    assert "80 % of main memory" in reason
    assert f"{larger} would need {fitting.bytes_text(needed(config, larger))}" in reason


def test_with_memory_for_all_it_is_the_largest(monkeypatch: pytest.MonkeyPatch, config: ExperimentConfig) -> None:
    chosen, reason = settle(monkeypatch, config, cpu=1000 * GIB)
    assert chosen == "research"
    assert "would need" not in reason


def test_the_share_can_be_set(monkeypatch: pytest.MonkeyPatch, config: ExperimentConfig) -> None:
    """As for two runs side by side."""
    limit = needed(config, "small") / 0.8
    half = replace(config, model=AutoModelConfig(memory_share=0.4))
    assert settle(monkeypatch, half, cpu=limit + 2)[0] == "tiny"
    assert settle(monkeypatch, half, cpu=2 * limit + 4)[0] == "small"


def test_other_settings_count(monkeypatch: pytest.MonkeyPatch, config: ExperimentConfig) -> None:
    memory = needed(config, "small") / 0.8 + 2
    longer = replace(config, data=replace(config.data, seq_len=8192))
    assert settle(monkeypatch, longer, cpu=memory)[0] == "tiny"
    checkpointed = replace(longer, trainer=replace(config.trainer, activation_checkpointing="full"))
    assert needed(checkpointed, "small") < needed(longer, "small")


def test_on_a_gpu_the_copy_of_a_checkpoint_has_to_fit_into_main_memory(
    monkeypatch: pytest.MonkeyPatch, config: ExperimentConfig
) -> None:
    assert settle(monkeypatch, config, CUDA, cuda=80 * GIB, cpu=100 * GIB)[0] == "medium"
    chosen, reason = settle(monkeypatch, config, CUDA, cuda=80 * GIB, cpu=16 * GIB)
    assert chosen == "small"
    assert re.search(r"medium would need [\d.]+ GiB of 12.80 GiB of main memory", reason)


def test_too_little_memory_for_the_smallest_is_told(monkeypatch: pytest.MonkeyPatch, config: ExperimentConfig) -> None:
    with pytest.raises(HardwareError) as caught:
        settle(monkeypatch, config, cpu=0.3 * GIB)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "to train nano on a sequence of 256 tokens at a time needs " in lines[0]
    assert "80 % of the main memory found are 245.8 MiB" in lines[0]


def test_a_model_that_is_named_stays(config: ExperimentConfig) -> None:
    named = replace(config, model=sized_presets()["small"])
    assert settle_model(named, vocab_size=VOCAB_SIZE, device=CPU) == (named, "")


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="memory_share must be above 0 and at most 1"):
        AutoModelConfig(memory_share=share)


AUTO = (*[word for word in TINY if not word.startswith("model.")], "model=auto", "trainer.eval_batches=1")


def share_for(gib: float) -> str:
    """A setting that lets training take about so much of this machine's memory."""
    return f"model.memory_share={gib * GIB / psutil.virtual_memory().total}"


def test_a_run_says_what_it_came_to_and_keeps_it(lmtrain: CommandLine, corpus: Path) -> None:
    words = [*AUTO, f"data.path={corpus}", "hydra.run.dir=run", "resume=auto"]
    first = lmtrain(*words, share_for(0.55), "trainer.max_steps=1")
    assert re.search(r"^auto    model=nano, the largest preset .*; tiny would need ", first.stdout, re.MULTILINE)
    assert "auto    model=nano, the largest" in (lmtrain.folder / "run/lmtrain.log").read_text()
    config: dict[str, Any] = yaml.safe_load((lmtrain.folder / "run/config.yaml").read_text())
    assert {"override /model": "_decoder"} in config["defaults"]
    assert (config["model"]["d_model"], config["model"]["num_layers"]) == (128, 4)
    # With memory for more, too: what was begun is continued.
    second = lmtrain(*words, share_for(1.5), "trainer.max_steps=2")
    assert "step 2/2" in second.stdout
    assert "auto    model" not in second.stdout


def test_its_shape_cannot_be_set(lmtrain: CommandLine) -> None:
    refused = lmtrain("model=auto", "model.d_model=64", status=2)
    assert refused.stderr == (
        "lmtrain: model.d_model cannot be set with model=auto, which chooses the shape by the memory found; "
        "name a preset\n"
    )
    assert "memory_share: 0.8" in lmtrain("--cfg", "job", "model=auto").stdout
    assert not list(lmtrain.folder.iterdir())
