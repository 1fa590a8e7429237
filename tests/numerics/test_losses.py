"""The training loss by hand, against PyTorch's own, and where targets do not count."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lmtrain.data.batches import IGNORED
from lmtrain.training.losses import TrainingLoss, sum_loss

LOG = math.log


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 6, 11, generator=generator)
    targets = torch.randint(11, (4, 6), generator=generator)
    targets[1, 2:] = IGNORED
    targets[3] = IGNORED
    return logits.requires_grad_(), targets


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (TrainingLoss(), LOG(4 / 3) + LOG(4)),
        # a third of each target is spread over both tokens: 5/6 of the target and 1/6 of the other remain
        (
            TrainingLoss(label_smoothing=1 / 3),
            5 / 6 * LOG(4 / 3) + 1 / 6 * LOG(4) + 5 / 6 * LOG(4) + 1 / 6 * LOG(4 / 3),
        ),
        (TrainingLoss(z_loss=0.1), LOG(4 / 3) + LOG(4) + 0.1 * (LOG(4) ** 2 + LOG(8) ** 2)),
    ],
)
def test_two_targets_by_hand(loss: TrainingLoss, expected: float) -> None:
    """Weights 3 and 1, then 2 and 6, hence probabilities 3/4 and 1/4 of the targets and denominators 4 and 8."""
    logits = torch.tensor([[[3.0, 1.0], [2.0, 6.0], [5.0, 5.0]]]).log()
    objective, cross_entropy = loss(logits, torch.tensor([[0, 0, IGNORED]]))
    assert objective.item() == pytest.approx(expected, rel=1e-6)
    assert cross_entropy.item() == pytest.approx(LOG(4 / 3) + LOG(4), rel=1e-6)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-2), (0.0, 0.0)])
def test_value_and_gradient_are_those_of_the_textbook(label_smoothing: float, z_loss: float) -> None:
    logits, targets = example()
    objective, cross_entropy = TrainingLoss(label_smoothing=label_smoothing, z_loss=z_loss)(logits, targets)
    kept, kept_targets = logits[targets != IGNORED], targets[targets != IGNORED]
    textbook = F.cross_entropy(kept, kept_targets, label_smoothing=label_smoothing, reduction="sum")
    textbook = textbook + z_loss * kept.exp().sum(-1).log().square().sum()
    assert objective.item() == pytest.approx(textbook.item(), rel=1e-6)
    assert cross_entropy.item() == pytest.approx(sum_loss(logits, targets).item(), rel=1e-6)
    assert not cross_entropy.requires_grad
    (ours,) = torch.autograd.grad(objective, logits)
    (theirs,) = torch.autograd.grad(textbook, logits)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours[targets == IGNORED] == 0).all()


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits, targets = example()
    half = logits.detach().bfloat16()
    loss = TrainingLoss(label_smoothing=0.1, z_loss=1e-2)
    assert loss(half, targets)[0].dtype == torch.float32
    assert loss(half, targets)[0].item() == loss(half.float(), targets)[0].item()
