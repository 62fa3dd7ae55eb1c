"""SIGTERM and SIGUSR1: a batch system takes the machine away, or the time of the job is nearly over.

While training goes on, the signal is noted, and all ranks stop together after the step at hand, with a checkpoint. At
any other time it raises `PreemptedError` at once: there is nothing to save then that is not on disk already.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import torch

from oat_dist.distributed import World
from oat_dist.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Whether this or another rank was told to stop."""

    def __init__(self, world: World) -> None:
        """Nobody was.

        Args:
            world: The ranks, which stop together.
        """
        self.world = world
        self.received: int | None = None
        self._is_deferred = False
        self._before: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler.

        Raises:
            PreemptedError: Outside `deferred`.
        """
        self.received = number
        if not self._is_deferred:
            self._leave()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are only noted while the block runs; the caller asks `agreed`.

        Raises:
            PreemptedError: At the end of the block, for a signal that came too late for `agreed`.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.received is not None:
            self._leave()

    def _leave(self) -> NoReturn:
        raise PreemptedError(f"ended by {signal.Signals(self.received).name}; the same command goes on")

    def agreed(self) -> bool:
        """Whether all ranks stop now; every rank must call, after every step.

        On a GPU the answer is that of one call before, so that the host waits for the step before the one at hand
        alone, and the device always has work.
        """
        if self.world.ranks == 1:
            return self.received is not None
        device = self.world.device
        # Filled there: for a copy from the host, the host would wait.
        flag = self.world.largest(torch.full((), int(self.received is not None), device=device))
        if device.type == "cpu":
            return bool(flag)
        host = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        before, self._before = self._before, (host, done)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])


@contextlib.contextmanager
def stop_signals(world: World, *, ends_process: bool = False) -> Iterator[StopSignals]:
    """Listen while the block runs. Python has signals in the main thread alone; elsewhere nothing is listened to.

    Args:
        world: The ranks, which stop together.
        ends_process: A `PreemptedError` that leaves the block ends the process. From then on signals are ignored: ranks
            do not leave at the same moment, and a launcher that sees the first go sends the others SIGTERM, which
            would give the job the exit code of a kill.
    """
    signals = StopSignals(world)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.note) for number in SIGNALS}
    try:
        yield signals
    except PreemptedError:
        if ends_process:
            before = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
