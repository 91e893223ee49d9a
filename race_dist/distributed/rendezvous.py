"""How the ranks of a job find each other: the variables of a launcher, and the store at MASTER_ADDR and MASTER_PORT.

Rank 0 holds the store. It listens where it was told to: on the loopback device alone where all ranks are on this machine,
else at the address that MASTER_ADDR names. Whatever stands there instead (another job's store, a program that accepts and
never answers), every rank ends within the timeout, in one sentence with its own number.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from race_dist.distributed.watchdog import RankFailure, format_ranks
from race_dist.rank_environment import LOOPBACK, STORE_FD_VARIABLE, RankEnvironment
from race_dist.strict_config import TIMEOUT_LIMIT

_BACKLOG = 2048
_EXTRA = 0.5  # seconds beyond the timeout in which the store's own error may come


def check_timeout(timeout: object, name: str = "timeout") -> datetime.timedelta:
    """The seconds that ranks wait for each other. ValueError or TypeError where it is no number, or none that can be waited."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"{name} must be a number of seconds; got {timeout!r}")
    if not 0 < timeout <= TIMEOUT_LIMIT or math.isnan(timeout):
        raise ValueError(f"{name} must be a positive number of seconds of at most {TIMEOUT_LIMIT:,}; got {timeout!r}")
    return datetime.timedelta(seconds=timeout)


def join_store(place: RankEnvironment, timeout: datetime.timedelta) -> Any:
    """The job's store, once every rank has come to it.

    Args:
        place: of this rank.
        timeout: for all ranks to come.

    Raises:
        RankFailure: a rank did not come within the timeout, or what stands at the meeting point is not this job.
    """
    rank, seconds = place.rank, timeout.total_seconds()
    deadline = time.monotonic() + seconds
    where = f"MASTER_ADDR={place.master_addr}, MASTER_PORT={place.master_port}"
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the launcher holds it
    try:
        store = _within(seconds + _EXTRA, lambda: (_agents_store if agent else _own_store)(place, timeout))
        lobby = PrefixStore("race_dist/job", store)
        answer = _within(
            max(0.1, deadline - time.monotonic()) + _EXTRA, lambda: _enter(lobby, rank, place.world_size, deadline)
        )
    except _PortInUse as error:
        raise RankFailure(
            f"rank {rank}: the port of {where} is in use by another program of this machine, so the job cannot "
            f"meet there: choose another MASTER_PORT [{error}]"
        ) from None
    except (RuntimeError, OSError) as error:
        hint = (
            "is TORCHELASTIC_USE_AGENT_STORE left over from a torchrun that has ended?"
            if agent
            else "does rank 0 run there, and is the port free?"
        )
        raise RankFailure(
            f"rank {rank}: no job found at {where} within {seconds:g} s; {hint} [{_first_line(error)}]", [0] if rank else []
        ) from error
    job, missing = answer
    if missing:
        raise RankFailure(
            f"rank {rank}: {format_ranks(missing)} of {place.world_size} did not join the job at {place.master_addr}:"
            f"{place.master_port} within {seconds:g} s",
            missing,
        )
    return job


class _PortInUse(OSError):
    """Somebody else listens at the port."""


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result; TimeoutError when there is none in time. A store's client waits without end for one that accepts its
    connection and never answers, so the call runs in a thread, which is then left behind."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="race-dist-rendezvous", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError("what listens there accepts connections and does not answer")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _agents_store(place: RankEnvironment, timeout: datetime.timedelta) -> Any:
    return next(iter(rendezvous("env://", place.rank, place.world_size, timeout=timeout)))[0]


def _own_store(place: RankEnvironment, timeout: datetime.timedelta) -> TCPStore:
    assert place.master_addr is not None
    deadline = time.monotonic() + timeout.total_seconds()
    host = LOOPBACK if place.single_node and _is_here(place.master_addr) else place.master_addr
    if place.rank:
        _await_listener(host, place.master_port, deadline)
        return TCPStore(
            host, place.master_port, place.world_size, is_master=False, timeout=_left(deadline), wait_for_workers=False
        )
    listener = _listening(host, place.master_port)
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return TCPStore(
        LOOPBACK if address.is_unspecified else str(address),
        place.master_port,
        place.world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Until somebody listens there. ConnectionError by the deadline; the store's own client would say so in many lines."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"nobody listens there: {error}") from None
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))


def _is_here(host: str) -> bool:
    """Whether a host's name or address is one of this machine."""
    try:
        with socket.create_server((_address(host)[1][0], 0), family=_address(host)[0]):
            return True
    except OSError:
        return False


def _address(host: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    found.sort(key=lambda each: each[0] != socket.AF_INET)
    return found[0][0], found[0][4]


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens at the address that ``host`` names; at all of this machine's where other nodes must know it by
    another one. A socket that a launcher has opened beforehand is taken over."""
    inherited = _inherited(port)
    if inherited is not None:
        return inherited
    try:
        try:
            family, address = _address(host)
            if not _misleading(host, address[0]):
                return socket.create_server((address[0], port), family=family, backlog=_BACKLOG)
        except OSError as error:  # no such name here, or a translated or virtual address
            if error.errno != errno.EADDRNOTAVAIL and not isinstance(error, socket.gaierror):
                raise
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _PortInUse(str(error)) from None
        raise


def _misleading(host: str, address: str) -> bool:
    """Whether a name that is not one of the loopback device leads there all the same: on some systems a machine's own name
    does on that machine alone, and the other nodes know it by its real address."""
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    name = host.partition(".")[0].lower()
    return loopback and host != address and name not in ("localhost", "ip6-localhost", "localhost6")


def _inherited(port: int) -> socket.socket | None:
    number = os.environ.pop(STORE_FD_VARIABLE, "")
    if not number.isdecimal():
        return None
    try:
        taken = socket.socket(fileno=int(number))
    except OSError:
        return None
    try:
        listens = taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and taken.getsockname()[1] == port
    except (OSError, IndexError):
        listens = 0
    if listens:
        return taken
    taken.detach()  # somebody else's number
    return None


def _enter(lobby: Any, rank: int, world: int, deadline: float) -> tuple[Any, list[int]]:
    """This start's own part of the store, and the ranks that did not come to it.

    A launcher that starts failed ranks again may keep its store, full of what the ranks before have left. So rank 0 makes a
    name for this start and gives it to every rank that says hello with a word never used before.
    """
    word = secrets.token_hex(8)
    lobby.set(f"hello/{rank}", word)
    if rank:
        try:
            lobby.wait([f"welcome/{word}"], _left(deadline))
        except RuntimeError:
            return None, [0]
    start = lobby.get(f"welcome/{word}").decode() if rank else secrets.token_hex(8)
    job, keys = PrefixStore(start, lobby), [f"here/{r}" for r in range(world)]
    job.set(keys[rank], "1")
    if rank:
        try:
            job.wait(keys, _left(deadline))
        except RuntimeError:
            return job, [r for r, key in enumerate(keys) if not job.check([key])]
        return job, []
    greeted: set[str] = set()
    while not job.check(keys):
        if time.monotonic() > deadline:
            return job, [r for r, key in enumerate(keys) if not job.check([key])]
        for r in range(1, world):
            if lobby.check([f"hello/{r}"]) and (other := lobby.get(f"hello/{r}").decode()) not in greeted:
                lobby.set(f"welcome/{other}", start)
                greeted.add(other)
        time.sleep(0.01)
    return job, []


def _left(deadline: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(0.1, deadline - time.monotonic()))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
