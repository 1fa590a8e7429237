"""The loss of a model over a split, weighted by tokens, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lmtrain.data.batches import Batch
from lmtrain.distributed.team import ALONE, Team
from lmtrain.training.losses import losses_of_targets
from lmtrain.training.precision import Precision


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: Precision,
    *,
    bytes_per_token: float,
    forward: Callable[..., Tensor] | None = None,
    micro_batch_size: int | None = None,
    team: Team = ALONE,
) -> dict[str, float]:
    """`val/loss` (nats a token), `val/perplexity` and `val/bits_per_byte` over all batches, without dropout.

    At most `micro_batch_size` sequences go through the model at a time; None: a whole batch. Each process of the team
    takes its share of every batch.
    """
    logits_of = model if forward is None else forward  # a compiled model has no truth value
    was_training = model.training
    model.eval()
    total, num_targets = 0.0, 0
    for batch in batches:
        part = batch.share(team.rank, team.size)
        total += measure(logits_of, part, precision, micro_batch_size).sum(dtype=torch.float64).item()
        num_targets += batch.num_targets
    model.train(was_training)
    return metrics("val", sum(team.gather(total)), num_targets, bytes_per_token)


@torch.no_grad()
def measure(
    logits_of: Callable[..., Tensor], batch: Batch, precision: Precision, micro_batch_size: int | None = None
) -> Tensor:
    """Nats of every target, (B, T) fp32 in main memory; 0 where a target does not count."""
    parts = []
    for part in batch.split(micro_batch_size or batch.num_sequences):
        part = part.to(precision.device)
        with precision.autocast():
            parts.append(losses_of_targets(logits_of(part.inputs, **part.context), part.targets))
    return torch.cat(parts).cpu()


def metrics(split: str, nats: float, num_targets: int, bytes_per_token: float) -> dict[str, float]:
    """Loss, perplexity and bits per byte of so many nats, by the names that begin with the split's.

    `bytes_per_token` is that of the text evaluated; it makes bits per byte comparable between tokenizers, and leaves
    them out if it is 0, as of ids that stand for no text.
    """
    mean = nats / num_targets
    bits = {f"{split}/bits_per_byte": mean / math.log(2) / bytes_per_token} if bytes_per_token else {}
    return {f"{split}/loss": mean, f"{split}/perplexity": math.exp(min(mean, 700.0)), **bits}
