"""Naming the rank that failed.

A collective that a rank never joins fails on the others late and without a name. So each process runs one small thread
that beats in the default store ("I live, and I am at collective 57 of this group") and reads there what others have
found out. When a collective fails, the survivors look at whose beat has stopped, or who has not come to the collective,
agree on one verdict, and raise :class:`RankFailure` with it. The rank that is named prints where its threads stand.

On a GPU nothing raises: the host runs ahead and then waits for a device that waits for a rank. :func:`abort_on_stall` has the
thread itself find the rank that is missing, and end this process so that a launcher can start the job again.
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

_PREFIX = "race_dist/watch/"
_VERDICT = _PREFIX + "verdict"
_BEAT_SECONDS = 0.5
_LOST_BEATS = 4  # a rank whose beat stands still for so many beats is gone
_STALL_SECONDS = 30.0  # a neighbour silent for so long is reported in the log
_POST_SECONDS = 2.0  # between two readings of what ranks post
_LOOK_SECONDS = 10.0  # how long a stalled job's ranks are looked at before one counts as dead
_LAST_WORDS = 8.0  # seconds in which a process whose job has failed may end by itself


class RankFailure(RuntimeError):
    """A collective failed because of a rank that died, left, or never came; the message names it.

    Attributes:
        ranks: global ranks that failed; empty when every rank lives and the cause is another.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Watch:
    """This process's beat in the default store, and what it has heard of the others."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.beat = max(_BEAT_SECONDS, self.world / 1000)  # a thousand beats a second are no burden on a store
        store = dist.distributed_c10d._get_default_store()  # public API offers no way to it
        self.main_store = store
        try:
            # a connection of its own: the thread must not wait for the main one
            self.store = store.clone()  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError, NotImplementedError):
            self.store = store
        self.progress: dict[str, tuple[int, str]] = {}
        self.verdict: tuple[str, list[int]] | None = None
        self.store_lost = False
        self.patience = float("inf")  # seconds without a collective after which the job counts as stalled
        self.moved = time.monotonic()
        self._posted: tuple[float, dict[str, Mapping[str, Any]]] = (0.0, {})
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="race-dist-watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self, *, leave: bool = False) -> None:
        """Stop beating; with ``leave``, tell the others that this rank left of its own accord."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(2.0)
        atexit.unregister(self.close)
        if leave and not self.store_lost:
            try:
                self._say("left")
            except RuntimeError:
                self.store_lost = True

    def enter(self, group: ProcessGroup, op: str) -> None:
        """Note that this rank is entering the next collective of ``group``."""
        self.progress[group.group_name] = (self.progress.get(group.group_name, (0, ""))[0] + 1, op)
        self.moved = time.monotonic()

    def _say(self, state: str) -> None:
        self._count += 1
        if _posts and time.monotonic() - self._posted[0] > _POST_SECONDS:
            self._posted = (time.monotonic(), {name: _told(tell) for name, tell in list(_posts.items())})
        message = {"beat": self._count, "state": state, "at": self.progress, "posts": self._posted[1]}
        self.store.set(f"{_PREFIX}{self.rank}", json.dumps(message))

    def _run(self) -> None:
        neighbour = (self.rank + 1) % self.world
        heard, silent_since, reported = -1, time.monotonic(), False
        try:
            while True:
                self._say("alive")
                self._hear()
                beat = self._beats([neighbour])[neighbour].get("beat", -1)
                if beat != heard:
                    heard, silent_since, reported = beat, time.monotonic(), False
                elif not reported and time.monotonic() - silent_since > _STALL_SECONDS:
                    log.error("rank %d has not been heard from for %.0f s", neighbour, _STALL_SECONDS)
                    reported = True
                if self.verdict is None and time.monotonic() - self.moved > self.patience:
                    self._judge_stall()
                if self.verdict is not None and self._end(*self.verdict):
                    return
                if self._stop.wait(self.beat):
                    return
        except RuntimeError:  # the store's host is gone
            self.store_lost = True

    def posts(self, name: str) -> dict[int, Mapping[str, Any]]:
        """What each rank has posted under ``name``, as of its last beat."""
        beats = self._beats(range(self.world))
        return {rank: beat["posts"][name] for rank, beat in beats.items() if name in beat.get("posts", {})}

    def _judge_stall(self) -> None:
        """Publish which ranks keep the others from going on: gone, or at an earlier collective than the rest of a group."""
        everyone = list(range(self.world))
        before, deadline = self._beats(everyone), time.monotonic() + _LOOK_SECONDS
        while True:  # there is time to tell a slow rank from a dead one
            self._say("alive")
            after = self._beats(everyone)
            gone = [r for r in everyone if after[r].get("state") != "left" and before[r].get("beat") == after[r].get("beat")]
            if not gone or time.monotonic() > deadline:
                break
            if self._stop.wait(self.beat):
                return
        places = {r: beat.get("at", {}) for r, beat in after.items()}
        most = {name: max(at[name][0] for at in places.values() if name in at) for at in places.values() for name in at}
        late = [r for r, at in places.items() if any(at[name][0] < most[name] for name in at)]
        waited = f"the job has stood still for {self.patience:g} s"
        if gone:
            text = f"{waited}: {format_ranks(gone)} died (no sign of life)"
        elif late:
            text = f"{waited}: {format_ranks(late)} did not come to the collective that the others wait in"
        else:
            text = f"{waited}, although every rank has come to the same collective"
        self.store.compare_set(_VERDICT, "", json.dumps([text, gone or late]))
        self._hear()

    def _end(self, text: str, ranks: Sequence[int]) -> bool:
        """After a verdict: a rank that it names, or one that stalls, says where it stands; one that does not end by itself
        (guarded jobs only) is ended. Whether the thread is done."""
        stalled = self.patience != float("inf")
        if self.rank in ranks or stalled:
            print(f"rank {self.rank}: {text}; where the threads of rank {self.rank} stand:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if not stalled:
            return self._stop.is_set()
        if not self._stop.wait(_LAST_WORDS):
            os._exit(1)
        return True

    def _hear(self) -> None:
        if self.verdict is None and self.store.check([_VERDICT]):
            text, ranks = json.loads(self.store.get(_VERDICT))
            self.verdict = (text, ranks)
            self.store.set(f"{_PREFIX}heard/{self.rank}", "1")

    def _beats(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        keys = {r: f"{_PREFIX}{r}" for r in ranks}
        return {r: json.loads(self.store.get(key)) if self.store.check([key]) else {} for r, key in keys.items()}

    def diagnose(self, group: ProcessGroup, op: str, error: BaseException) -> RankFailure:
        """What to raise for a collective of ``group`` that failed with ``error``."""
        head = f"rank {self.rank}: {op} failed"
        for _ in range(2):  # the thread may be about to hear a verdict
            if self.verdict is None and not self.store_lost:
                time.sleep(self.beat)
        if self.verdict is None and not self.store_lost:
            # in a thread: a store whose host stands still answers nothing, and its client waits for ever
            judge = threading.Thread(target=self._judge, args=(group, op), name="race-dist-judge", daemon=True)
            judge.start()
            judge.join(4 * _LOST_BEATS * self.beat + _LAST_WORDS)
            self.store_lost |= judge.is_alive()
        if self.verdict is not None:
            text, ranks = self.verdict
            return RankFailure(f"{head}: {text} [{_first_line(error)}]", ranks)
        if self.store_lost:
            of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            host = "the launcher's agent" if of_launcher else "rank 0"
            return RankFailure(
                f"{head}: {host} died, has already ended or stands still, and with it the store through which "
                f"ranks find each other [{_first_line(error)}]",
                [0] if self.rank and not of_launcher else [],
            )
        return RankFailure(f"{head}, although every rank of its group lives and has come to it [{_first_line(error)}]")

    def _judge(self, group: ProcessGroup, op: str) -> None:
        """Find out who is missing and publish it, unless another rank has done so first."""
        try:
            self._look_for_missing(group, op)
        except RuntimeError:
            self.store_lost = True

    def _look_for_missing(self, group: ProcessGroup, op: str) -> None:
        others = [r for r in dist.get_process_group_ranks(group) if r != self.rank]
        before = self._beats(others)
        time.sleep(_LOST_BEATS * self.beat)
        after = self._beats(others)
        gone = [r for r in others if after[r].get("state") != "left" and before[r].get("beat") == after[r].get("beat")]
        left = [r for r in others if after[r].get("state") == "left"]
        mine, name = self.progress[group.group_name][0], group.group_name
        late = [r for r in others if r not in gone + left and after[r].get("at", {}).get(name, (0, ""))[0] < mine]
        if gone:
            found, text = gone, f"{format_ranks(gone)} died (no sign of life)"
        elif left:
            found, text = left, f"{format_ranks(left)} had already left the job"
        elif late:
            found, text = late, f"{format_ranks(late)} did not come to it within the group's timeout"
        else:
            return
        self.store.compare_set(_VERDICT, "", json.dumps([text, found]))
        self._hear()
        deadline = time.monotonic() + 2 * _LOST_BEATS * self.beat
        alive = [r for r in others if r not in gone + left]
        while time.monotonic() < deadline:  # the store may end with this process: let the others hear first
            if self.store.check([f"{_PREFIX}heard/{r}" for r in alive]):
                break
            time.sleep(self.beat / 4)


_posts: dict[str, Callable[[], Mapping[str, Any]]] = {}  # of this process
_current: Watch | None = None  # one a process, like the default store it beats in


def watch() -> Watch:
    """The watch of this process's default store, started on first use."""
    global _current  # noqa: PLW0603
    if _current is None or _current.main_store is not dist.distributed_c10d._get_default_store():
        if _current is not None:
            _current.close()
        _current = Watch()
    return _current


def abort_on_stall(seconds: float) -> None:
    """End this process with code 1 when it has come to no collective for so long, and name the rank that is missing.

    For jobs whose every step has collectives. Choose more than the collectives' timeout, which raises an error that can be
    handled wherever the host waits for them itself. One process has nobody to wait for.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        guard = watch()
        guard.patience, guard.moved = seconds, time.monotonic()


def publish(name: str, tell: Callable[[], Mapping[str, Any]]) -> None:
    """Let the other ranks see what ``tell()`` returns (of JSON types), every few seconds; no collective, no waiting."""
    _posts[name] = tell


def published(name: str) -> dict[int, Mapping[str, Any]]:
    """What the ranks have posted under ``name``, by rank; some may be missing for a few seconds."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return {0: _told(_posts[name])} if name in _posts else {}
    try:
        return watch().posts(name)
    except RuntimeError:  # the store's host is gone, which the next collective says better
        return {}


def _told(tell: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return dict(tell())
    except Exception:  # whatever a reading runs into, the watch goes on
        log.exception("a reading for the other ranks failed")
        return {}


def stop_watchdog() -> None:
    """End the watch; the other ranks see that this one left."""
    global _current  # noqa: PLW0603
    if _current is not None:
        _current.close(leave=True)
        _current = None


@contextmanager
def watched(group: ProcessGroup, op: str, *, enter: bool = True) -> Iterator[None]:
    """Turn a backend's error or timeout inside the block into a :class:`RankFailure` that names the rank."""
    guard = watch()
    if enter:
        guard.enter(group, op)
    try:
        yield
    except RankFailure:
        raise
    except RuntimeError as error:
        raise guard.diagnose(group, op, error) from error


def format_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 3, 5``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
