"""Where the ranks meet: one address, on one interface, never all of them.

torch's own store listens on every address of the machine. Here the main rank listens on MASTER_ADDR alone (127.0.0.1
unless a launcher names another), and a process on its own opens no port at all. Traffic of gloo, and on one machine of
NCCL, is held to the interface that leads to MASTER_ADDR, so the machine's own name need not mean anything.
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from oat_dist.errors import UserError

_TIMEOUT = timedelta(minutes=5)
_SIOCGIFADDR = 0x8915
"""Linux's request for the address of an interface (netdevice(7))."""


def join(backend: str, *, rank: int, ranks: int) -> Callable[[], dist.Store] | None:
    """Make the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Args:
        backend: `gloo` or `nccl`.
        rank: This rank.
        ranks: Number of ranks.

    Returns:
        Makes one more connection to the store of all ranks; None for a process on its own.

    Raises:
        UserError: MASTER_ADDR means nothing, or the port is taken.
    """
    if ranks == 1:
        _keep_to("127.0.0.1")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return None
    address, port = _resolve(os.environ["MASTER_ADDR"]), int(os.environ["MASTER_PORT"])
    _keep_to(address)
    connect = partial(dist.TCPStore, address, port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)
    store = _listen(address, port) if rank == 0 else connect()
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    return connect


def interface_of(address: str) -> str | None:
    """The interface with an IPv4 address of this machine, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def _resolve(host: str) -> str:
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
    except OSError as error:
        raise UserError(f"MASTER_ADDR={host!r}: no such host: {error.strerror}") from None


def _listen(address: str, port: int) -> dist.Store:
    """The store of all ranks, in this process, on one address."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
    except OSError as error:
        listening.close()
        hint = "give another, --master_port of deepspeed" if error.errno == errno.EADDRINUSE else "give another address"
        reason = "port taken" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"MASTER_PORT={port}: {reason} at {address}; {hint}") from None
    listening.listen(4096)
    return dist.TCPStore(
        address, port, is_master=True, timeout=_TIMEOUT, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def _keep_to(address: str) -> None:
    """Hold gloo, and on one machine NCCL, to the interface through which this machine reaches an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((address, 9))  # sends nothing
        except OSError:
            return
        name = interface_of(asking.getsockname()[0])
    if name is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    # Over several machines NCCL chooses among fast networks itself.
    if address.startswith("127."):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
