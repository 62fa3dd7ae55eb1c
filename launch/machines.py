"""The machines of a run: how many processes they have, and whether these share a batch evenly."""

from dataclasses import dataclass

from oat_dist.config import Config
from oat_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which machines a run has, or a job asks for."""

    nodes: int
    """Machines."""
    gpus_per_node: int
    """GPUs of each, one process on each of them; 0 trains on CPUs."""
    processes_per_node: int
    """Processes on each machine."""

    @property
    def processes(self) -> int:
        """Processes over all machines."""
        return self.nodes * self.processes_per_node

    def __str__(self) -> str:
        """As in a message."""
        return f"{self.nodes} nodes x {self.processes_per_node} {'GPUs' if self.gpus_per_node else 'processes'}"


def require_even(config: Config, processes: int, place: str) -> None:
    """Refuse processes that do not share the global batch evenly: some would wait for others at every step.

    Args:
        config: Configuration of the run.
        processes: Of all machines.
        place: What they are, for the message.

    Raises:
        UserError: With the nearest numbers that do.
    """
    size, accumulation = config.optim.batch_size, config.engine.accumulation
    parts = processes * accumulation
    if size % parts == 0:
        return
    dividing = [n for n in range(1, size + 1) if size % (n * accumulation) == 0]
    near = [*[n for n in dividing if n < processes][-1:], *[n for n in dividing if n > processes][:1]]
    some = f"{' and '.join(map(str, near))} processes do, or " if near else ""
    batches = " and ".join(str(n) for n in (size // parts * parts, (size // parts + 1) * parts) if n)
    accumulating = f" x engine.accumulation={accumulation}" if accumulation > 1 else ""
    raise UserError(
        f"optim.batch_size={size}: {place}{accumulating} = {parts} do not divide it; {some}optim.batch_size={batches} "
        "with these"
    )
