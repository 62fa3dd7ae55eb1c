"""Two hosts on this machine: network namespaces, each with an address and an ssh server of its own."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


@dataclass(frozen=True)
class Hosts:
    """Two hosts."""

    enter: tuple[str, ...]
    """Begin of a command that runs on the first."""
    bin: pathlib.Path
    """Folder with an `ssh` that knows the keys, to stand first in PATH."""


def why_not() -> str | None:
    """Why no hosts can be made here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs iproute2, openssh and pdsh (sh launch/setup_cluster.sh): no {', '.join(missing)}"
    made = subprocess.run(["ip", "netns", "add", f"oat-{os.getpid()}"], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"oat-{os.getpid()}"], check=True)
    return None


@contextlib.contextmanager
def two_hosts(folder: pathlib.Path) -> Iterator[Hosts]:
    """Two hosts, joined by a cable, while the block runs."""
    names = [f"oat-{os.getpid()}-{n}" for n in (1, 2)]
    run = lambda *command: subprocess.run(command, check=True, capture_output=True)  # noqa: E731
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    shutil.copy(folder / "key.pub", folder / "authorized")
    (folder / "sshd.conf").write_text(
        f"HostKey {folder}/key\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
    )
    (folder / "ssh.conf").write_text(
        f"Host *\nIdentityFile {folder}/key\nIdentitiesOnly yes\nStrictHostKeyChecking no\nLogLevel ERROR\n"
        "UserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh.conf "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    pathlib.Path("/run/sshd").mkdir(exist_ok=True)
    servers = []
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run(
            "ip",
            "link",
            "add",
            "cable1",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable2",
            "netns",
            names[1],
        )
        for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True), start=1):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", f"cable{number}")
            for link in (f"cable{number}", "lo"):
                run("ip", "-n", name, "link", "set", link, "up")
            command = ["ip", "netns", "exec", name, shutil.which("sshd"), "-D", "-e", "-f", str(folder / "sshd.conf"),
                       "-o", f"ListenAddress={address}"]  # fmt: skip
            servers.append(subprocess.Popen(command, stderr=(folder / f"sshd{number}.log").open("w")))
        hosts = Hosts(enter=("ip", "netns", "exec", names[0]), bin=folder / "bin")
        for address in ADDRESSES:
            _wait_for_ssh(hosts, address)
        yield hosts
    finally:
        for server in servers:
            server.terminate()
            server.wait(10)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _wait_for_ssh(hosts: Hosts, address: str) -> None:
    end = time.monotonic() + 20
    command = [*hosts.enter, str(hosts.bin / "ssh"), "-o", "BatchMode=yes", address, "true"]
    while (done := subprocess.run(command, capture_output=True, text=True, timeout=20)).returncode:
        assert time.monotonic() < end, done.stderr
        time.sleep(0.2)
