"""Callbacks of the trainers: a progress bar, and metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llm2comp.system.console import Bar
from llm2comp.system.files import explain_disk_errors, to_json, write_text

METRICS_FILE = "metrics.jsonl"


class TokenCounter:
    """Text tokens that a stage has read, padding not counted, since this process began it."""

    def __init__(self) -> None:
        self.tokens, self._begin = 0, time.monotonic()

    def start(self) -> None:
        """Start the clock."""
        self.tokens, self._begin = 0, time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self._begin += seconds

    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / max(1e-9, time.monotonic() - self._begin)


class ProgressCallback(TrainerCallback):
    """One bar per stage, with loss and tokens per second."""

    def __init__(self, name: str, counter: TokenCounter) -> None:
        self.name, self.counter, self.loss = name, counter, ""
        self.bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar at the step that a resumed stage stands at."""
        self.counter.start()
        if state.is_world_process_zero:
            self.bar = Bar(self.name, state.max_steps, state.global_step).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.advance(1, self._note())

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Show the loss, which is logged after the end of its step."""
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f} "
            if self.bar is not None:
                self.bar.advance(0, self._note())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)

    def _note(self) -> str:
        return f"{self.loss}{self.counter.rate():,.0f} tokens/s"


class StepLines:
    """A file of JSON lines, each with its `step`; grows during a stage and survives a kill."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def begin(self, step: int) -> list[dict[str, Any]]:
        """Keep the lines up to the step that training goes on from; none at 0.

        A killed run wrote some beyond it.
        """
        kept = [row for row in self.read() if row["step"] <= step] if step > 0 else []
        write_text(self.file, "".join(f"{to_json(row)}\n" for row in kept))
        return kept

    def read(self) -> list[dict[str, Any]]:
        """All lines; none where there is no file. A last line that a kill cut off is left out."""
        if not self.file.exists():
            return []
        *lines, rest = self.file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines]

    def add(self, row: dict[str, Any]) -> None:
        """Append one line."""
        with explain_disk_errors(self.file), self.file.open("a", encoding="utf-8") as out:
            out.write(to_json(row) + "\n")


class MetricsCallback(TrainerCallback):
    """A line per log in metrics.jsonl.

    step, loss, learning_rate, grad_norm, tokens_per_second.
    """

    def __init__(self, folder: Path, counter: TokenCounter) -> None:
        self.lines, self.counter = StepLines(folder / METRICS_FILE), counter

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on behind the last line that counts."""
        if state.is_world_process_zero:
            self.lines.begin(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs and "loss" in logs:
            row: dict[str, Any] = {"step": state.global_step}
            row |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            self.lines.add(row | {"tokens_per_second": round(self.counter.rate(), 1)})
