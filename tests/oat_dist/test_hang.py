"""A rank that stands still is named, whether its thread lives or not; one that is busy elsewhere is left alone."""

import dataclasses
import pathlib
import time

import pytest
import torch.distributed as dist

from oat_dist.distributed import World
from oat_dist.hang import HangWatch, Sign, standing_still
from tests.ranks import run_ranks

LIMIT_S = 1.0


def sign(count, place="backward or update of step 7") -> Sign:
    return Sign(beat=1, count=count, place=place, host="node", process=42)


@pytest.mark.parametrize(
    ("counts", "silent_s", "still_s", "expected"),
    [([9, 8, 9], [0, 0, 0], [30, 31, 30], "rank 1 (node, process 42): no progress for 30 s in backward or update of "
      "step 7; the others wait"),
     ([8, 8], [0, 0], [30, 31], "rank 0 (node, process 42), rank 1 (node, process 42): no progress for 30 s in "
      "backward or update of step 7; all ranks"),
     ([9, 8], [1, 40], [40, 40], "rank 1 (node, process 42): no sign of life for 30 s; stopped, or the "
      "machine is gone"),
     ([9, 8], [0, 0], [5, 40], ""),
     ([-1, 8], [0, 0], [40, 40], "")],
    ids=["one is late", "all stand", "a thread is silent", "one still moves", "one is outside training"],
)  # fmt: skip
def test_the_verdict_names_those_that_the_others_wait_for(counts, silent_s, still_s, expected):
    assert standing_still([sign(count) for count in counts], silent_s, still_s, 30) == expected


def stand_still(world, folder):
    """Rank 1 stops in the third step, then its thread does, then it works on outside training; what rank 0 is told."""
    told = {}
    for how in ("late", "silent", "elsewhere"):
        dist.barrier()
        told[how] = []
        there = dataclasses.replace(world, new_store=lambda how=how: dist.FileStore(str(pathlib.Path(folder, how)), 2))
        with HangWatch(there, LIMIT_S, told[how].append) as watch:
            for step in range(3):
                dist.barrier()
                watch.note(f"step {step}")
            if how == "elsewhere":
                with watch.paused():
                    time.sleep(1.5 * LIMIT_S)
                continue
            if world.rank == 1 and how == "silent":
                watch._ended.set()
            elif world.rank == 0:
                watch.note("waiting")  # the place where it meets the others
            time.sleep(2 * LIMIT_S)
    return told


@pytest.mark.dist
def test_the_main_rank_names_the_rank_that_stands_still_and_none_that_works_on(tmp_path):
    told, _ = run_ranks(stand_still, 2, str(tmp_path))
    assert [m.partition(": ")[2] for m in told["late"]] == ["no progress for 1 s in step 2; the others wait"]
    assert [m.partition(": ")[2] for m in told["silent"]] == [
        "no sign of life for 1 s; stopped, or the machine is gone"
    ]
    assert all(message.startswith("rank 1 (") for message in told["late"] + told["silent"])
    assert told["elsewhere"] == []


def test_a_rank_alone_is_not_watched():
    with HangWatch(World(), 0.01) as watch:
        watch.note("anything")
        assert watch._thread is None
