"""Text generation, in token ids: the loop from prompts to what a model says next, with a cache of keys and values.

Not here: how a token is chosen (`sampling.py`); turning text into ids and back, which is the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmtrain.config.schema.rules import require
from lmtrain.model.building import Model
from lmtrain.model.cache import KeyValueCache, Memory
from lmtrain.model.encoder_decoder import EncoderDecoder
from lmtrain.model.sampling import DEFAULT_SAMPLING, Sampling, choose_token

OnToken = Callable[[int, int | None], bool]
"""Told the row and each new token as it comes, then None when the row's text has ended. True ends it there."""


def generate(
    model: Model,
    prompt_ids: Sequence[int],
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    max_new_tokens: int,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    source: Sequence[int] | None = None,
) -> list[int]:
    """Continue one prompt; see `generate_batch`."""
    [new_ids] = generate_batch(
        model,
        [prompt_ids],
        sampling,
        max_new_tokens=max_new_tokens,
        seeds=[seed],
        stop_ids=stop_ids,
        sources=None if source is None else [source],
    )
    return new_ids


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    sources: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths together and return the new ids of each, without the stop id that ended it.

    `sources`, one a prompt, are for an `EncoderDecoder`, whose prompts are how their targets begin.

    A text follows from its prompt and its seed (of `seeds`, one a prompt; None: all 0), whatever else is in the batch,
    but for the rounding of matrix products of another size. PyTorch's global random state is neither read nor moved.

    Only the last seq_len tokens of a longer prompt are seen. When a row's context is full, its last half is read again
    and the text goes on from there, so a long text costs about two passes over each of its tokens. The repetition
    penalty is on all that a row has read and written, but not on stop ids: to end is no repetition.

    Raises:
        ConfigError: a prompt or source is empty or holds an id beyond the vocabulary, or max_new_tokens is negative.
        RunError: the model's logits are not finite.
    """
    require(max_new_tokens >= 0, f"max_new_tokens must not be negative, got {max_new_tokens}")
    require_ids(model, [*prompts, *(sources or ())])
    rows = [_Row(number, list(prompt)[-model.seq_len :]) for number, prompt in enumerate(prompts)]
    for row, seed in zip(rows, seeds or [0] * len(rows), strict=True):
        row.generator.manual_seed(seed)
    if rows and max_new_tokens > 0:
        was_training = model.training
        model.eval()
        try:
            _Loop(model, sampling, max_new_tokens, frozenset(stop_ids), on_token, encode(model, sources)).run(rows)
        finally:
            model.train(was_training)
    return [row.new_ids for row in rows]


def require_ids(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError for a prompt that is empty, or holds an id beyond the vocabulary."""
    for prompt in prompts:
        require(len(prompt) > 0, "a prompt must hold at least one token, got an empty one")
        require(
            min(prompt) >= 0 and max(prompt) < model.vocab_size,
            f"a prompt's ids must lie in the vocabulary of {model.vocab_size}, got {min(prompt)} to {max(prompt)}",
        )


@torch.inference_mode()
def encode(model: Model, sources: Sequence[Sequence[int]] | None) -> Memory | None:
    """What a model sees of sources, of which the first seq_len tokens are read; None without any."""
    assert (sources is not None) == isinstance(model, EncoderDecoder), "sources are what an encoder reads"
    if sources is None or not isinstance(model, EncoderDecoder):
        return None
    lengths = torch.tensor([min(len(source), model.seq_len) for source in sources], device=model.device)
    filled = [torch.tensor(source[: model.seq_len], device=model.device) for source in sources]
    sources_BS = pad_sequence(filled, batch_first=True)
    mask_BS = torch.arange(sources_BS.size(1), device=model.device) < lengths.unsqueeze(1)
    return model.encode(sources_BS, None if mask_BS.all() else mask_BS)


def read_into_cache(
    model: Model, contexts: Sequence[Sequence[int]], *, capacity: int, memory: Memory | None = None
) -> KeyValueCache:
    """A cache that holds contexts of any lengths, but for their last tokens."""
    unread = [list(context[:-1]) for context in contexts]
    cache = model.new_cache(len(unread), capacity, memory)
    if longest := max(map(len, unread)):
        # What fills a row up comes after its tokens, so that they do not see it; then it is forgotten.
        filled = [ids + [0] * (longest - len(ids)) for ids in unread]
        model.read(torch.tensor(filled, device=model.device), cache)
        cache.truncate([len(ids) for ids in unread])
    return cache


@dataclass(eq=False)
class _Row:
    """One text on its way. The cache holds its context but for the last token."""

    number: int
    context: list[int]  # what the next token is predicted from
    generator: torch.Generator = field(default_factory=torch.Generator)
    new_ids: list[int] = field(default_factory=list)
    repeated: Tensor | None = None  # [V] bool: the tokens to penalise


@dataclass
class _Loop:
    """What all rows have in common, and the loop over their tokens."""

    model: Model
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int]
    on_token: OnToken | None
    memory: Memory | None  # of all rows' sources, by their numbers

    @torch.inference_mode()
    def run(self, rows: list[_Row]) -> None:
        """Add to the new ids of every row until all have ended."""
        if self.sampling.repetition_penalty != 1:
            for row in rows:
                row.repeated = self._to_penalise(row.context)
        longest = max(len(row.context) for row in rows)
        cache = self._read(rows, capacity=min(longest + self.max_new_tokens, self.model.seq_len))
        while rows:
            logits_BV = self.model(self._tensor([row.context[-1:] for row in rows]), cache)[:, -1].float().cpu()
            going_on = [place for place, row in enumerate(rows) if self._goes_on(row, logits_BV[place])]
            if len(going_on) < len(rows):
                rows = [rows[place] for place in going_on]
                if rows:
                    cache.keep(going_on)
            self._make_room(rows, cache)

    def _goes_on(self, row: _Row, logits_V: Tensor) -> bool:
        """Choose the row's next token; False if its text has ended."""
        token = choose_token(logits_V, self.sampling, row.generator, row.repeated)
        if token not in self.stop_ids:
            row.new_ids.append(token)
            row.context.append(token)
            if row.repeated is not None:
                row.repeated[token] = True
            told_to_end = self.on_token is not None and self.on_token(row.number, token)
            if not told_to_end and len(row.new_ids) < self.max_new_tokens:
                return True
        if self.on_token is not None:
            self.on_token(row.number, None)
        return False

    def _make_room(self, rows: list[_Row], cache: KeyValueCache) -> None:
        """Let the rows whose context is full go on from its last half."""
        seq_len = self.model.seq_len
        full = [place for place, row in enumerate(rows) if len(row.context) > seq_len]
        if full:
            for place in full:
                rows[place].context = rows[place].context[-max(1, seq_len // 2) :]
            cache.replace(full, self._read([rows[place] for place in full], capacity=seq_len // 2))

    def _read(self, rows: list[_Row], *, capacity: int) -> KeyValueCache:
        """A cache that holds the contexts of the rows but for their last tokens."""
        memory = None if self.memory is None else self.memory.rows([row.number for row in rows])
        return read_into_cache(self.model, [row.context for row in rows], capacity=capacity, memory=memory)

    def _to_penalise(self, context: list[int]) -> Tensor:
        repeated_V = torch.zeros(self.model.vocab_size, dtype=torch.bool)
        repeated_V[list(set(context) - self.stop_ids)] = True
        return repeated_V

    def _tensor(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.device)
