"""A trained model: opened from a run folder or a store, and continuing texts.

Importing this is light; torch is imported when a model is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import EncoderDecoderConfig, ExperimentConfig, is_of_pairs
from lmtrain.data.tokenizer import TURN_END, Tokenizer, load_tokenizer
from lmtrain.errors import CheckpointError, ConfigError
from lmtrain.inference.settings import GenerationSettings, continue_prompts, fit_prompts
from lmtrain.inference.text_stream import TextStream
from lmtrain.model.sampling import DEFAULT_SAMPLING, Sampling
from lmtrain.reading import read_run
from lmtrain.run_dir import RunDir
from lmtrain.store.entry import Metadata, describe, is_entry, read_metadata, require_as_saved
from lmtrain.store.opening import FoundRun, find_run

if TYPE_CHECKING:
    from lmtrain.model.building import Model
    from lmtrain.training.checkpoint import Checkpoint

log = logging.getLogger(__name__)

OnText = Callable[[int, str | None], None]
"""Told the row and each new piece of its text as it comes, then None when that text has ended."""


ROWS_AT_ONCE = 16
"""Texts that are made together, of more there may be: each takes room for its keys and values."""


ONE_THREAD_BELOW = 3_000_000
"""Parameters of a model whose tokens are not made faster by a second thread, which on a busy machine is waited for."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model was opened from."""

    folder: RunDir
    checkpoint: Mapping[str, Any]  # the `meta.json` of its checkpoint
    stored: Metadata | None  # of a model in a store


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainedModel:
    """A model with its tokenizer."""

    config: ExperimentConfig  # of the run
    model: Model
    tokenizer: Tokenizer
    step: int  # of the checkpoint
    source: Source | None = None  # None: it was not opened from a folder

    def __repr__(self) -> str:
        origin = "a run" if self.source is None else self.source.folder
        return f"<model of {origin} at step {self.step:,}: {self.num_parameters / 1e6:.2f} M parameters>"

    @cached_property
    def metadata(self) -> Metadata:
        """What is known of it: of a model in a store its `model.json`, of a run the same but for name, version, files.

        Raises CheckpointError for a model that was not opened from a folder.
        """
        source = self._require_source()
        if source.stored is not None:
            return source.stored
        from lmtrain.training.checkpoint import STATE

        has_state = (source.folder.checkpoints / f"step_{self.step:08d}" / STATE).exists()
        return describe(
            read_run(source.folder.path),
            source.checkpoint,
            self.tokenizer,
            num_parameters=self.num_parameters,
            has_training_state=has_state,
        )

    def training_state(self) -> Checkpoint:
        """All that training goes on from, read from the folder: `training.checkpoint.restore` puts it back.

        Its `state` has optimizer moments and random states, its `meta` the scaler and, under `progress`, the step (by
        which schedules go), tokens and scores. Raises CheckpointError; WeightsOnlyError if only weights were saved.
        """
        from lmtrain.training.checkpoint import CheckpointFolder

        return CheckpointFolder(self._require_source().folder.checkpoints).load(f"step_{self.step:08d}")

    def _require_source(self) -> Source:
        if self.source is None:
            raise CheckpointError("this model was not opened from a folder: nothing else is known of it")
        return self.source

    @property
    def seq_len(self) -> int:
        """The context in tokens."""
        return self.model.seq_len

    @property
    def reads_sources(self) -> bool:
        """Whether a prompt is the source of a pair, whose target is generated."""
        return is_of_pairs(self.config.data)

    @property
    def reads_from_the_start(self) -> bool:
        """Of a prompt longer than the context the first tokens are read, by an encoder, instead of the last."""
        return isinstance(self.config.model, EncoderDecoderConfig)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt, as in training: of a source with the end token after it. Raises DataError.

        Of an empty prompt the end token, after which documents begin.
        """
        ids: list[int] = self.tokenizer.encode(prompt).tolist()
        return [*ids, self.tokenizer.end_id] if self.reads_sources or not ids else ids

    def require_room(self, prompt_ids: Sequence[int], name: str = "the prompt") -> None:
        """Raise ConfigError if a prompt is longer than the context."""
        if len(prompt_ids) > self.seq_len:
            raise ConfigError(
                f"{name} has {len(prompt_ids):,} tokens, more than the model's context of {self.seq_len:,}"
            )

    def generate_text(self, prompt: str, **settings: Any) -> str:
        """What the model makes follow a prompt; of a model trained on pairs, the target of that source.

        Args:
            settings: those of `GenerationSettings`, such as max_new_tokens=50, temperature=0.8, top_p=0.9, stop=["\n"],
                seed=1; the same settings give the same text, here as in `lmtrain generate`.

        Raises ConfigError for a value out of range, DataError for a prompt that the tokenizer cannot write. Of a prompt
        longer than the context a part is read, with a warning.
        """
        asked, prompts = GenerationSettings(**settings, num_samples=1), [self.encode_prompt(prompt)]
        for notice in fit_prompts(self, prompts, asked):
            log.warning(notice)
        return continue_prompts(self, prompts, asked)[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
        stops: Sequence[str] = (),
        on_text: OnText | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """The texts that follow prompts, by the rules of `generate_batch`, ROWS_AT_ONCE of them together.

        A text ends before any of `stops`, at the end of a document, at the end of a turn, or after max_new_tokens. With
        more than one beam, the likeliest texts that `beam_search` finds: `sampling` and `seeds` are not used.
        """
        from lmtrain.model.beam_search import beam_search
        from lmtrain.model.generation import generate_batch

        sources = prompts if self.reads_from_the_start else None
        if sources is not None:
            prompts = [[self.tokenizer.end_id]] * len(sources)
        streams = [TextStream(self.tokenizer.decode, prompt, stops) for prompt in prompts]

        def take(first: int, number: int, token: int | None) -> bool:
            row = first + number
            stream = streams[row]
            piece = stream.finish() if token is None else stream.add(token)
            if on_text is not None:
                if piece:
                    on_text(row, piece)
                if token is None:
                    on_text(row, None)
            return stream.stopped

        ends = {self.tokenizer.end_id, self.tokenizer.special.get(TURN_END, self.tokenizer.end_id)}
        with _threads_for(self.num_parameters):
            for first in range(0, len(prompts), ROWS_AT_ONCE):
                some = slice(first, first + ROWS_AT_ONCE)
                task: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_ids": ends}
                task["sources"] = None if sources is None else sources[some]
                if num_beams == 1:
                    row_seeds = None if seeds is None else seeds[some]
                    generate_batch(
                        self.model, prompts[some], sampling, seeds=row_seeds, on_token=partial(take, first), **task
                    )
                    continue
                found = beam_search(
                    self.model, prompts[some], num_beams=num_beams, length_penalty=length_penalty, **task
                )
                for row, tokens in enumerate(found):
                    any(take(first, row, token) for token in tokens)  # until a stop string
                    take(first, row, None)
        return [stream.text for stream in streams]


@contextmanager
def _threads_for(num_parameters: int) -> Iterator[None]:
    """While entered, no more CPU threads than a model of this size can use. PyTorch counts them for each thread."""
    import torch

    before = torch.get_num_threads()
    if num_parameters < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_model(
    run: Path | str, *, checkpoint: str | None = None, device: str = "auto", store: str | None = None
) -> TrainedModel:
    """Open the model of a run folder, or one of a store, whose files must be as they were saved.

    Args:
        run: a run folder, `NAME` (its newest version), `NAME:VERSION`, or in a registry `NAME@ALIAS`.
        checkpoint: `last`, `best` or the number of a step; None: the best if there is one, else the newest.
        device: auto, cpu, cuda or mps.
        store: a folder of models, `mlflow` or the address of a registry; None: `$LMTRAIN_MODELS`, else `models`.

    Raises:
        UsageError: there is no such run, model, checkpoint or device, or a file is damaged.
        RunError: the registry is away.
    """
    found = find_run(run, store)
    require_as_saved(found.folder)
    stored = _stored_metadata(found) if is_entry(found.folder) else None
    config = compose_config([], found.folder)  # refused before torch is imported
    from lmtrain.hardware import choose_device
    from lmtrain.model.building import build_model
    from lmtrain.training.checkpoint import load_weights
    from lmtrain.training.chosen_checkpoint import load_chosen

    folder, where = RunDir(found.folder), choose_device(device)
    saved = load_chosen(folder, checkpoint, weights_only=True)
    tokenizer = load_tokenizer(folder.tokenizer)
    model = build_model(config.model, vocab_size=tokenizer.vocab_size, seq_len=config.data.seq_len, dropout=0.0)
    load_weights(model, saved.model)
    return TrainedModel(
        config=config,
        model=model.to(where).eval(),
        tokenizer=tokenizer,
        step=saved.meta["progress"]["step"],
        source=Source(folder=folder, checkpoint=saved.meta, stored=stored),
    )


def _stored_metadata(found: FoundRun) -> Metadata:
    """That of a model in a store, under the version that a registry gave it."""
    metadata, id = read_metadata(found.folder), found.id
    return metadata if id is None else metadata | {"id": str(id), "name": id.name, "version": id.version}
