"""Beam search: the continuation that is likeliest as a whole, where choosing token by token may miss it.

Not here: drawing tokens, and the loop over tokens of texts that do not depend on each other (`generation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmtrain.config.schema.rules import require
from lmtrain.errors import RunError
from lmtrain.model.building import Model
from lmtrain.model.cache import KeyValueCache
from lmtrain.model.generation import encode, read_into_cache, require_ids

MAX_BEAMS = 1000
"""More find nothing better, and take memory and time without a word."""


@torch.inference_mode()
def beam_search(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    length_penalty: float = 1.0,
    sources: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """The likeliest continuation found of each prompt, without the stop id that ended it.

    Of each prompt `num_beams` continuations are followed at a time, until so many have ended. One is worth its
    log-probability divided by its length, the stop id included, to the power of `length_penalty` (1: the mean of its
    tokens; 0: short ones win). One beam is greedy decoding. Of a prompt only the last tokens are seen, so that there is
    room for the new ones. `sources` are for an `EncoderDecoder`, as in `generate_batch`.

    Raises:
        ConfigError: a prompt or source cannot be read, or a number is out of range.
        RunError: the model's logits are not finite.
    """
    require(1 <= num_beams <= MAX_BEAMS, f"the number of beams must lie between 1 and {MAX_BEAMS:,}, got {num_beams:,}")
    require(max_new_tokens >= 0, f"max_new_tokens must not be negative, got {max_new_tokens}")
    require(math.isfinite(length_penalty), f"length_penalty must be finite, got {length_penalty}")
    require_ids(model, [*prompts, *(sources or ())])
    num_new = min(max_new_tokens, model.seq_len)
    if not prompts or num_new == 0:
        return [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        contexts = [list(prompt)[-max(1, model.seq_len - num_new + 1) :] for prompt in prompts]
        longest = max(map(len, contexts))
        cache = read_into_cache(model, contexts, capacity=longest + num_new - 1, memory=encode(model, sources))
        cache.keep([number for number in range(len(prompts)) for _ in range(num_beams)])
        searches = [_Search(num_beams, length_penalty, last=context[-1]) for context in contexts]
        _run(model, searches, cache, num_new, sorted(stop_ids))
        return [search.best for search in searches]
    finally:
        model.train(was_training)


@dataclass(eq=False)
class _Search:
    """The continuations of one prompt: always as many live ones as beams, at first equal but for their scores."""

    num_beams: int
    length_penalty: float
    last: int  # token of the prompt
    live: list[list[int]] = field(init=False)
    scores: list[float] = field(init=False)  # log-probabilities of the live ones
    finished: list[tuple[float, list[int]]] = field(default_factory=list)  # value and tokens

    def __post_init__(self) -> None:
        self.live = [[] for _ in range(self.num_beams)]
        self.scores = [0.0, *[-math.inf] * (self.num_beams - 1)]

    @property
    def best(self) -> list[int]:
        return max(self.finished, key=lambda one: one[0])[1]

    @property
    def last_tokens(self) -> list[int]:
        return [tokens[-1] if tokens else self.last for tokens in self.live]

    def extend(self, candidates: Iterable[tuple[float, int, int]], stops: Collection[int]) -> list[int]:
        """Go on with the best of these (score, beam, next token), which come best first; the beams that live on."""
        live: list[list[int]] = []
        scores: list[float] = []
        chosen: list[int] = []
        for rank, (score, beam, token) in enumerate(candidates):
            if token in stops:
                if rank < self.num_beams:
                    self._finish(score, self.live[beam], ended=True)
            elif len(live) < self.num_beams:
                live.append([*self.live[beam], token])
                scores.append(score)
                chosen.append(beam)
        self.live, self.scores = live, scores
        return chosen

    @property
    def is_done(self) -> bool:
        return len(self.finished) >= self.num_beams

    def give_up(self) -> None:
        """Take the live ones as they are."""
        for score, tokens in zip(self.scores, self.live, strict=True):
            self._finish(score, tokens, ended=False)

    def _finish(self, score: float, tokens: list[int], *, ended: bool) -> None:
        self.finished.append((score / (len(tokens) + ended) ** self.length_penalty, tokens))


def _run(
    model: Model, searches: list[_Search], cache: KeyValueCache, max_new_tokens: int, stops: Sequence[int]
) -> None:
    """Give every search its finished continuations. The cache has `num_beams` rows for each, in their order."""
    num_beams = searches[0].num_beams
    for step in range(max_new_tokens):
        tokens = [[token] for search in searches for token in search.last_tokens]
        logits_RV = model(torch.tensor(tokens, device=model.device), cache)[:, -1].float()
        before_R1 = torch.tensor([score for search in searches for score in search.scores], device=model.device)
        scores_RV = logits_RV.log_softmax(dim=-1) + before_R1.unsqueeze(1)
        # So many that enough are left when every beam could end in every way.
        candidates = min(num_beams * (1 + len(stops)), num_beams * model.vocab_size)
        best, places = scores_RV.view(len(searches), -1).topk(candidates)
        _require_finite(best)
        going_on, rows = [], []
        for number, (search, values, flat) in enumerate(zip(searches, best.tolist(), places.tolist(), strict=True)):
            following = (divmod(place, model.vocab_size) for place in flat)
            chosen = search.extend(((value, *one) for value, one in zip(values, following, strict=True)), stops)
            if search.is_done:
                continue
            if step == max_new_tokens - 1:
                search.give_up()
                continue
            going_on.append(search)
            rows += [number * num_beams + beam for beam in chosen]
        if not going_on:
            return
        searches = going_on
        cache.keep(rows)


def _require_finite(best: Tensor) -> None:
    if not best[:, 0].isfinite().all():
        raise RunError("the model's logits are not finite: its weights are of no use")
