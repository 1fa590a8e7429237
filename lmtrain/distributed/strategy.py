"""How a model is divided among the processes of a team, so that the gradient is that of the whole batch.

Each process sums the losses of its share of a batch, already divided by the targets of the whole, so gradients are
added up, not averaged.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmtrain.distributed.team import Team


class Dividable(Protocol):
    """A model made of blocks."""

    def all_blocks(self) -> Iterable[nn.Module]: ...


PassBy = Callable[[bool], AbstractContextManager[object]]
"""`with pass_by(last)` around forward and backward of a microbatch: gradients are exchanged in the last one."""


def passing_alone(last: bool) -> AbstractContextManager[object]:
    """Nothing is exchanged."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class DividedModel:
    """A model as a process of a team calls it."""

    forward: Callable[..., Tensor]
    pass_by: PassBy = passing_alone


def whole(model: Callable[..., Tensor]) -> DividedModel:
    """A model that is not divided."""
    return DividedModel(model)


def replicate(model: nn.Module, team: Team, device: torch.device) -> DividedModel:
    """The whole model in every process (`DistributedDataParallel`), which begins with the leader's weights."""
    if not team.has_others:
        return whole(model)
    with warnings.catch_warnings():  # from 2.13 on, the setting has another name
        warnings.simplefilter("ignore", FutureWarning)
        replica = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    replica.register_comm_hook(None, lambda state, bucket: _add_up(bucket))
    return DividedModel(replica, lambda last: contextlib.nullcontext() if last else replica.no_sync())


def _add_up(bucket: Any) -> torch.futures.Future[Tensor]:
    """What `DistributedDataParallel` does with gradients, without its division by the number of processes."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return cast("torch.futures.Future[Tensor]", work.get_future().then(lambda done: done.value()[0]))


def shard(
    model: nn.Module,
    team: Team,
    device: torch.device,
    *,
    format: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> DividedModel:
    """A part of weights, gradients and optimizer state in every process (`fully_shard`, FSDP2).

    Weights are gathered block by block, in the number format of the forward pass; gradients are added up in fp32.
    The model becomes its own sharded self: its parameters are DTensors from now on.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (team.size,)),
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    # Autocast decides the formats, as in one process: the stream between blocks stays in fp32, and so does what it is
    # read from and into. Only what is gathered for products in 16 bits is rounded before, not after, it has travelled.
    gathered = MixedPrecisionPolicy(
        param_dtype=None if format == torch.float32 else format, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in cast("Dividable", model).all_blocks():
        fully_shard(block, mp_policy=gathered, **settings)
        if hasattr(block, "source"):  # of a decoder's block with a memory: called before its forward pass
            register_fsdp_forward_method(block, "source")
    sharded = fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    @contextlib.contextmanager
    def pass_by(last: bool) -> Any:
        sharded.set_requires_gradient_sync(last)
        sharded.set_is_last_backward(last)
        yield

    return DividedModel(model, pass_by)
