"""Text generation, in token ids: sampling from a trained model with a cache of keys and values.

Not here: turning text into ids and back, which is the tokenizer's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.errors import UsageError
from lmtrain.model.decoder import Decoder


def generate(
    model: Decoder,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[int]:
    """Continue the prompt and return the new ids only, `stop_id` (which ends the text) not among them.

    Temperature 0 takes the likeliest token; otherwise one of the `top_k` likeliest (None: of all) is drawn.
    The seed decides the text: PyTorch's global random state is neither read nor moved. Only the last seq_len
    tokens of a longer prompt are seen. When the context is full, its last half is read again into an empty
    cache and the text goes on from there, so a long text costs about two passes over each of its tokens.

    Raises:
        UsageError: the prompt is empty, or temperature or top_k is out of range.
    """
    _check_request(prompt_ids, temperature, top_k)
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        return _continue(model, prompt_ids, max_new_tokens, temperature, top_k, generator, stop_id)
    finally:
        model.train(was_training)


def _check_request(prompt_ids: list[int], temperature: float, top_k: int | None) -> None:
    if not prompt_ids:
        raise UsageError("the prompt must hold at least one token, got an empty one")
    if temperature < 0:
        raise UsageError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k must be at least 1, got {top_k}; leave it out to draw from every token")


@torch.inference_mode()
def _continue(
    model: Decoder,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    stop_id: int | None,
) -> list[int]:
    device = model.embedding.weight.device
    context = list(prompt_ids[-model.seq_len :])  # what the next token is predicted from
    unread, cache = context, model.new_cache()
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        logits_V = model(torch.tensor([unread], device=device), cache)[0, -1]
        token = choose_token(logits_V, temperature, top_k, generator)
        if token == stop_id:
            break
        new_ids.append(token)
        context.append(token)
        unread = [token]
        if len(context) > model.seq_len:
            context = context[-max(1, model.seq_len // 2) :]
            unread, cache = context, model.new_cache()
    return new_ids


def choose_token(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Draw a token id from softmax(logits / temperature) over the top_k largest; the largest at 0.

    Drawn on the CPU in fp32 wherever the model is, so that a seed means the same on every device.
    """
    logits_V = logits_V.float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    candidates, ids = logits_V.topk(min(top_k or logits_V.numel(), logits_V.numel()))
    probabilities = ((candidates - candidates[0]) / temperature).softmax(dim=-1)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
