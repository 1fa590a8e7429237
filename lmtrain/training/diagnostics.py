"""A look inside a step: norms, updates and distributions of the weights, layer by layer; and when a loss spikes.

Watches and changes nothing: a run with diagnostics trains to the same bit as one without. When to look is the
trainer's; drawing is in `tracking/`.
"""

from __future__ import annotations

import logging
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lmtrain.tracking.histograms import Histogram, append_histograms
from lmtrain.training.memory import out_of_memory_recognized

log = logging.getLogger(__name__)

NUM_BINS = 80
EXACT_COUNTS = 2**24
"""`torch.histc` counts in the number format of its input; up to here fp32 counts one by one."""

SPIKE_WINDOW = 32
"""A loss is compared with so many records before it ..."""

MIN_SPIKE_WINDOW = 12
"""... and with no fewer than these."""


class Diagnostics:
    """Watches one optimizer step: hand it to the step, then ask it what it saw.

    A layer is a block (`block_0`, …) or a part of the model outside of the blocks (`embedding`, `norm`, `head`).
    Watching takes memory for a second copy of the weights while the optimizer moves, when activations are gone.
    """

    def __init__(self, model: nn.Module, *, histograms: Path | None = None) -> None:
        """`histograms` is the file that the distributions go to."""
        self._layers = by_layer(model)
        self._parameters: list[Tensor] = [p for layer in self._layers.values() for p in layer]
        self._histograms = histograms
        self._norms: dict[str, list[Tensor]] = {}
        self._before: list[Tensor] | None = None  # the weights, while the optimizer moves

    @torch.no_grad()
    def before_update(self) -> None:
        """The gradient is whole and not clipped yet, the weights are still the old ones."""
        gradients = [[p.grad for p in layer if p.grad is not None] for layer in self._layers.values()]
        self._norms = {
            "grad_norm": [nn.utils.get_total_norm(layer) for layer in gradients],
            "weight_norm": [nn.utils.get_total_norm(layer) for layer in self._layers.values()],
        }
        try:
            with out_of_memory_recognized():
                self._before = [p.clone() for p in self._parameters]
        except torch.OutOfMemoryError:
            self._before = None
            log.warning("diagnostics: no memory for a copy of the weights, so update ratios are left out")

    @torch.no_grad()
    def after_update(self) -> None:
        """The weights are new."""
        if self._before is None:
            return
        torch._foreach_sub_(self._before, self._parameters)
        changes = iter(self._before)
        self._norms["update_ratio"] = [
            nn.utils.get_total_norm([next(changes) for _ in layer]) / weight_norm
            for layer, weight_norm in zip(self._layers.values(), self._norms["weight_norm"], strict=True)
        ]
        self._before = None

    def report(self, step: int) -> dict[str, float]:
        """What was seen, as `diagnostics/grad_norm/block_0` and so on; the distributions go to their file.

        Gradient norms are those before clipping, weight norms those before the update, and an update ratio is the norm
        of the change, weight decay included, over the norm of the weights.
        """
        if self._histograms is not None:
            append_histograms(self._histograms, step, weight_histograms(self._layers))
        names = [f"diagnostics/{kind}/{layer}" for kind in self._norms for layer in self._layers]
        values = torch.stack([norm for norms in self._norms.values() for norm in norms])
        return dict(zip(names, values.tolist(), strict=True))


def by_layer(model: nn.Module) -> dict[str, list[Tensor]]:
    """The parameters by layer, in the order of the model; tied ones count where they come first.

    Blocks, those of an encoder apart, are numbered from 0, with leading zeros, so that names sort.
    """
    named = list(model.named_parameters())
    blocks = [re.match(r"((?:encoder_)?block)s\.(\d+)\.", name) for name, _ in named]
    digits = max((len(block[2]) for block in blocks if block), default=1)
    layers: dict[str, list[Tensor]] = defaultdict(list)
    for (name, parameter), block in zip(named, blocks, strict=True):
        layers[f"{block[1]}_{int(block[2]):0{digits}d}" if block else name.split(".")[0]].append(parameter)
    return dict(layers)


@torch.no_grad()
def weight_histograms(layers: dict[str, list[Tensor]]) -> dict[str, Histogram]:
    """How the matrices of each layer are distributed, and under `gains` all vectors, which are of another size.

    The bins of a histogram reach from the smallest weight to the largest; every weight is counted once.
    """
    groups = {name: [p for p in layer if p.ndim >= 2] for name, layer in layers.items()}
    groups["gains"] = [p for layer in layers.values() for p in layer if p.ndim < 2]
    return {name: _histogram(group) for name, group in groups.items() if group}


def _histogram(parameters: Sequence[Tensor]) -> Histogram:
    ends = torch.stack([torch.stack(torch.aminmax(p)) for p in parameters])
    low, high = ends.min().item(), ends.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5
    pieces = [piece for p in parameters for piece in torch.split(p.flatten(), EXACT_COUNTS)]
    counts = torch.stack([torch.histc(piece, NUM_BINS, min=low, max=high).long() for piece in pieces]).sum(dim=0)
    return Histogram(low, high, counts.tolist())


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss lies far above the latest ones, by a rule that an outlier among these cannot blunt.

    Far is eight standard deviations and 5 % above their median; the deviation is 1.4826 times the median distance
    from the median, as for a normal distribution.
    """
    if len(before) < MIN_SPIKE_WINDOW:
        return False
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
    return loss > median + max(8 * deviation, 0.05 * median)
