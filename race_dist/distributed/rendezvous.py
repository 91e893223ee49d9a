"""Rendezvous: how the ranks of a job find each other through the store at MASTER_ADDR and MASTER_PORT.

Rank 0 hosts the store. It listens on the loopback interface only where all ranks are on this machine, else at the address of
MASTER_ADDR. If another process listens there (another job's store, a program that accepts connections and never answers), every
rank ends within the timeout with one sentence that has its rank.
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
_GRACE = 0.5  # seconds after the timeout in which the store's own error may arrive


def check_timeout(timeout: object, name: str = "timeout") -> datetime.timedelta:
    """The timeout of the ranks' collectives. TypeError or ValueError unless it is a positive number of seconds within the
    limit."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"{name} must be a number of seconds; got {timeout!r}")
    if not 0 < timeout <= TIMEOUT_LIMIT or math.isnan(timeout):
        raise ValueError(f"{name} must be a positive number of seconds of at most {TIMEOUT_LIMIT:,}; got {timeout!r}")
    return datetime.timedelta(seconds=timeout)


def join_store(environment: RankEnvironment, timeout: datetime.timedelta) -> Any:
    """The job's store, once every rank has joined it.

    Args:
        environment: of this rank.
        timeout: for all ranks to join.

    Raises:
        RankFailure: a rank did not join within the timeout, or the process that listens there does not belong to this job.
    """
    rank, seconds = environment.rank, timeout.total_seconds()
    deadline = time.monotonic() + seconds
    where = f"MASTER_ADDR={environment.master_addr}, MASTER_PORT={environment.master_port}"
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the launcher hosts the store
    try:
        store = _call_with_timeout(seconds + _GRACE, lambda: (_agent_store if agent else _own_store)(environment, timeout))
        shared_store = PrefixStore("race_dist/job", store)
        answer = _call_with_timeout(
            max(0.1, deadline - time.monotonic()) + _GRACE,
            lambda: _join_start(shared_store, rank, environment.world_size, deadline),
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
            f"rank {rank}: {format_ranks(missing)} of {environment.world_size} did not join the job at "
            f"{environment.master_addr}:{environment.master_port} within {seconds:g} s",
            missing,
        )
    return job


class _PortInUse(OSError):
    """Another process listens at the port."""


def _call_with_timeout(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result; TimeoutError where it does not return in time. The store's client has no timeout for a server that
    accepts its connection and never answers, so the call runs in a thread, which is abandoned then."""
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


def _agent_store(environment: RankEnvironment, timeout: datetime.timedelta) -> Any:
    return next(iter(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout)))[0]


def _own_store(environment: RankEnvironment, timeout: datetime.timedelta) -> TCPStore:
    assert environment.master_addr is not None
    deadline = time.monotonic() + timeout.total_seconds()
    host = LOOPBACK if environment.single_node and _is_local(environment.master_addr) else environment.master_addr
    if environment.rank:
        _await_listener(host, environment.master_port, deadline)
        return TCPStore(
            host,
            environment.master_port,
            environment.world_size,
            is_master=False,
            timeout=_remaining(deadline),
            wait_for_workers=False,
        )
    listener = _listen(host, environment.master_port)
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return TCPStore(
        LOOPBACK if address.is_unspecified else str(address),
        environment.master_port,
        environment.world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Wait until a server listens there. ConnectionError after the deadline; the store's own client would print many lines."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"nobody listens there: {error}") from None
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))


def _is_local(host: str) -> bool:
    """Whether a host name or address belongs to this machine."""
    try:
        with socket.create_server((_address(host)[1][0], 0), family=_address(host)[0]):
            return True
    except OSError:
        return False


def _address(host: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    found.sort(key=lambda info: info[0] != socket.AF_INET)
    return found[0][0], found[0][4]


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address of ``host``, or at all addresses of this machine where other nodes must use another
    address than this machine resolves. A socket that a launcher has opened is inherited."""
    inherited = _inherited_socket(port)
    if inherited is not None:
        return inherited
    try:
        try:
            family, address = _address(host)
            if not _resolves_to_loopback(host, address[0]):
                return socket.create_server((address[0], port), family=family, backlog=_BACKLOG)
        except OSError as error:  # the name does not resolve here, or the address is translated or virtual
            if error.errno != errno.EADDRNOTAVAIL and not isinstance(error, socket.gaierror):
                raise
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _PortInUse(str(error)) from None
        raise


def _resolves_to_loopback(host: str, address: str) -> bool:
    """Whether a name other than localhost resolves to a loopback address: on some systems a machine's own name does on that
    machine only, while other nodes resolve its real address."""
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    name = host.partition(".")[0].lower()
    return loopback and host != address and name not in ("localhost", "ip6-localhost", "localhost6")


def _inherited_socket(port: int) -> socket.socket | None:
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
    taken.detach()  # the descriptor belongs to something else
    return None


def _join_start(shared_store: Any, rank: int, world: int, deadline: float) -> tuple[Any, list[int]]:
    """The store's prefix for this start of the job, and the ranks that did not join it.

    A launcher that restarts failed ranks may keep its store with the keys of the ranks before. So rank 0 draws a name for this
    start and gives it to every rank that announces itself with a token never used before.
    """
    token = secrets.token_hex(8)
    shared_store.set(f"joining/{rank}", token)
    if rank:
        try:
            shared_store.wait([f"start_of/{token}"], _remaining(deadline))
        except RuntimeError:
            return None, [0]
    start = shared_store.get(f"start_of/{token}").decode() if rank else secrets.token_hex(8)
    job, keys = PrefixStore(start, shared_store), [f"joined/{r}" for r in range(world)]
    job.set(keys[rank], "1")
    if rank:
        try:
            job.wait(keys, _remaining(deadline))
        except RuntimeError:
            return job, [r for r, key in enumerate(keys) if not job.check([key])]
        return job, []
    answered: set[str] = set()
    while not job.check(keys):
        if time.monotonic() > deadline:
            return job, [r for r, key in enumerate(keys) if not job.check([key])]
        for r in range(1, world):
            if shared_store.check([f"joining/{r}"]) and (other := shared_store.get(f"joining/{r}").decode()) not in answered:
                shared_store.set(f"start_of/{other}", start)
                answered.add(other)
        time.sleep(0.01)
    return job, []


def _remaining(deadline: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(0.1, deadline - time.monotonic()))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
