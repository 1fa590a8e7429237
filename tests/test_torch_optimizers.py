"""PyTorch's optimizers as they are, but for the import of its compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from lmtrain.training import torch_optimizers

SETTINGS: dict[str, dict[str, Any]] = {
    "Adam": {"fused": True},
    "AdamW": {"fused": True, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True, "fused": True},
}

SEPARATE_PROCESS = """
import sys, torch
from lmtrain.config.schema import AdamWConfig, LionConfig, MuonConfig, SGDConfig, AdafactorConfig, AdamConfig
from lmtrain.training.optimizers import build_optimizers
for config in (AdamWConfig(), AdamConfig(), SGDConfig(), LionConfig(), MuonConfig(), AdafactorConfig()):
    inside, outside = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    for optimizer in build_optimizers(config, [inside, outside], [inside], 0.1):
        inside.grad, outside.grad = torch.ones(4, 4), torch.ones(4, 4)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    assert not any(torch.equal(matrix, torch.ones(4, 4)) for matrix in (inside, outside))
print([name for name in sys.modules if name.startswith("torch._dynamo")])
"""


@pytest.mark.parametrize("name", SETTINGS)
def test_they_do_what_those_of_pytorch_do(name: str) -> None:
    weights = []
    for module in (torch.optim, torch_optimizers):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5, 3))
        optimizer = getattr(module, name)([weight], lr=0.1, **SETTINGS[name])
        for _ in range(3):
            weight.grad = torch.randn(5, 3)
            optimizer.step()
        weights.append((weight, optimizer.state_dict()["state"]))
        assert not any(value.requires_grad for value in optimizer.state[weight].values())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_no_optimizer_imports_the_compiler() -> None:
    ended = subprocess.run([sys.executable, "-c", SEPARATE_PROCESS], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "[]"), ended.stderr
