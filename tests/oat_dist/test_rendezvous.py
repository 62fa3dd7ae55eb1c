"""Ranks meet on one address: nothing else of the machine listens, and a taken port is one line."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from oat_dist import rendezvous
from oat_dist.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def listening(process: int) -> set[str]:
    """Addresses on which a process accepts connections, as /proc has them."""
    owned = set()
    for entry in pathlib.Path(f"/proc/{process}/fd").iterdir():
        try:
            owned.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for name in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/{process}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in owned:
                found.add(f"{name} {fields[1].partition(':')[0]}")
    return found


LOOPBACK = {"tcp 0100007F"}

ALONE = """
import os
from oat_dist.engine import init_world
with init_world(1) as world:
    print("ready", flush=True)
    input()
"""


LEAVING = """
import pathlib, torch
from oat_dist.config import Config
from oat_dist.engine import Engine, init_world

def gloo():
    names = (task.joinpath("comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir())
    return [name for name in names if "gloo" in name]

def work(world):
    engine = Engine(torch.nn.Linear(2, 1), Config(), world)
    world.on_main(lambda: None)
    assert gloo()

with init_world(1) as world:
    work(world)
print(gloo(), flush=True)
"""


def start(program: str = ALONE, **env: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **env}
    return subprocess.Popen([sys.executable, "-c", program], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.dist
def test_ranks_of_one_machine_listen_on_the_loopback_address_alone_whatever_the_machine_is_called():
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    ranks = [start(**env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 2
        assert [listening(rank.pid) for rank in ranks] == [LOOPBACK] * 2
    finally:
        for rank in ranks:
            rank.communicate("\n", timeout=30)
    assert [rank.returncode for rank in ranks] == [0, 0]


@pytest.mark.dist
def test_no_thread_of_gloo_is_left_to_abort_a_rank_that_has_left_the_process_group():
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    ranks = [start(LEAVING, **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [out.splitlines()[-1:] for out, _ in said] == [["[]"]] * 2, said
    assert [rank.returncode for rank in ranks] == [0, 0]


@pytest.mark.dist
def test_a_process_on_its_own_opens_no_port_but_gloos_on_loopback():
    with start() as alone:
        assert alone.stdout.readline() == "ready\n"
        assert listening(alone.pid) <= LOOPBACK
        alone.communicate("\n", timeout=30)


def test_a_taken_port_is_one_line_that_says_what_to_give(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError) as error:
            rendezvous.join("gloo", rank=0, ranks=2)
    assert str(error.value) == f"MASTER_PORT={port}: port taken at 127.0.0.1; give another, --master_port of deepspeed"
    assert not dist.is_initialized()


def test_a_main_host_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match=r"MASTER_ADDR='nowhere.invalid': no such host"):
        rendezvous.join("gloo", rank=0, ranks=2)


def test_the_interface_of_an_address_is_found_and_of_a_strangers_address_not():
    assert rendezvous.interface_of("127.0.0.1") == "lo"
    assert rendezvous.interface_of("192.0.2.1") is None
