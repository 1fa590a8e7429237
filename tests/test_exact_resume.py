"""A run that dies between two checkpoints and goes on in new objects is the run that nobody stopped, to the bit.

Here in one process, for every optimizer, schedule and trick that keeps something from step to step;
`test_kill_resume.py` kills real processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import TINY

from lmtrain.config.compose import compose_config, group_options
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.documents import Documents
from lmtrain.data.prepare import prepare
from lmtrain.data.prepared import PreparedData
from lmtrain.run_dir import RunDir
from lmtrain.session import Session, build_session
from lmtrain.training.interrupt import StopRequest
from lmtrain.training.trainer import Progress

STEPS = 14
LONG = (
    *(f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=3", "trainer.log_every=2", "trainer.eval_every=4"),
    *("trainer.eval_batches=2", "dropout=0.1", "model.num_layers=2", "precision=fp32", "device=cpu"),
)
NO_GAIN = ("trainer.min_delta=100",)  # after the first evaluation, which gains by being the first
VARIANTS: dict[str, tuple[str, ...]] = {
    **{f"optimizer={name}": (f"optimizer={name}",) for name in group_options("optimizer")},
    "schedule=cosine_restarts": ("schedule=cosine_restarts",),
    "a plateau": ("schedule=plateau", "schedule.patience=1", "schedule.warmup_steps=0", *NO_GAIN),
    "patience": ("trainer.patience=2", *NO_GAIN),
    "a batch size ramp": ("trainer.batch_size_warmup_steps=10",),
    "a sequence length ramp": ("trainer.seq_len_warmup_steps=10", "trainer.initial_seq_len=4"),
    "selective": ("trainer.activation_checkpointing=selective",),
    "full": ("trainer.activation_checkpointing=full",),
    "accumulation": ("trainer.micro_batch_size=3",),
    "bf16": ("precision=bf16",),
    "documents apart": ("data.batches=packed_documents", "data.document=line", "model.position=learned"),
    "padded": ("data.batches=padded", "data.document=line", "data.seq_len=24", "trainer.micro_batch_size=3"),
    "a mixture": ("data.document=line", "trainer.batch_size_warmup_steps=10"),
    "a padded mixture": ("data.document=line", "data.batches=padded", "data.seq_len=24"),
    "an encoder-decoder": (
        *("model=seq2seq_nano", "model.num_encoder_layers=1", "model.num_decoder_layers=1", "data=pairs"),
        *("data.source=question", "data.target=answer", "data.seq_len=24", "trainer.micro_batch_size=3"),
    ),
    "a padded vocabulary": ("trainer.pad_vocab=true",),
    "losses": ("trainer.label_smoothing=0.1", "trainer.z_loss=1e-3", "model.position=learned"),
}


class DiedError(Exception):
    """What happens to the run on its way."""


class Attempt:
    """One attempt at a run, as the program makes it, without the program."""

    def __init__(self, folder: Path, config: ExperimentConfig, *, mixed: bool = False) -> None:
        self.run = RunDir(folder)
        data = prepare(config.data, config.tokenizer)
        self.session: Session = build_session(config, mixture_with(data) if mixed else data, torch.device("cpu"))
        resuming = self.run.checkpoints.exists()
        self.begun_at = self.session.restore(self.run.checkpoints) if resuming else Progress()
        self.records: dict[tuple[float, ...], dict[str, float]] = {}

    def fit(self, *, dies_after: int | None = None) -> str:
        def record(measured: dict[str, float]) -> None:
            if dies_after is not None and measured["step"] > dies_after:
                raise DiedError
            clocks = ("train/tokens_per_second", "train/memory_gib")
            self.records[measured["step"], "val/loss" in measured] = {
                k: v for k, v in measured.items() if k not in clocks
            }

        trainer = self.session.trainer(self.run, record, self.begun_at)
        with StopRequest() as stop:
            try:
                return trainer.fit(stop)
            finally:
                self.ended_at = trainer.progress

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.session.model.named_parameters()
        for number, optimizer in enumerate(self.session.step.optimizers):
            for parameter, values in optimizer.state_dict()["state"].items():
                yield from ((f"{number}/{parameter}/{name}", value) for name, value in values.items())
        yield "random", torch.get_rng_state()


def mixture_with(data: PreparedData) -> PreparedData:
    """These data and, twice as often, some of them whose spaces alone are targets."""
    (source,) = data.sources
    splits = {}
    for name, split in source.splits.items():
        ends = split.documents.ends[:20]
        tokens = split.documents.tokens[: ends[-1]]
        spaces = tokens == data.tokenizer.encode(" ")[0]
        prompts = np.array([int(np.argmax(part)) for part in np.split(spaces, ends[:-1])])
        splits[name] = replace(split, documents=Documents(tokens, ends, spaces, prompts))
    return replace(data, sources=(source, replace(source, splits=splits, weight=2.0)))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def settings(variant: str, corpus: Path) -> ExperimentConfig:
    common = [*TINY, *LONG]
    if variant == "an encoder-decoder":
        common = [word for word in common if not word.startswith(("model.num_layers", "data=", "data.seq_len"))]
        corpus = pairs_of(corpus)
    return compose_config([*common, *VARIANTS[variant], f"data.path={corpus}"])


def pairs_of(corpus: Path) -> Path:
    """The words of its lines, and the same from last to first."""
    path = corpus.with_name("pairs.jsonl")
    lines = [line.split()[:4] for line in corpus.read_text().splitlines() if line.split()]
    records = [{"question": " ".join(words), "answer": " ".join(reversed(words))} for words in lines]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_goes_on_to_the_bit(tmp_path: Path, corpus: Path, variant: str) -> None:
    config = settings(variant, corpus)
    mixed = "mixture" in variant
    whole = Attempt(tmp_path / "whole", config, mixed=mixed)
    status = whole.fit()
    expected = {name: value.clone() for name, value in whole.state()}

    first = Attempt(tmp_path / "broken", config, mixed=mixed)
    with pytest.raises(DiedError):
        first.fit(dies_after=7)
    torch.manual_seed(99)
    second = Attempt(tmp_path / "broken", config, mixed=mixed)
    assert second.begun_at.step == 6
    assert second.fit() == status
    kept: dict[Any, Any] = {key: record for key, record in first.records.items() if key[0] <= 6}
    assert kept | second.records == whole.records
    assert second.ended_at == whole.ended_at
    found = dict(second.state())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_plateau_and_the_patience_are_met(tmp_path: Path, corpus: Path) -> None:
    """Else the variants above would show nothing."""
    plateau = Attempt(tmp_path / "plateau", settings("a plateau", corpus))
    plateau.fit()
    assert plateau.ended_at.lr_reductions >= 2


def test_a_run_killed_before_its_patience_took_effect_ends_where_it_was(tmp_path: Path, corpus: Path) -> None:
    config = settings("patience", corpus)
    whole = Attempt(tmp_path / "run", config)
    assert whole.fit() == "early_stopped"
    assert whole.ended_at.step < STEPS
    again = Attempt(tmp_path / "run", config)
    assert again.fit() == "early_stopped"
    assert again.ended_at == again.begun_at
    assert not again.records
