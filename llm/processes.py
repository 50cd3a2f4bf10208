"""Data parallelism: every process has a share of the prompts; gradients are added up.

Processes that are seeded alike draw the same prompts and the same random numbers, and each keeps its own part of both.
So two of them do what one does with all the prompts, up to the order of sums. Each holds all parameters or, where FSDP
is asked for, a part of every one: `nlhf.llm.shards`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nlhf.llm.decode import uniform


def join() -> None:
    """Join the other processes if `accelerate launch` or `torchrun` has started this one among several.

    Raises ValueError for DeepSpeed, and for parameters that FSDP would keep in main memory.
    """
    for name in ("ACCELERATE_USE_DEEPSPEED", "FSDP_OFFLOAD_PARAMS"):
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise ValueError(f"{name} must not be set: use MULTI_GPU, or FSDP without offloading")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # it would tell transformers that the first process hands its weights to the others, which it does not
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own(count: int) -> slice:
    """Which of `count` things are this process's.

    Raises ValueError unless all processes get as many.
    """
    rank, size = place()
    if count % size:
        raise ValueError(f"prompts must be a multiple of the {size} processes, got {count}")
    return slice(rank * count // size, (rank + 1) * count // size)


def own_uniform(rows: int, generator: torch.Generator) -> Tensor:
    """(rows,) random numbers in [0, 1), float64: this process's of those that are drawn for all."""
    rank, size = place()
    return uniform(rows * size, generator)[rank * rows : (rank + 1) * rows]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, all in one message."""
    if place()[1] == 1:
        return
    tensors = list(tensors)
    at = tensors[-1].device
    message = torch.cat([t.detach().flatten().double().to(at) for t in tensors])
    dist.all_reduce(message)
    for t, total in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view(t.shape))
