"""Run folders with a model in them, made without training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import TINY

from lmtrain.config.compose import compose_config
from lmtrain.config.saved import to_yaml
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.tokenizer import SPECIAL, ByteTokenizer, Tokenizer
from lmtrain.model.building import Model, build_model
from lmtrain.run_dir import RunDir
from lmtrain.training.checkpoint import Checkpoint, CheckpointFolder, capture

TRANSLATOR = (
    *("model=seq2seq_nano", "model.d_model=16", "model.num_heads=2", "model.num_encoder_layers=1"),
    *("model.num_decoder_layers=1", "data=pairs", "data.path=nowhere.jsonl", "data.source=a", "data.target=b"),
)


@functools.cache
def _composed(words: tuple[str, ...], run: Path | None, folder: Path) -> ExperimentConfig:
    return compose_config(words, run)


def composed_once(words: Sequence[str], run: Path | None = None) -> ExperimentConfig:
    """`compose_config`, which takes its time, for run folders that stay as they are."""
    return _composed(tuple(words), run, Path.cwd())


def settings(*overrides: str) -> ExperimentConfig:
    return compose_config([*TINY, "data.path=nowhere.txt", "model.init_std=0.3", "model.output_init=zero", *overrides])


def fresh_model(config: ExperimentConfig, tokenizer: Tokenizer, seed: int) -> Model:
    """One that says something: nothing in it is zero."""
    torch.manual_seed(seed)
    model = build_model(config.model, vocab_size=tokenizer.vocab_size, seq_len=config.data.seq_len, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def captured(model: Model, step: int) -> Checkpoint:
    meta: dict[str, Any] = {"progress": {"step": step}}
    return capture(model, [], torch.amp.GradScaler("cpu", enabled=False), meta)


def make_run(folder: Path, tokenizer: Tokenizer, *overrides: str, steps: tuple[int, ...] = (1, 2, 3)) -> Path:
    """A run with a checkpoint of other weights at each step, the second of them the best."""
    config, run = settings(*overrides), RunDir(folder)
    folder.mkdir()
    run.write_texts({run.config.name: to_yaml(config)})
    tokenizer.save(run.tokenizer)
    checkpoints = CheckpointFolder(run.checkpoints, keep=len(steps) or 1)
    for step in steps:
        best = steps[1] if step >= steps[1] else None
        checkpoints.save(captured(fresh_model(config, tokenizer, seed=step), step), step=step, best_step=best)
    return folder


def chat_tokenizer() -> Tokenizer:
    return ByteTokenizer(SPECIAL)


def make_translator(folder: Path, *overrides: str) -> Path:
    """A run of an encoder-decoder over bytes, untrained."""
    words = [word for word in TINY if not word.startswith(("data=", "model."))]
    config, run, tokenizer = compose_config([*words, *TRANSLATOR, *overrides]), RunDir(folder), ByteTokenizer()
    folder.mkdir()
    run.write_texts({run.config.name: to_yaml(config)})
    tokenizer.save(run.tokenizer)
    CheckpointFolder(run.checkpoints).save(captured(fresh_model(config, tokenizer, seed=1), 1), step=1, best_step=1)
    return folder
