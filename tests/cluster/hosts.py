"""Several "hosts" on one machine: network namespaces on a bridge, which can be disconnected."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path


def missing() -> str | None:
    """Why network namespaces cannot be created here, as a sentence; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "ip is not installed: tests/cluster/install.sh installs iproute2 with apt"
    probe = f"probe-{secrets.token_hex(3)}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"this kernel or container refuses network namespaces: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


class Hosts:
    """A context manager of ``count`` network namespaces with addresses 10.83.x.1, 10.83.x.2, ..."""

    def __init__(self, count: int) -> None:
        self.count, self.tag = count, secrets.token_hex(2)
        self.subnet = f"10.83.{secrets.randbelow(254) + 1}"
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            ip("link", "add", self._bridge, "type", "bridge")
            ip("link", "set", self._bridge, "up")
            for index in range(self.count):
                name, outer, inner = self.name(index), self._cable(index), f"i{self.tag}{index}"
                ip("netns", "add", name)
                ip("link", "add", outer, "type", "veth", "peer", "name", inner)
                ip("link", "set", inner, "netns", name)
                ip("link", "set", outer, "master", self._bridge)
                ip("link", "set", outer, "up")
                ip("-n", name, "link", "set", inner, "name", "eth0")
                ip("-n", name, "address", "add", f"{self.address(index)}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for index in range(self.count):
            for pid in self.processes(index):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", self.name(index)], capture_output=True, check=False)
            subprocess.run(["ip", "link", "delete", self._cable(index)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, check=False)
        for process in self.started:
            process.wait(20)

    def name(self, index: int) -> str:
        return f"host{self.tag}{index}"

    def address(self, index: int) -> str:
        return f"{self.subnet}.{index + 1}"

    def processes(self, index: int) -> list[int]:
        """The process ids on a host."""
        done = subprocess.run(["ip", "netns", "pids", self.name(index)], capture_output=True, text=True, check=False)
        return [int(word) for word in done.stdout.split()]

    def start(self, index: int, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host, with its output in a file."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as out:
            self.started.append(
                subprocess.Popen(["ip", "netns", "exec", self.name(index), *command], stdout=out, stderr=out, env=environment)
            )
        return self.started[-1]

    def cut(self, index: int) -> None:
        """Disconnect a host from the network."""
        ip("link", "set", self._cable(index), "down")

    @property
    def _bridge(self) -> str:
        return f"b{self.tag}"

    def _cable(self, index: int) -> str:
        return f"o{self.tag}{index}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
