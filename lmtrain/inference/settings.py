"""How texts are asked for: the options of `lmtrain generate`, which are the params of a served model too.

How they act is `model/sampling.py`'s and `model/beam_search.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmtrain.config.schema.rules import require
from lmtrain.model.sampling import DEFAULT_SAMPLING, Sampling

if TYPE_CHECKING:
    from lmtrain.inference.trained import OnText, TrainedModel

DEFAULT_BEAMS = 4
"""Of models trained on pairs."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How texts are made, and how many. Raises ConfigError for a value out of range."""

    repetition_penalty: float = DEFAULT_SAMPLING.repetition_penalty
    temperature: float | None = None  # None: that of Sampling; where a number of beams is asked for, 0
    top_k: int | None = DEFAULT_SAMPLING.top_k  # None: every token
    top_p: float = DEFAULT_SAMPLING.top_p
    min_p: float = DEFAULT_SAMPLING.min_p
    beams: int | None = None  # None: 1; of a model trained on pairs that is to draw nothing, DEFAULT_BEAMS
    length_penalty: float = 1.0  # with beams
    max_new_tokens: int = 200
    stop: Sequence[str] = ()  # a text ends before any of these
    seed: int = 0
    num_samples: int = 1  # texts a prompt, with seeds from `seed` on
    strict: bool = False  # refuse a prompt that is longer than the context, rather than read a part of it

    def __post_init__(self) -> None:
        _ = self.sampling  # checks its own values
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        require(self.num_samples >= 1, f"num_samples must be at least 1, got {self.num_samples}")
        last = 2**63 - self.num_samples
        require(0 <= self.seed <= last, f"seed must lie between 0 and {last}, got {self.seed}")
        require("" not in self.stop, "stop must not be empty: every text would end before it begins")
        require(self.beams is None or self.beams >= 1, f"beams must be at least 1, got {self.beams}")
        require(
            self.beams in (None, 1) or (not self.temperature and self.num_samples == 1),
            "with beams the likeliest text is found and nothing is drawn: leave temperature and num_samples out",
        )

    @property
    def sampling(self) -> Sampling:
        """How a token is chosen. A number of beams alone asks for what is likely: one beam is greedy."""
        values: dict[str, Any] = {name: getattr(self, name) for name in vars(DEFAULT_SAMPLING)}
        if self.temperature is None:
            values["temperature"] = DEFAULT_SAMPLING.temperature if self.beams is None else 0.0
        return Sampling(**values)

    def num_beams(self, trained: TrainedModel) -> int:
        """How many beams this means for a model."""
        if self.beams is not None:
            return self.beams
        searching = trained.reads_sources and self.temperature is None and self.num_samples == 1
        return DEFAULT_BEAMS if searching else 1


def fit_prompts(trained: TrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[str]:
    """What to tell of prompts that are longer than the context. Raises ConfigError if `settings` are strict."""
    notices = []
    for number, prompt_ids in enumerate(prompts, start=1):
        name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if settings.strict:
            trained.require_room(prompt_ids, name)
        elif len(prompt_ids) > trained.seq_len:
            part = "first" if trained.reads_from_the_start else "last"
            notices.append(
                f"{name} has {len(prompt_ids):,} tokens: only the {part} {trained.seq_len:,}, the context, are read"
            )
    return notices


def continue_prompts(
    trained: TrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings, on_text: OnText | None = None
) -> list[str]:
    """The texts that follow prompts, `num_samples` of the first, then of the next; see `TrainedModel.generate`."""
    samples = range(settings.num_samples)
    return trained.generate(
        [prompt_ids for prompt_ids in prompts for _ in samples],
        settings.sampling,
        max_new_tokens=settings.max_new_tokens,
        seeds=[settings.seed + sample for _ in prompts for sample in samples],
        stops=settings.stop,
        on_text=on_text,
        num_beams=settings.num_beams(trained),
        length_penalty=settings.length_penalty,
    )
