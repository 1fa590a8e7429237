"""The sample at the end of a run: how the trained model goes on with validation text, or answers its prompts."""

from __future__ import annotations

from lmtrain.data.documents import Documents
from lmtrain.inference.trained import TrainedModel
from lmtrain.model.sampling import GREEDY

BEGINNING_TOKENS = 24  # of validation text
NUM_PROMPTS = 3  # sources or conversations that are answered


def sample(trained: TrainedModel, documents: Documents, *, max_new_tokens: int) -> str:
    """The first tokens of a text and the model's own, drawn with the run's seed; or prompts, each above its answer."""
    if documents.prompts is not None:
        return _answers(trained, documents, max_new_tokens)
    beginning = documents.tokens[:BEGINNING_TOKENS].tolist()
    from lmtrain.model.generation import generate  # torch

    # Ids rather than texts, and no stop: what comes after the end of a document is shown as well.
    new_ids = generate(trained.model, beginning, max_new_tokens=max_new_tokens, seed=trained.config.seed)
    return trained.tokenizer.decode([*beginning, *new_ids])


def _answers(trained: TrainedModel, documents: Documents, max_new_tokens: int) -> str:
    assert documents.prompts is not None
    prompts = [
        documents[number].ids[: int(length)].tolist() or [trained.tokenizer.end_id]
        for number, length in enumerate(documents.prompts[:NUM_PROMPTS])
    ]
    answers = trained.generate(prompts, GREEDY, max_new_tokens=max_new_tokens)
    decode = trained.tokenizer.decode
    return "\n\n".join(f"{decode(prompt)}\n{answer}" for prompt, answer in zip(prompts, answers, strict=True))
