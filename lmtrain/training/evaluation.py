"""The loss of a model over a split, weighted by tokens, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lmtrain.data.batches import Batch
from lmtrain.training.losses import sum_loss
from lmtrain.training.precision import Precision


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: Precision,
    *,
    bytes_per_token: float,
    forward: Callable[..., Tensor] | None = None,
    micro_batch_size: int | None = None,
) -> dict[str, float]:
    """`val/loss` (nats a token), `val/perplexity` and `val/bits_per_byte` over all batches, without dropout.

    `bytes_per_token` is that of the text evaluated; it makes bits per byte comparable between tokenizers, and leaves
    them out if it is 0, as of ids that stand for no text. At most `micro_batch_size` sequences go through the model at
    a time; None: a whole batch.
    """
    logits_of = model if forward is None else forward  # a compiled model has no truth value
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    num_targets = 0
    for batch in batches:
        for part in batch.split(micro_batch_size or batch.num_sequences):
            part = part.to(precision.device)
            with precision.autocast():
                loss = sum_loss(logits_of(part.inputs, **part.context), part.targets)
            total += loss.cpu().double()
        num_targets += batch.num_targets
    model.train(was_training)
    mean = (total / num_targets).item()
    bits = {"val/bits_per_byte": mean / math.log(2) / bytes_per_token} if bytes_per_token else {}
    return {"val/loss": mean, "val/perplexity": math.exp(min(mean, 700.0)), **bits}
