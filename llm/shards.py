"""Parameters in shards, as `accelerate launch --use_fsdp` asks: every process holds some rows of each, as a DTensor.

What is elementwise (optimisers, lerp) works on shards. Whoever needs a parameter whole gathers it, at the same moment
as all other processes; the gradient goes back as the rows of the sum over the processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_shared: dict[int, tuple[Tensor, Tensor]] | None = None


def shard(network: nn.Module, device: str = "cpu") -> None:
    """If FSDP is asked for, leave this process its rows of every parameter, on a device; tied ones stay tied."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if not (asked and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    done: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in done:
                own = distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None)
                done[id(p)] = p, nn.Parameter(own, p.requires_grad)
            setattr(module, name, done[id(p)][1])


def is_sharded(p: Any) -> bool:
    """Whether this process holds a part of it only."""
    return hasattr(p, "full_tensor")


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole value as another is: of its type, on its device, and sharded if it is."""
    value = value.to(device=other.device, dtype=other.dtype)
    if not is_sharded(other):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


def full(p: Tensor) -> Tensor:
    """The whole of it, in which all processes take part; their gradients are added up on the way back."""
    sharded: Any = p
    if not is_sharded(p):
        return p
    from torch.distributed.tensor import Partial

    if _shared is None:
        return sharded.full_tensor(grad_placements=[Partial()])
    if id(p) not in _shared:
        _shared[id(p)] = p, sharded.full_tensor()  # the shard is kept, lest another be given its id
    return _shared[id(p)][1]


@contextmanager
def gathered_once() -> Iterator[None]:
    """Within, without gradients, what several policies share is gathered once for all of them."""
    global _shared
    _shared = {}
    try:
        yield
    finally:
        _shared = None


class Gathered(Mapping[str, Tensor]):
    """Parameters by name, each gathered when it is read, and held by the reader alone."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params

    def __getitem__(self, name: str) -> Tensor:
        return full(self.params[name])

    def __contains__(self, name: object) -> bool:
        return name in self.params

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)
