"""Tensors of which each process of a team holds a part: taking them apart, and files that all write and read together.

A file is the same safetensors file that one process would write, by torch.distributed.checkpoint: each process writes
its parts, the leader puts them together; each reads only its parts, of however many there were.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lmtrain.distributed.team import Team

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TOGETHER = "model-00001-of-00001.safetensors"
"""How `HuggingFaceStorageWriter` calls the one file that it puts together."""


def is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether each process holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")  # the class takes half a second to import


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process holds a part."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """The part that this process holds; all of a tensor that is not divided."""
    return tensor.to_local() if is_divided(tensor) else tensor


def with_local_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor divided like `tensor`, with this part of it in main memory."""
    if not is_divided(tensor):
        return part
    from torch.distributed.tensor import DTensor

    mesh = tensor.device_mesh if tensor.device_mesh.device_type == "cpu" else _host_mesh(tensor.device_mesh.size())
    return DTensor.from_local(
        part, mesh, tensor.placements, run_check=False, shape=tensor.size(), stride=tensor.stride()
    )


@functools.cache
def _host_mesh(size: int) -> DeviceMesh:
    """All processes by their main memory. A collective when it is called first."""
    return init_device_mesh("cpu", (size,))


class DividedFiles:
    """Files of tensors that are divided among the processes of a team."""

    def __init__(self, team: Team, like: Callable[[str, torch.Size], Tensor | None]) -> None:
        """`like` gives, for a name and a shape, the tensor that one read is to be divided like; None: it is whole.

        A collective: the files are written in a thread, which speaks with the others over a connection of its own.
        """
        self._team = team
        self._like = like
        self._group = dist.new_group(backend="gloo")

    def save(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Write what all processes hold parts of, or what each has whole. Raises CheckpointException."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        dist.barrier(self._group)  # from here on there is the folder that the leader makes
        if not any(map(is_divided, tensors.values())):
            if self._team.leads:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
            return
        parts = path.with_name(f".{path.name}.parts")
        writer = HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
        save(dict(tensors), storage_writer=writer, process_group=self._group)
        if self._team.leads:
            (parts / TOGETHER).rename(path)
            shutil.rmtree(parts)

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read this process's parts."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        tensors: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                shape = torch.Size(file.get_slice(name).get_shape())
                like = self._like(name, shape)
                tensors[name] = file.get_tensor(name) if like is None else torch.empty_like(like)
        divided = {name: tensor for name, tensor in tensors.items() if is_divided(tensor)}
        if divided:
            with warnings.catch_warnings():  # each process reads for itself, which it warns of
                warnings.simplefilter("ignore", UserWarning)
                load(divided, storage_reader=HuggingFaceStorageReader(str(path.parent)), no_dist=True)
        return tensors
