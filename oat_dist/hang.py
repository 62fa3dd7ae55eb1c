"""A rank that stands still is named, and the run ends, instead of all others waiting for it without a word.

Every rank tells the store of the process group, from a thread, how far it is. The main rank watches all, rank 1 the
main rank. A rank whose thread falls silent is stopped, or its machine is gone. If all threads go on and no rank has
moved for the time limit, those that are least far are what the others wait for.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from oat_dist.distributed import World

_PAUSED = -1
_MOST_INTERVAL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a rank says of itself."""

    beat: int
    """Counts the signs."""
    count: int
    """Places passed, equal on all ranks at the same place; -1 outside training steps."""
    place: str
    """What it does since the last one, in words."""
    host: str
    """Name of its machine."""
    process: int
    """Its process there."""


def standing_still(signs: Sequence[Sign], silent_s: Sequence[float], still_s: Sequence[float], limit_s: float) -> str:
    """Which ranks have stood still for too long, in one line; empty when none has.

    Args:
        signs: Last sign of every rank.
        silent_s: Seconds since its last sign, of each.
        still_s: Seconds since it last moved, of each.
        limit_s: Time limit.
    """
    silent = [rank for rank, seconds in enumerate(silent_s) if seconds >= limit_s]
    if silent:
        return f"{_names(silent, signs)}: no sign of life for {limit_s:g} s; stopped, or the machine is gone"
    if min(still_s) < limit_s or any(sign.count == _PAUSED for sign in signs):
        return ""
    last = min(sign.count for sign in signs)
    late = [rank for rank, sign in enumerate(signs) if sign.count == last]
    rest = "all ranks" if len(late) == len(signs) else "the others wait"
    return f"{_names(late, signs)}: no progress for {limit_s:g} s in {signs[late[0]].place}; {rest}"


def _names(ranks: Sequence[int], signs: Sequence[Sign]) -> str:
    return ", ".join(f"rank {rank} ({signs[rank].host}, process {signs[rank].process})" for rank in ranks)


def _leave(message: str) -> None:
    """End this process at once: its main thread waits in a collective for ever. The launcher ends the others."""
    print(f"error: engine.hang_timeout_s: {message}; the same command goes on", file=sys.stderr, flush=True)
    os._exit(1)


class HangWatch:
    """Tells how far this rank is and, on the first two ranks, watches the others; a context manager."""

    def __init__(self, world: World, limit_s: float, on_hang: Callable[[str], None] = _leave) -> None:
        """Not watching yet.

        Args:
            world: The ranks; without a `new_store` nothing is watched.
            limit_s: Time limit; 0 watches nothing.
            on_hang: Called from the thread with what is wrong.
        """
        self.world, self.limit_s, self._on_hang = world, limit_s, on_hang
        self._count, self._place, self._beat = _PAUSED, "the start", 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, place: str) -> None:
        """Say that this rank goes on.

        Args:
            place: What it does next.
        """
        self._count, self._place = self._count + 1, place

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ranks may take any time while the block runs, as long as they live."""
        count, self._count = self._count, _PAUSED
        try:
            yield
        finally:
            self._count = count

    def __enter__(self) -> "HangWatch":
        """Start the thread."""
        self._count = 0
        if self.limit_s and self.world.ranks > 1 and self.world.new_store is not None:
            self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self.limit_s)

    def _run(self) -> None:
        interval_s = min(self.limit_s / 5, _MOST_INTERVAL_S)
        rank, host = self.world.rank, socket.gethostname()
        watched = {0: range(self.world.ranks), 1: range(1)}.get(rank, ())
        try:
            store = self.world.new_store()
            store.set_timeout(timedelta(seconds=self.limit_s))
            moved = _Moved(watched)
            while not self._ended.is_set():
                self._beat += 1
                sign = Sign(beat=self._beat, count=self._count, place=self._place, host=host, process=os.getpid())
                store.set(f"hang/{rank}", json.dumps(asdict(sign)))
                signs = {other: Sign(**json.loads(store.get(f"hang/{other}"))) for other in watched}
                problem = moved.problem(signs, self.limit_s)
                if problem and not self._ended.is_set():
                    self._on_hang(problem)
                    return
                self._ended.wait(interval_s)
        except dist.DistStoreError:
            if not self._ended.is_set():
                self._on_hang(f"rank 0: its store does not answer for {self.limit_s:g} s")
        except dist.DistNetworkError:
            return  # the main rank has ended, and whatever waits for it learns of it


class _Moved:
    """When each watched rank last gave a sign and last moved, by the clock of the watcher."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._signs: dict[int, Sign] = {}
        self._last_s = {rank: [time.monotonic(), time.monotonic()] for rank in ranks}

    def problem(self, signs: Mapping[int, Sign], limit_s: float) -> str:
        """As `standing_still`."""
        now = time.monotonic()
        for rank, sign in signs.items():
            before = self._signs.get(rank)
            if before is None or sign.beat != before.beat:
                self._last_s[rank][0] = now
            if before is None or sign.count != before.count:
                self._last_s[rank][1] = now
        self._signs = dict(signs)
        if not signs:
            return ""
        silent_s, still_s = ([now - self._last_s[rank][kind] for rank in signs] for kind in (0, 1))
        # Who watches one rank alone cannot tell whom that one waits for.
        still_s = still_s if len(signs) > 1 else [0.0]
        return standing_still(list(signs.values()), silent_s, still_s, limit_s)
