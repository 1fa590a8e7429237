"""The targets that a model trained on pairs gives to sources, and how near they come to the references."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from lmtrain.data.records import Pair
from lmtrain.inference.evaluated_text import EvaluatedText
from lmtrain.inference.trained import TrainedModel
from lmtrain.model.sampling import GREEDY

LENGTH_MULTIPLE = 8
"""Sources whose lengths differ by less than so many tokens are translated together."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of a corpus, from 0 to 100, each with what sacrebleu says of how it was computed."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


@dataclass(frozen=True, kw_only=True)
class Translations:
    """What a model made of the pairs of one data set."""

    source: str  # its name in a mixture; else empty
    pairs: Sequence[Pair]  # their targets are the references
    targets: Sequence[str]
    scores: Scores


def translate_text(
    trained: TrainedModel,
    text: EvaluatedText,
    *,
    num_beams: int,
    max_sentences: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Translations]:
    """Translate the first `max_sentences` pairs of each data set, or all, and score them.

    `on_progress` is told the sentences that are done and those that there are. Raises DataError for text that cannot be
    read.
    """
    pairs: dict[str, list[Pair]] = {part.source: [] for part in text.parts}
    for part in text.parts:
        of_source = pairs[part.source]
        of_source += islice(text.pairs(part), None if max_sentences is None else max_sentences - len(of_source))
    number, done = sum(map(len, pairs.values())), 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, number)

    made = []
    for source, some in pairs.items():
        targets = translate(trained, [pair.source for pair in some], num_beams=num_beams, on_done=count)
        scores = score(targets, [pair.target for pair in some])
        made.append(Translations(source=source, pairs=some, targets=targets, scores=scores))
    return made


def translate(
    trained: TrainedModel, sources: Sequence[str], *, num_beams: int, on_done: Callable[[], None] = lambda: None
) -> list[str]:
    """The likeliest target found of each source: greedily, or with several beams. `on_done` is called for each.

    It depends on its source alone: one that does not end is cut at twice the source's length and 50 tokens more, or
    where the context is full. Raises DataError for text that the tokenizer does not know.
    """
    prompts = [trained.encode_prompt(source) for source in sources]
    alike: defaultdict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        alike[-(-len(prompt) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE].append(number)
    targets = [""] * len(sources)
    for length, numbers in sorted(alike.items()):
        found = trained.generate(
            [prompts[number] for number in numbers],
            GREEDY,
            max_new_tokens=_longest_target(trained, length),
            num_beams=num_beams,
            on_text=lambda _, piece: on_done() if piece is None else None,
        )
        for number, target in zip(numbers, found, strict=True):
            targets[number] = target
    return targets


def _longest_target(trained: TrainedModel, source: int) -> int:
    """In tokens, of a source of so many."""
    room = trained.seq_len if trained.reads_from_the_start else trained.seq_len - source + 1
    return max(1, min(2 * source + 50, room))


def score(targets: Sequence[str], references: Sequence[str]) -> Scores:
    """BLEU (Papineni et al., 2002) and chrF (Popović, 2015) with sacrebleu's defaults (Post, arXiv:1804.08771)."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(), CHRF()
    return Scores(
        bleu=bleu.corpus_score(targets, [references]).score,
        chrf=chrf.corpus_score(targets, [references]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
    )
