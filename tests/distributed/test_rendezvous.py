"""Rendezvous: ranks join, or end within the timeout with one sentence; where the store listens; what ranks exchange."""

from __future__ import annotations

import ast
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from race_dist.distributed import rendezvous
from race_dist.distributed.rendezvous import check_timeout, join_store
from race_dist.parallel import RankFailure, gather_objects, init_distributed
from race_dist.rank_environment import STORE_FD_VARIABLE, RankEnvironment, rank_environment, without_rank_variables

ROOT = Path(__file__).parents[2]
MEETING = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": ""}, "RANK in the environment must be an integer; got ''"),
        ({"RANK": "x"}, "RANK .*'x'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE .*''"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE .*'2.0'"),
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "1_0"}, "RANK .*'1_0'"),
        ({"WORLD_SIZE": "0"}, "RANK=1 and WORLD_SIZE=0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"LOCAL_RANK": " "}, "LOCAL_RANK .*' '"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 .*WORLD_SIZE=2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT=-1"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT .*'http'"),
    ],
)
def test_variables_that_do_not_make_sense_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_environment(MEETING | changes)


def test_variables_of_launchers_are_read_and_left_out_for_new_ranks() -> None:
    assert rank_environment({}) == RankEnvironment()
    assert rank_environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}) == RankEnvironment(0, 1, 2)
    assert rank_environment(MEETING) == RankEnvironment(1, 2, None, None, "localhost", 29500)
    assert rank_environment(MEETING | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}).single_node
    ours = {"PATH": "/bin", "OMP_NUM_THREADS": "1"}
    assert (
        without_rank_variables(
            MEETING
            | ours
            | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", STORE_FD_VARIABLE: "3"}
        )
        == ours
    )


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        ("x", TypeError),
        (True, TypeError),
        (None, TypeError),
        (0, ValueError),
        (-1.0, ValueError),
        (float("inf"), ValueError),
        (float("nan"), ValueError),
        (1e300, ValueError),
    ],
)
def test_a_timeout_is_a_number_of_seconds_that_can_be_waited(timeout: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout"):
        check_timeout(timeout)
    with pytest.raises(error, match="timeout"):
        init_distributed(device="cpu", timeout=timeout)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [3, "tpu", "mps", True, "cuda:x", 1.5])
def test_a_device_is_the_cpu_or_a_gpu(device: object) -> None:
    with pytest.raises((ValueError, TypeError), match="device"):
        init_distributed(device=device)  # type: ignore[arg-type]


@contextlib.contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """A server that accepts connections and sends something else, or nothing."""
    kept: list[socket.socket] = []
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    kept.append(server.accept()[0])
                    if answer is not None:
                        kept[-1].sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            over.set()
            thread.join()
            for connection in kept:
                connection.close()


def place(rank: int, port: int, host: str = "127.0.0.1", local: int | None = None) -> RankEnvironment:
    return RankEnvironment(rank, 2, None if local is None else rank, local, host, port)


def fails(where: RankEnvironment, timeout: float = 1.5) -> tuple[str, float]:
    began = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        join_store(where, check_timeout(timeout))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"rank {where.rank}: ")
    return text, time.monotonic() - began


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n" * 8])
def test_a_program_that_is_no_store_ends_the_wait_within_the_timeout(answer: bytes | None) -> None:
    with listener(answer) as port:
        text, seconds = fails(place(1, port))
        assert f"MASTER_PORT={port}" in text
        assert seconds < 4.0


def test_a_busy_port_is_told_at_once_and_a_silent_one_within_the_timeout() -> None:
    with listener(None) as port:
        text, seconds = fails(place(0, port), 30.0)
        assert "in use by another program" in text
        assert seconds < 5.0
    text, seconds = fails(place(1, port))
    assert "nobody listens there" in text
    assert 1.0 < seconds < 4.0
    assert "no.such.host" in fails(place(1, port, "no.such.host.invalid"))[0]


def test_rank_0_names_the_rank_that_does_not_come() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text, seconds = fails(place(0, port))
    assert f"rank 1 of 2 did not join the job at 127.0.0.1:{port} within 1.5 s" in text
    assert seconds < 4.0


@pytest.mark.parametrize(
    ("host", "local", "loopback"),
    [("127.0.0.1", None, True), ("localhost", None, True), ("localhost", 2, True), (socket.gethostname(), 2, True)],
)
def test_the_store_listens_where_it_was_told_to(host: str, local: int | None, loopback: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    stores: list[object] = []
    ranks = [
        threading.Thread(target=lambda r=r: stores.append(join_store(place(r, port, host, local), check_timeout(20.0))))
        for r in range(2)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(stores) == 2
    addresses = {
        words[1].rpartition(":")[0]
        for table in ("tcp", "tcp6")
        for words in (line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:])
        if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port
    }
    assert addresses == ({"0100007F"} if loopback else set())


def test_a_name_that_leads_to_the_loopback_device_on_one_machine_only_does_not_bind_there() -> None:
    assert rendezvous._resolves_to_loopback("node7", "127.0.1.1")
    assert not rendezvous._resolves_to_loopback("localhost", "127.0.0.1")
    assert not rendezvous._resolves_to_loopback("127.0.0.1", "127.0.0.1")
    assert not rendezvous._resolves_to_loopback("node7", "10.0.0.7")


def test_rank_0_takes_over_the_socket_of_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, number = server.getsockname()[1], os.dup(server.fileno())
    monkeypatch.setenv(STORE_FD_VARIABLE, str(number))
    with rendezvous._listen("127.0.0.1", port) as taken:
        assert taken.fileno() == number
    assert STORE_FD_VARIABLE not in os.environ
    with open(os.devnull) as other:
        monkeypatch.setenv(STORE_FD_VARIABLE, str(other.fileno()))
        with rendezvous._listen("127.0.0.1", port) as own:  # another descriptor is left open
            assert own.fileno() != other.fileno()


def exchanged(group: dist.ProcessGroup, values: list[object]) -> list[object]:
    return gather_objects(values[dist.get_rank(group)], group)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_gets_every_ranks_value(world: int) -> None:
    values: list[object] = [{"a": [1, 2.5, None, True], "ä": "x" * 5000}, None, [[-1, "\n"], {}]]
    for found in run_ranks(world, exchanged, values):
        assert found == values[:world]
    assert gather_objects(("a", 1), None) == [["a", 1]]  # as from another rank


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", torch.ones(1), 1j])
def test_values_between_ranks_are_of_json_types(value: object) -> None:
    with pytest.raises(TypeError, match="JSON types"):
        gather_objects(value, None)


def test_nothing_in_the_tree_pickles() -> None:
    """torch.distributed sends objects as pickles, and torch.load without weights_only reads pickles."""
    forbidden = {
        "all_gather_object",
        "gather_object",
        "scatter_object_list",
        "broadcast_object_list",
        "send_object_list",
        "recv_object_list",
    }
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    found = []
    for place in ("race_dist", "launch", "kernels", "examples"):
        for file in (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = (
                    {a.name.partition(".")[0] for a in node.names}
                    if isinstance(node, ast.Import)
                    else {(node.module or "").partition(".")[0]}
                    if isinstance(node, ast.ImportFrom)
                    else set()
                )
                name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
                loads = (
                    isinstance(node, ast.Attribute)
                    and node.attr in ("load", "save")
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "torch"
                )
                if names & modules or name in forbidden or loads:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert found == []
