"""What a person sees: the console on standard error, progress bars, choices of options."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# under a launcher rank 0 speaks for all
console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
LINE_EVERY_SECONDS = 10.0


# The encoders that come with the package; commands take the first unless told otherwise.
GENERAL, GENERAL_TINY = "builtin:general", "builtin:general-tiny"


# What to do with texts over the model's limit.
LongTexts = Literal["truncate", "chunk-mean", "error"]
# What to do with rows that have no text.
BadRows = Literal["stop", "skip", "zero"]
# Which of the model's stored prompts to use.
Role = Literal["query", "document"]
# The type of weights and of the computation.
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# How an exported folder reads its memory states: the last alone, or all by their weights.
MemoryPooling = Literal["last", "mean"]
# What an exported folder is for.
Engine = Literal["sentence-transformers", "tei", "vllm", "llama.cpp"]
# Who puts a stored prompt before a text that is sent to a server: it, told the role, or its client.
Prompts = Literal["server", "client"]

# Where the processes are that embed: on this machine, or on a Ray cluster.
WorkersOn = Literal["local", "ray"]
# What a number of a stored embedding becomes, in the words of sentence-transformers: int8 and uint8
# are steps between a dimension's lowest and highest, binary and ubinary eight signs in a byte.
Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]


class Bar:
    """Progress of one long task: a bar on a terminal, a line every ten seconds elsewhere.

    with Bar("embed", total=1000) as bar:
        bar.advance(32, "1,234 tokens/s")

    `stays=False` removes the bar at the end (part of a longer task). `shown=False` shows nothing.
    With a `unit` ("texts") the note is how many of these are done in a second. Where the total is
    only estimated, `expect` tells it anew.
    """

    def __init__(
        self,
        name: str,
        total: int,
        done: int = 0,
        stays: bool = True,
        shown: bool = True,
        unit: str | None = None,
    ) -> None:
        self.name, self.total, self.done, self.note, self.stays, self.shown = (
            name,
            total,
            done,
            "",
            stays,
            shown,
        )
        self.unit = unit
        self._first, self._begin, self._last_line = done, time.monotonic(), 0.0
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Bar:
        """Start the clock and draw."""
        self._begin = self._last_line = time.monotonic()
        if self.shown and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            clocks = (TimeElapsedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, *clocks, console=console, transient=not self.stays)
            self._task = self._progress.add_task(
                self.name, total=self.total, completed=self.done, note=""
            )
            self._progress.start()
        return self

    def expect(self, total: int) -> None:
        """So many are to be done in all, as far as is known now."""
        self.total = total
        if self._progress is not None:
            self._progress.update(self._task, total=total)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """`count` more are done; `note` (loss, rate) stays until the next one."""
        self.done += count
        self.note = self.note if note is None else note
        if self.unit:
            spent = max(time.monotonic() - self._begin, 1e-9)
            self.note = f"{(self.done - self._first) / spent:,.0f} {self.unit}/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done, note=self.note)
        elif self.shown and time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._line()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen."""
        if self._progress is not None:
            self._progress.stop()
        elif self.shown and self.stays and kind is None and self.total:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        spent = self._last_line - self._begin
        left = spent / max(1, self.done - self._first) * (self.total - self.done)
        note = f"{self.note}, " if self.note else ""
        say(f"{self.name} {self.done:,}/{self.total:,}: {note}{spent:.0f} s, {left:.0f} s left")


def say(message: object) -> None:
    """One line (or a rich renderable) for the console; brackets in a line are no markup."""
    console.print(message, highlight=False, soft_wrap=True, markup=False, emoji=False)
