"""Watchdog: find and name the rank that failed.

A collective that a rank never joins fails on the other ranks late and without a name. So each process runs a thread that
writes a heartbeat to the default store ("alive, at collective 57 of this group") and reads the verdicts of other ranks there.
When a collective fails, the survivors look for ranks whose heartbeat has stopped or that have not reached the collective,
publish one verdict, and raise :class:`RankFailure` with it. The rank that the verdict names prints the stacks of its threads.

On a GPU nothing raises: the host runs ahead and then waits for a device that waits for another rank. With
:func:`abort_on_stall` the thread itself finds the missing rank and ends this process, so that a launcher can restart the job.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

log = logging.getLogger(__name__)

_PREFIX = "race_dist/watchdog/"
_VERDICT = _PREFIX + "verdict"
_HEARTBEAT_SECONDS = 0.5
_MISSED_HEARTBEATS = 4  # a rank that misses this many heartbeats counts as dead
_SILENCE_SECONDS = 30.0  # a neighbour without a heartbeat for this long is reported in the log
_STATUS_SECONDS = 2.0  # between two publications of this rank's status
_STALL_CHECK_SECONDS = 10.0  # how long a stalled job's heartbeats are read before a rank counts as dead
_EXIT_SECONDS = 8.0  # in which a process whose job has failed may end by itself


class RankFailure(RuntimeError):
    """A collective failed because a rank died, left, or never joined; the message names it.

    Attributes:
        ranks: global ranks that failed; empty when every rank is alive and the cause is another.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Watchdog:
    """This process's heartbeat in the default store, and the last verdict that it has read there."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.interval = max(_HEARTBEAT_SECONDS, self.world / 1000)  # at most 1,000 heartbeats per second for one store
        store = dist.distributed_c10d._get_default_store()  # public API offers no way to it
        self.main_store = store
        try:
            # a separate connection: the thread must not wait for the main one
            self.store = store.clone()  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError, NotImplementedError):
            self.store = store
        self.progress: dict[str, tuple[int, str]] = {}
        self.verdict: tuple[str, list[int]] | None = None
        self.store_lost = False
        self.stall_timeout = float("inf")  # seconds without a collective after which the job counts as stalled
        self.last_progress = time.monotonic()
        self._status: tuple[float, dict[str, Mapping[str, Any]]] = (0.0, {})
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="race-dist-watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self, *, leave: bool = False) -> None:
        """Stop the heartbeat; with ``leave``, record that this rank left on purpose."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(2.0)
        atexit.unregister(self.close)
        if leave and not self.store_lost:
            try:
                self._heartbeat("left")
            except RuntimeError:
                self.store_lost = True

    def count_collective(self, group: ProcessGroup, op: str) -> None:
        """Record that this rank starts the next collective of ``group``."""
        self.progress[group.group_name] = (self.progress.get(group.group_name, (0, ""))[0] + 1, op)
        self.last_progress = time.monotonic()

    def _heartbeat(self, state: str) -> None:
        self._count += 1
        if _publishers and time.monotonic() - self._status[0] > _STATUS_SECONDS:
            self._status = (time.monotonic(), {name: _read_status(read) for name, read in list(_publishers.items())})
        message = {"beat": self._count, "state": state, "at": self.progress, "status": self._status[1]}
        self.store.set(f"{_PREFIX}{self.rank}", json.dumps(message))

    def _run(self) -> None:
        neighbour = (self.rank + 1) % self.world
        last_beat, silent_since, reported = -1, time.monotonic(), False
        try:
            while True:
                self._heartbeat("alive")
                self._read_verdict()
                beat = self._heartbeats([neighbour])[neighbour].get("beat", -1)
                if beat != last_beat:
                    last_beat, silent_since, reported = beat, time.monotonic(), False
                elif not reported and time.monotonic() - silent_since > _SILENCE_SECONDS:
                    log.error("rank %d has sent no heartbeat for %.0f s", neighbour, _SILENCE_SECONDS)
                    reported = True
                if self.verdict is None and time.monotonic() - self.last_progress > self.stall_timeout:
                    self._diagnose_stall()
                if self.verdict is not None and self._handle_verdict(*self.verdict):
                    return
                if self._stop.wait(self.interval):
                    return
        except RuntimeError:  # the process that hosts the store has ended
            self.store_lost = True

    def statuses(self, name: str) -> dict[int, Mapping[str, Any]]:
        """What each rank has published under ``name``, as of its last heartbeat."""
        beats = self._heartbeats(range(self.world))
        return {rank: beat["status"][name] for rank, beat in beats.items() if name in beat.get("status", {})}

    def _diagnose_stall(self) -> None:
        """Publish which ranks block the others: dead, or at an earlier collective than the rest of a group."""
        everyone = list(range(self.world))
        before, deadline = self._heartbeats(everyone), time.monotonic() + _STALL_CHECK_SECONDS
        while True:  # long enough to tell a slow rank from a dead one
            self._heartbeat("alive")
            after = self._heartbeats(everyone)
            dead = [r for r in everyone if after[r].get("state") != "left" and before[r].get("beat") == after[r].get("beat")]
            if not dead or time.monotonic() > deadline:
                break
            if self._stop.wait(self.interval):
                return
        positions = {r: beat.get("at", {}) for r, beat in after.items()}
        most = {name: max(at[name][0] for at in positions.values() if name in at) for at in positions.values() for name in at}
        late = [r for r, at in positions.items() if any(at[name][0] < most[name] for name in at)]
        waited = f"the job has stalled for {self.stall_timeout:g} s"
        if dead:
            text = f"{waited}: {format_ranks(dead)} died (no heartbeat)"
        elif late:
            text = f"{waited}: {format_ranks(late)} did not come to the collective that the others wait in"
        else:
            text = f"{waited}, although every rank has come to the same collective"
        self.store.compare_set(_VERDICT, "", json.dumps([text, dead or late]))
        self._read_verdict()

    def _handle_verdict(self, text: str, ranks: Sequence[int]) -> bool:
        """Print the threads' stacks where the verdict names this rank or the job has stalled; end the process where it does
        not end by itself (only after :func:`abort_on_stall`). Returns whether the thread is done."""
        stalled = self.stall_timeout != float("inf")
        if self.rank in ranks or stalled:
            print(f"rank {self.rank}: {text}; stacks of the threads of rank {self.rank}:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if not stalled:
            return self._stop.is_set()
        if not self._stop.wait(_EXIT_SECONDS):
            os._exit(1)
        return True

    def _read_verdict(self) -> None:
        if self.verdict is None and self.store.check([_VERDICT]):
            text, ranks = json.loads(self.store.get(_VERDICT))
            self.verdict = (text, ranks)
            self.store.set(f"{_PREFIX}read/{self.rank}", "1")

    def _heartbeats(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        keys = {r: f"{_PREFIX}{r}" for r in ranks}
        return {r: json.loads(self.store.get(key)) if self.store.check([key]) else {} for r, key in keys.items()}

    def diagnose(self, group: ProcessGroup, op: str, error: BaseException) -> RankFailure:
        """The exception to raise for a collective of ``group`` that failed with ``error``."""
        head = f"rank {self.rank}: {op} failed"
        for _ in range(2):  # the thread may be about to read a verdict
            if self.verdict is None and not self.store_lost:
                time.sleep(self.interval)
        if self.verdict is None and not self.store_lost:
            # in a thread: the client of a store whose host hangs waits without a timeout
            diagnosis = threading.Thread(
                target=self._publish_verdict, args=(group, op), name="race-dist-watchdog-diagnosis", daemon=True
            )
            diagnosis.start()
            diagnosis.join(4 * _MISSED_HEARTBEATS * self.interval + _EXIT_SECONDS)
            self.store_lost |= diagnosis.is_alive()
        if self.verdict is not None:
            text, ranks = self.verdict
            return RankFailure(f"{head}: {text} [{_first_line(error)}]", ranks)
        if self.store_lost:
            of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            host = "the launcher's agent" if of_launcher else "rank 0"
            return RankFailure(
                f"{head}: {host} died, has already ended or hangs, and with it the store through which "
                f"ranks find each other [{_first_line(error)}]",
                [0] if self.rank and not of_launcher else [],
            )
        return RankFailure(f"{head}, although every rank of its group is alive and has come to it [{_first_line(error)}]")

    def _publish_verdict(self, group: ProcessGroup, op: str) -> None:
        """Find the missing ranks and publish a verdict, unless another rank has done so first."""
        try:
            self._find_missing_ranks(group, op)
        except RuntimeError:
            self.store_lost = True

    def _find_missing_ranks(self, group: ProcessGroup, op: str) -> None:
        others = [r for r in dist.get_process_group_ranks(group) if r != self.rank]
        before = self._heartbeats(others)
        time.sleep(_MISSED_HEARTBEATS * self.interval)
        after = self._heartbeats(others)
        dead = [r for r in others if after[r].get("state") != "left" and before[r].get("beat") == after[r].get("beat")]
        left = [r for r in others if after[r].get("state") == "left"]
        own_count, name = self.progress[group.group_name][0], group.group_name
        late = [r for r in others if r not in dead + left and after[r].get("at", {}).get(name, (0, ""))[0] < own_count]
        if dead:
            found, text = dead, f"{format_ranks(dead)} died (no heartbeat)"
        elif left:
            found, text = left, f"{format_ranks(left)} had already left the job"
        elif late:
            found, text = late, f"{format_ranks(late)} did not come to it within the group's timeout"
        else:
            return
        self.store.compare_set(_VERDICT, "", json.dumps([text, found]))
        self._read_verdict()
        deadline = time.monotonic() + 2 * _MISSED_HEARTBEATS * self.interval
        alive = [r for r in others if r not in dead + left]
        while time.monotonic() < deadline:  # the store may end with this process: let the others read the verdict first
            if self.store.check([f"{_PREFIX}read/{r}" for r in alive]):
                break
            time.sleep(self.interval / 4)


_publishers: dict[str, Callable[[], Mapping[str, Any]]] = {}  # of this process
_current: Watchdog | None = None  # one per process, like the default store that it writes to


def get_watchdog() -> Watchdog:
    """The watchdog of this process's default store, started on first use."""
    global _current  # noqa: PLW0603
    if _current is None or _current.main_store is not dist.distributed_c10d._get_default_store():
        if _current is not None:
            _current.close()
        _current = Watchdog()
    return _current


def abort_on_stall(seconds: float) -> None:
    """End this process with code 1 when it has started no collective for this many seconds, and name the missing rank.

    For jobs in which every step has collectives. Choose more seconds than the collectives' timeout: that raises an error that
    can be handled, wherever the host itself waits for the collective. No effect in a job of one process.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        watchdog = get_watchdog()
        watchdog.stall_timeout, watchdog.last_progress = seconds, time.monotonic()


def publish(name: str, read: Callable[[], Mapping[str, Any]]) -> None:
    """Publish what ``read()`` returns (of JSON types) to the other ranks every few seconds, without a collective."""
    _publishers[name] = read


def published(name: str) -> dict[int, Mapping[str, Any]]:
    """What the ranks have published under ``name``, by rank; some may be missing for a few seconds."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return {0: _read_status(_publishers[name])} if name in _publishers else {}
    try:
        return get_watchdog().statuses(name)
    except RuntimeError:  # the process that hosts the store has ended; the next collective reports it
        return {}


def _read_status(read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return dict(read())
    except Exception:  # a status that cannot be read must not stop the watchdog
        log.exception("reading the status for the other ranks failed")
        return {}


def stop_watchdog() -> None:
    """Stop the watchdog; the other ranks see that this one left."""
    global _current  # noqa: PLW0603
    if _current is not None:
        _current.close(leave=True)
        _current = None


@contextmanager
def name_failed_rank(group: ProcessGroup, op: str, *, count: bool = True) -> Iterator[None]:
    """Raise a backend's error or timeout inside the block as a :class:`RankFailure` that names the rank.

    Args:
        group: whose collective runs inside the block.
        op: name of the collective.
        count: whether the block starts a new collective, or waits for one that was counted.
    """
    watchdog = get_watchdog()
    if count:
        watchdog.count_collective(group, op)
    try:
        yield
    except RankFailure:
        raise
    except RuntimeError as error:
        raise watchdog.diagnose(group, op, error) from error


def format_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 3, 5``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
