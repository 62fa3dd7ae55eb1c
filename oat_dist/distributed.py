"""The ranks of a run and the few collectives the library needs beside the gradients'."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all processes of a run; `with world:` leaves the process group at the end."""

    rank: int = 0
    """Number of this process, from 0."""
    ranks: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    new_store: Callable[[], dist.Store] | None = None
    """Makes one more connection to the store of all ranks, where there is one."""
    leave: Callable[[], None] = dist.destroy_process_group
    """Leaves the process group and lets go of it."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the device; every rank must call."""
        values = values.clone()
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def smallest(self, values: Tensor) -> Tensor:
        """The elementwise minimum over ranks of a tensor on the device; every rank must call."""
        values = values.clone()
        if self.ranks > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise maximum over ranks of a tensor on the device; every rank must call."""
        values = values.clone()
        if self.ranks > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on the main rank and give its result, or raise its error, on every rank."""
        if self.ranks == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def average_running_statistics(self, networks: Iterable[nn.Module]) -> None:
        """Make the running statistics of networks equal on all ranks, as their mean, in one collective.

        Ranks see different images, and gradient reduction does not touch buffers.
        """
        if self.ranks == 1:
            return
        statistics = _running_statistics(networks)
        flat = torch.cat([b.flatten() for b in statistics])
        dist.all_reduce(flat)
        _fill(statistics, flat / self.ranks)

    def gather_running_statistics(self, networks: Iterable[nn.Module]) -> Tensor:
        """The running statistics of every rank, [R, F] with R ranks and F statistics; every rank must call."""
        flat = torch.cat([b.flatten() for b in _running_statistics(networks)])
        if self.ranks == 1:
            return flat[None]
        gathered = [torch.empty_like(flat) for _ in range(self.ranks)]
        dist.all_gather(gathered, flat)
        return torch.stack(gathered)

    def set_own_running_statistics(self, networks: Iterable[nn.Module], statistics_RF: Tensor) -> None:
        """Give networks this rank's row of what `gather_running_statistics` gave on as many ranks."""
        _fill(_running_statistics(networks), statistics_RF[self.rank].to(self.device))

    def close(self) -> None:
        """Leave the process group.

        A thread of gloo that drops its last message while Python shuts down aborts the process, whatever its exit code;
        the threads end with the last reference to their group.
        """
        if dist.is_initialized():
            self.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        # gloo's threads abort a process that ends without leaving, whatever its exit code; NCCL would wait for the
        # ranks that did not fail.
        if kind is None or self.device.type == "cpu":
            self.close()
        # DeepSpeed's engine, part of reference cycles, refers to its group. After an error the launcher gives a rank
        # hardly the time to say why it ends.
        if kind is None:
            gc.collect()


def _running_statistics(networks: Iterable[nn.Module]) -> list[Tensor]:
    return [b for net in networks for name, b in net.named_buffers() if "running_" in name]


def _fill(buffers: list[Tensor], flat: Tensor) -> None:
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
