"""What cannot be trained is refused before anything is prepared, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, CommandLine

from lmtrain import room
from lmtrain.config.compose import compose_config
from lmtrain.config.schema import ExperimentConfig
from lmtrain.errors import NotEnoughMemoryError
from lmtrain.fitting import training_memory
from lmtrain.room import ERROR_OF_FORMULA, EXACT, require_room, shortage

CPU = torch.device("cpu")
GIB = 2**30
LARGE = ("model=small", "tracking=none", "data.seq_len=1024")


def compose(*words: str) -> ExperimentConfig:
    return compose_config([*LARGE, "tokenizer.vocab_size=32000", *words])


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the memory that is found, in bytes."""

    def set_memory(size: float) -> None:
        monkeypatch.setattr(room, "total_memory", lambda device: size)

    return set_memory


def needed(config: ExperimentConfig) -> float:
    found = shortage(config, CPU)
    assert found is not None
    return found.needed


def test_a_shortage_names_the_largest_parts_and_what_would_help(memory: Any) -> None:
    memory(7 * GIB)
    with pytest.raises(NotEnoughMemoryError) as refused:
        require_room(compose("optimizer=adamw"), CPU)
    first, second = str(refused.value).splitlines()
    assert first.startswith("to train on one sequence at a time takes at least 1")
    assert "(checkpoint copy 3.89 GiB, optimizer state 2.60 GiB, weights 1.30 GiB)" in first
    assert first.endswith("and there are 7.00 GiB of main memory")
    assert second == (
        "take, the cheapest first: trainer.activation_checkpointing=full optimizer=adafactor; or a smaller model; "
        "force=true goes on all the same"
    )
    require_room(compose("optimizer=adamw", "force=true"), CPU)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("optimizer=adamw", "batch_size=1"),
        ("trainer.activation_checkpointing=full", "dropout=0.1"),
        ("precision=bf16", "data.batches=packed_documents"),
    ],
)
def test_what_would_help_does(memory: Any, words: tuple[str, ...]) -> None:
    config = compose(*words)
    memory(0)
    least = needed(config)
    for share in (0.95, 0.7, 0.5):
        memory(share * least)
        proposed = room.remedies(config, CPU).partition(": ")[2].split("; or ")
        for way in proposed:
            if "=" in way and "force" not in way and "fsdp" not in way:
                require_room(compose(*words, *way.split()), CPU)


@pytest.mark.parametrize("words", [(), ("optimizer=adamw",), ("trainer.activation_checkpointing=full",)])
def test_what_may_be_possible_is_not_refused(memory: Any, words: tuple[str, ...]) -> None:
    """Neither gaps nor the program count, and formulas may be wrong by what the tests of them allow."""
    config = compose(*words)
    memory(0)
    least = needed(config)
    peak = training_memory(config, config.model, vocab_size=32000, device=CPU).footprint(1, 8).peak  # type: ignore[arg-type]
    assert least < peak / ERROR_OF_FORMULA
    memory(least)
    require_room(config, CPU)
    memory(least - 1)
    with pytest.raises(NotEnoughMemoryError):
        require_room(config, CPU)


def test_a_compiled_model_is_not_taken_to_keep_what_others_keep(memory: Any) -> None:
    config = compose("model.attention=naive", "data.seq_len=4096")
    memory(0)
    compiled = replace(config, trainer=replace(config.trainer, compile=True))
    assert needed(compiled) < needed(config) / 3
    found = shortage(compiled, CPU)
    assert found is not None
    assert set(EXACT) <= set(found.parts)


def test_a_vocabulary_that_follows_from_the_text_is_not_guessed(memory: Any) -> None:
    with_characters = compose_config([*LARGE, "tokenizer=char"])
    memory(0)
    least = needed(with_characters)
    memory(least + 100_000)
    require_room(with_characters, CPU)


def test_processes_on_one_machine_share_it(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose()
    memory(0)
    least = needed(config)
    memory(2 * least + 2)
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(NotEnoughMemoryError):
        require_room(compose("parallel=ddp"), CPU)
    require_room(compose("parallel=fsdp", "optimizer=adamw"), CPU)


def test_a_run_is_refused_before_its_text_is_looked_for(lmtrain: CommandLine) -> None:
    refused = lmtrain(*TINY, "data.path=nowhere.txt", "model.d_model=131072", "model.num_layers=64", status=2)
    assert refused.stderr.startswith("lmtrain: to train on one sequence at a time takes at least ")
    assert "Traceback" not in refused.stderr
    assert not list(Path(lmtrain.folder).iterdir())
    asked = lmtrain(
        *TINY, "data.path=nowhere.txt", "model.d_model=131072", "model.num_layers=64", "force=true", status=2
    )
    assert "nowhere.txt" in asked.stderr
