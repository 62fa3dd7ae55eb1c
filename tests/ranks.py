"""Run a function on several gloo processes and collect what they return."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from oat_dist.distributed import World


def run_ranks(worker: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """`worker(world, *args)` on every rank of a fresh process group, one thread each; results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_entry, (ranks, folder, worker, args), nprocs=ranks)
        return [torch.load(pathlib.Path(folder, f"{r}.pt"), weights_only=False) for r in range(ranks)]


def _entry(rank: int, ranks: int, folder: str, worker: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        result = worker(World(rank=rank, ranks=ranks), *args)
        torch.save(result, pathlib.Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
