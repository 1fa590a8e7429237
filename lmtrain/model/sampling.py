"""How the next token is chosen from its logits. The settings can be checked without importing torch.

Not here: the model and the loop over tokens, which are in `generation.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmtrain.config.schema.rules import require
from lmtrain.errors import RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST_TEMPERATURE = 1e-6
"""Below it, fp32 cannot divide logits any more; it is as good as 0."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which tokens may come next, and how likely each is. Raises ConfigError for a value out of range.

    The filters act one after the other, each on what the one before has left, in the order of the fields.
    """

    repetition_penalty: float = 1.0  # of tokens read or written before: logits / it if positive, else x it; 1: off
    temperature: float = 0.8  # logits are divided by it; 0: always the likeliest token
    top_k: int | None = 50  # only the k likeliest tokens; None: every one
    top_p: float = 1.0  # only the likeliest tokens that together just reach this probability; 1: off
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest; 0: off

    def __post_init__(self) -> None:
        require(
            0 < self.repetition_penalty < math.inf,
            f"repetition_penalty must be positive, got {self.repetition_penalty}; 1 switches it off",
        )
        require(
            self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf,
            f"temperature must be 0 or from {LEAST_TEMPERATURE:f} up, got {self.temperature}",
        )
        require(
            self.top_k is None or self.top_k >= 1,
            f"top_k must be at least 1, got {self.top_k}; to draw from every token give all, in Python None",
        )
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}; 1 switches it off")
        require(0 <= self.min_p <= 1, f"min_p must lie between 0 and 1, got {self.min_p}; 0 switches it off")


DEFAULT_SAMPLING = Sampling()
GREEDY = Sampling(temperature=0)


def choose_token(
    logits_V: Tensor, sampling: Sampling, generator: torch.Generator, repeated_V: Tensor | None = None
) -> int:
    """Draw a token id as `sampling` says; the likeliest at temperature 0.

    `logits_V` are in fp32 and, with the generator, on the CPU wherever the model is, so that a seed means the same on
    every device. `repeated_V` [V] bool: the tokens to penalise.

    Sources: repetition penalty, Keskar et al., arXiv:1909.05858; top-k, Fan et al., arXiv:1805.04833; top-p, Holtzman
    et al., arXiv:1904.09751; min-p, Nguyen et al., arXiv:2407.01082.

    Raises:
        RunError: a logit is not a number, or infinite.
    """
    if repeated_V is not None:
        penalty = sampling.repetition_penalty
        logits_V = logits_V.where(~repeated_V, (logits_V / penalty).where(logits_V > 0, logits_V * penalty))
    if sampling.temperature == 0:
        token = int(logits_V.argmax())
        _require_finite(logits_V[token])
        return token
    num_tokens = logits_V.numel()
    candidates, ids = logits_V.topk(min(sampling.top_k or num_tokens, num_tokens))
    _require_finite(candidates[0])
    probabilities = ((candidates - candidates[0]) / sampling.temperature).softmax(dim=-1)  # falling
    if sampling.top_p < 1:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # than each token, together
        probabilities = probabilities[: int((likelier < sampling.top_p).sum())]
    if sampling.min_p > 0:
        probabilities = probabilities[: int((probabilities >= sampling.min_p * probabilities[0]).sum())]
    return int(ids[probabilities.multinomial(1, generator=generator)])


def _require_finite(largest: Tensor) -> None:
    """NaN counts as the largest of all numbers here."""
    if not math.isfinite(largest):
        raise RunError(f"the model's largest logit is {float(largest)}: its weights are of no use")
