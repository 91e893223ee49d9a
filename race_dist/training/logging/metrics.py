"""The metrics of a run: records in metrics.jsonl and TensorBoard, and a progress bar or lines on the screen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from race_dist.terminal import plain_console
from race_dist.training.logging.metrics_file import read_metrics, truncate_metrics
from race_dist.training.logging.writers import JsonlWriter, TensorBoardWriter, WriteErrors

__all__ = ["UNIFORM_BITS", "Metrics", "nats_to_bits", "read_metrics"]
UNIFORM_BITS = 8.0  # bits per byte of a uniform distribution


def nats_to_bits(nats: float) -> float:
    """A loss in bits, from nats. For byte tokens these are bits per byte."""
    return nats / math.log(2)


class Metrics:
    """Writes each record as one line of JSON and shows it: a progress bar on a terminal, plain lines elsewhere.

    Only one rank makes one. A record has ``step`` and ``kind`` ("train", "eval" or "event"). Every record is written at once,
    so that a run that crashes leaves its metrics. NaN and Inf become null. Write errors are reported and do not end the run.

    Attributes:
        seconds_before: seconds that the run had taken before it was resumed.
        write_errors: reports write errors, also those of other files of the run.

    Args:
        path: of the file. Records of later steps than ``after``, from before a resume, are removed.
        steps: of the run.
        console: to print to.
        after: the step after which the run resumes.
        board: a folder for TensorBoard, or None.
    """

    def __init__(
        self, path: Path, steps: int, console: Console | None = None, *, after: int = 0, board: Path | None = None
    ) -> None:
        self.console = console or plain_console()
        self.write_errors = WriteErrors(lambda sentence: self.say([sentence]))
        self._board = None if board is None else TensorBoardWriter(board, after, self.write_errors)
        kept, damaged = truncate_metrics(path, after, self.write_errors)
        if damaged:
            self.say([f"{path}: {damaged} damaged line{'s are' if damaged > 1 else ' is'} left out"])
        self._evaluated = {r["step"] for r in kept if r["kind"] == "eval"}
        self.seconds_before = max((r["seconds"] or 0.0 for r in kept if "seconds" in r), default=0.0)
        self._file = JsonlWriter(path, self.write_errors)
        self._held_out = math.nan
        self._steps = steps
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def say(self, lines: Iterable[str]) -> None:
        """Print lines without markup."""
        for line in lines:
            self.console.print(line, soft_wrap=True, markup=False)

    def train(self, step: int, record: dict[str, float]) -> None:
        """Record a training step: ``loss`` in nats, ``bpb``, ``lr``, ``grad_norm``, ``tokens_per_second``, ``seconds``,
        ``peak_bytes``; ``mfu`` if the device's peak is known; and further values."""
        self._write({"kind": "train", "step": step, **record})
        text = f"{record['bpb']:.3f} bits/byte, {_number(record['tokens_per_second'])} tokens/s"
        if "mfu" in record:
            text += f", {record['mfu']:.1%} of peak"
        if "peak_bytes" in record and self.console.is_terminal:
            text += f", {record['peak_bytes'] / 2**30:.1f} GiB"
        if self.console.is_terminal:
            held_out = "" if math.isnan(self._held_out) else f", held out {self._held_out:.3f}"
            self._bar.update(self._task, completed=step, description=text + held_out)
        else:
            self._line(step, text)

    def evaluation(self, step: int, record: dict[str, float]) -> None:
        """Record an evaluation on held-out text: ``loss`` in nats, ``bpb``, ``tokens``."""
        if step not in self._evaluated:  # a run that is resumed after its last step evaluates again
            self._write({"kind": "eval", "step": step, **record})
        self._held_out = record["bpb"]
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step)
        else:
            self._line(step, f"held out: {record['bpb']:.3f} bits/byte")

    def event(self, step: int, what: str, text: str = "", *, quiet: bool = False) -> None:
        """Record an event, and print it unless ``quiet``."""
        self._write({"kind": "event", "step": step, "what": what, **({"text": text} if text else {})})
        if not quiet:
            self.say([f"step {step}: {what}{': ' if text else ''}{text}"])

    def _line(self, step: int, text: str) -> None:
        width = len(str(self._steps))
        self.console.print(f"step {step:{width}d}/{self._steps}  {text}", soft_wrap=True)

    def _write(self, record: dict[str, Any]) -> None:
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}  # JSON has no NaN
        self._file.write(record)
        if self._board is not None:
            self._board.write(record)


def _number(value: float) -> str:
    """A number in three or four characters: 950, 12.3k, 4.56M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"
