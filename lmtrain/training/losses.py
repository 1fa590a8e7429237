"""What training minimises and what evaluation measures: cross-entropy, and terms that only training adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmtrain.data.batches import IGNORED


def sum_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy summed over the targets that count, in nats, in fp32."""
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def losses_of_targets(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every target, (B, T) fp32 in nats; 0 where it does not count."""
    losses_N = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses_N.view_as(targets_BT)


@dataclass(frozen=True, kw_only=True)
class TrainingLoss:
    """Cross-entropy, with label smoothing and a z-loss if they are not 0.

    Label smoothing (arXiv:1512.00567) spreads that share of each target evenly over the vocabulary. The z-loss
    (arXiv:2204.02311) adds that weight times the squared log of the softmax's denominator, which keeps logits small.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    positions: int | None = None  # most of those whose logits are in memory at a time; None: all

    def of_hidden(
        self, targets_BT: Tensor, x_BTD: Tensor, logits_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same as of all logits together, from what they are made of, a chunk of positions after the other.

        The backward pass makes the logits of a chunk again, which costs half as much again as the products with the
        head do without.
        """
        assert self.positions is not None
        sums: list[tuple[Tensor, Tensor]] = []
        chunks = (torch.split(tensor, self.positions) for tensor in (x_BTD.flatten(0, 1), targets_BT.flatten()))
        for x_ND, targets_N in zip(*chunks, strict=True):
            sums.append(
                checkpoint(
                    lambda x_1ND, targets_1N: self(logits_of(x_1ND), targets_1N),
                    x_ND.unsqueeze(0),
                    targets_N.unsqueeze(0),
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing is drawn
                )
            )
        objectives, cross_entropies = zip(*sums, strict=True)
        return torch.stack(objectives).sum(), torch.stack(cross_entropies).sum()

    def __call__(self, logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What to minimise and, detached, the plain cross-entropy: each summed over the targets that count."""
        if self.label_smoothing == 0 and self.z_loss == 0:
            loss = sum_loss(logits_BTV, targets_BT)
            return loss, loss.detach()
        logits_NV, targets_N = logits_BTV.flatten(0, 1).float(), targets_BT.flatten()
        counted_N = targets_N != IGNORED
        log_denominator_N = torch.logsumexp(logits_NV, dim=-1)
        target_logit_N = logits_NV.gather(1, targets_N.clamp_min(0).unsqueeze(1)).squeeze(1)
        # The smoothed target's logit: the mean over the vocabulary is that of an even spread.
        smoothed_N = torch.lerp(target_logit_N, logits_NV.mean(dim=-1), self.label_smoothing)
        objective_N = log_denominator_N - smoothed_N + self.z_loss * log_denominator_N.square()
        cross_entropy_N = (log_denominator_N - target_logit_N).detach()
        return torch.where(counted_N, objective_N, 0.0).sum(), torch.where(counted_N, cross_entropy_N, 0.0).sum()
