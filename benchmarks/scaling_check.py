"""The formulas against this machine: one process per case, a small model on the CPU in float32, the trainers' own losses.

Predicted seconds = FLOPs of the step, recomputation included / rate of the model's own products, measured in turns with it.
So measured / predicted says how much longer a step takes than its matrix products. One thread, and the best of some rounds, for
other programs on the machine slow a round down and never speed it up.
`python -m benchmarks.scaling_check CASE` prints one case as JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.contrastive import our_contrastive, scl, ucl
from benchmarks.encoding import live_model, our_side
from benchmarks.inputs import make_lm
from benchmarks.scaling_costs import Load, Way, memory_bytes, sample_flops
from benchmarks.scaling_inputs import Assumed, model_of
from benchmarks.settings import CPU, SMALL_LLAMA, TINY_LLAMA, Setting
from benchmarks.sides import Side
from benchmarks.training import UNUSED, our_pretext
from benchmarks.work import Gemm
from benchmarks.worker import environment, peak_bytes
from llm2comp.backbone.quiet import quiet_libraries
from llm2comp.console import say
from llm2comp.recipe import PretextStage

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
SHAPE = replace(SMALL_LLAMA, layers=4, vocabulary=8000)
SETTING = replace(CPU, name="check", shape=SHAPE, pretext_steps=1, ucl_texts=32, scl_triples=8, encode_texts=(32, 32, 8))


def _middle(bounds: tuple[int, int]) -> int:
    return sum(bounds) // 2


def _pretext(setting: Setting, again: bool) -> tuple[Side, Load]:
    changes = {"data": UNUSED, "gradient_checkpointing": again, "site_margin_tokens": 10}
    load = Load(PretextStage.model_validate(changes), (_middle(setting.pretext_lengths),), 0, 1, setting.pretext_texts)
    return our_pretext(replace(setting, checkpointing=again)), load


def _ucl(setting: Setting, again: bool) -> tuple[Side, Load]:
    stage, columns = ucl(setting)
    stage = stage.model_copy(update={"mini_batch_size": setting.ucl_texts // 4 if again else None})
    return our_contrastive(setting, stage, columns), Load(stage, (_middle(setting.ucl_lengths),) * 2, 0, 1, setting.ucl_texts)


def _scl(setting: Setting, again: bool) -> tuple[Side, Load]:
    stage, columns = scl(setting, setting.scl_triples, setting.scl_triples // 4 if again else None)
    lengths = (_middle(setting.scl_query), *(_middle(setting.scl_passage),) * 2)
    return our_contrastive(setting, stage, columns), Load(stage, lengths, 0, 1, setting.scl_triples)


def _encode(setting: Setting, _: bool) -> tuple[Side, Load]:
    return our_side(setting, "long", live_model(setting)), Load(None, (512,), 512, 1, setting.encode_batch)


CASES: dict[str, tuple[Callable[[Setting, bool], tuple[Side, Load]], bool]] = {
    "pretext": (_pretext, False),
    "pretext, checkpointing": (_pretext, True),
    "ucl": (_ucl, False),
    "ucl, GradCache": (_ucl, True),
    "scl": (_scl, False),
    "scl, GradCache": (_scl, True),
    "encode": (_encode, False),
}


def at_once(load: Load) -> int:
    """Texts whose graphs stand together: without GradCache all columns of the batch."""
    mini: int | None = getattr(load.stage, "mini_batch_size", None)
    return min(mini or load.batch * len(load.columns), load.batch * len(load.columns))


@dataclass(frozen=True)
class Found:
    """One case: seconds of a step and bytes above the process with a tiny model's step behind it."""

    predicted_seconds: float
    seconds: float
    predicted_bytes: float
    bytes: float
    gflops: float  # rate of the products


def measure(case: str, setting: Setting) -> Found:
    """Peak of the first step in this process (a fresh one), then the best of timed steps and of products, in turns."""
    build, again = CASES[case]
    build(replace(setting, shape=TINY_LLAMA), again)[0].run()  # what libraries take once
    gc.collect()
    idle = psutil.Process().memory_info().rss
    side, load = build(setting, again)
    side.run()
    peak = peak_bytes(setting) - idle
    way = Way("float32", "DDP", 1, again and isinstance(load.stage, PretextStage), at_once(load))
    counted, done = sample_flops(setting.shape, load, way, setting.memory_tokens)
    lengths = sorted(load.columns)[-1 if way.at_once <= load.batch else 0 :]
    model = model_of("check", setting.shape, make_lm(replace(setting, device="meta"), "sdpa"))
    mean = sum(lengths) / len(lengths)
    expected = memory_bytes(model, load, way, Assumed(memory_tokens=setting.memory_tokens, contrastive=1.0), mean)
    gemm = Gemm(setting.shape, 1024, torch.float32, "cpu")
    seconds, rates = [], []
    for _ in range(ROUNDS):
        rates.append(gemm.rate())
        begin = time.perf_counter()
        _, model_flops = side.run()
        seconds.append(time.perf_counter() - begin)
    return Found(model_flops * done / counted / max(rates), min(seconds), expected, peak, max(rates) / 1e9)


def check(setting: Setting = SETTING) -> None:
    """Measure every case and print the table."""
    facts = environment(setting)
    lines = ["| step | seconds: predicted | measured | ratio | MB: predicted | measured | ratio | products, GFLOP/s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.scaling_check", case]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found = Found(**json.loads(done.stdout))
        times, sizes = (found.predicted_seconds, found.seconds), (found.predicted_bytes / 1e6, found.bytes / 1e6)
        cells = [f"{times[0]:.2f}", f"{times[1]:.2f}", f"{times[1] / times[0]:.2f}"]
        cells += [f"{sizes[0]:,.0f}", f"{sizes[1]:,.0f}", f"{sizes[1] / sizes[0]:.2f}", f"{found.gflops:,.0f}"]
        lines.append(f"| {case} | {' | '.join(cells)} |")
        say(lines[-1])
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value is not None))
    print("\n".join(lines))


def main() -> None:
    """As the module's docstring says."""
    quiet_libraries()
    torch.set_num_threads(1)
    found: Any = measure(sys.argv[1], SETTING)
    print(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
