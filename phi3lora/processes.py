"""The processes of a job, as torchrun starts them and torch.distributed joins them."""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import torch
import torch.distributed as dist

from .errors import TrainingError


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and the number of processes: torch.distributed's, else those that torchrun gives.

    Nothing is exchanged.

    Raises:
        TrainingError: ``WORLD_SIZE`` says that there are several processes, and other variables are missing or wrong.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    size = os.environ.get("WORLD_SIZE", "")
    if not size.isdecimal() or int(size) <= 1:
        return 0, 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE={size}, but {', '.join(missing)} is not set; allowed: all that torchrun sets. Start "
            f"several processes with torchrun --nproc-per-node {size}, or one with WORLD_SIZE=1"
        )
    for name, end in (("RANK", int(size)), ("MASTER_PORT", 2**16)):
        value = os.environ[name]
        if not (value.isdecimal() and int(value) < end):
            raise TrainingError(f"{name}={value!r}, but WORLD_SIZE={size}; allowed: 0 to {end - 1} (torchrun sets it)")
    return int(os.environ["RANK"]), int(size)


def join(device: torch.device) -> bool:
    """Let the processes find each other, if they have not yet; return whether they have by this call.

    Host values go through gloo. Tensors on a GPU go through NCCL, with ``device`` as the process's own.
    """
    rank, size = rank_and_size()
    if device.type == "cuda" and size > 1:
        torch.cuda.set_device(device)
    if size == 1 or dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_new_store(), rank=rank, world_size=size)
    return True


_JOINED = itertools.count()


def _new_store() -> Any:
    """Return a store in which nothing is written yet.

    torchrun keeps one store for all restarts of a job, and gloo would read the addresses of the processes before.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"phi3lora/{attempt}/{next(_JOINED)}"
    return dist.PrefixStore(prefix, _store_of_the_job())  # type: ignore[attr-defined]


@functools.cache
def _store_of_the_job() -> Any:
    store, _, _ = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
    return store
