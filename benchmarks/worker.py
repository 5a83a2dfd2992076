"""One measurement, for a process of its own: `measured`.

Without a side: all sides of the row, held against each other, warmed up, then timed in interleaved
rounds. With a side: the peak memory of that side alone. With `prepare` or `about` for a side: the
row's preparation; its facts.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.rows import ROWS
from benchmarks.settings import SETTINGS, Setting
from benchmarks.sides import Row, Side
from benchmarks.work import Gemm, synchronise
from llm2comp.model.backbone.quiet import quiet_libraries
from llm2comp.system.console import console

PREPARE, ABOUT = "prepare", "about"


def peak_bytes(setting: Setting) -> int:
    """Most memory that this process has held so far: of the device, or of the process where that is
    the CPU.
    """
    if setting.device != "cpu":
        return torch.cuda.max_memory_allocated(setting.device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would start from the parent's peak
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_peak(row: Row, side: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """Peak above the idle process, which has all imports behind it and no model yet; one timed
    unit, no warm-up.
    """
    idle = psutil.Process().memory_info().rss if setting.device == "cpu" else 0
    row.sides[side](setting, folder).run()
    return {"peak_bytes": peak_bytes(setting) - idle, "idle_bytes": idle}


def half(side: Side) -> bool:
    """Whether a side multiplies in half precision."""
    return side.dtype in (torch.bfloat16, torch.float16)


def differences(row: Row, sides: dict[str, Side]) -> dict[str, float]:
    """Error of each side's check against the base's.

    Raises:
        SystemExit: two sides do not compute the same, so their speeds must not be compared.
    """
    base = sides[row.base]
    if row.differ is None or base.check is None:
        return {}
    expected, found = base.check(), {}
    for name, side in sides.items():
        if name != row.base and side.check is not None:
            error, limit = row.differ(side.check(), expected), row.limits[half(side) or half(base)]
            if not error <= limit:
                problem = f"{name} does not compute what {row.base} does"
                raise SystemExit(f"{problem}: expected an error ≤ {limit}, found {error:.3g}")
            found[name] = error
    return found


def measure_times(row: Row, setting: Setting, folder: Path) -> dict[str, Any]:
    """Tokens per second and MFU of every side in every round; the order rotates from round to
    round.
    """
    sides = {name: build(setting, folder) for name, build in row.sides.items()}
    differ = differences(row, sides)
    positions = row.gemm_rows(setting)
    dtypes = sorted({side.dtype for side in sides.values()}, key=str) if positions else []
    gemms = {dtype: Gemm(setting.shape, positions, dtype, setting.device) for dtype in dtypes}
    for side in sides.values():
        if side.check is None:  # a check warms up as well
            side.run()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, list[float]] = {name: [] for name in sides}
    limits: dict[str, list[float]] = {str(dtype).removeprefix("torch."): [] for dtype in dtypes}
    for number in range(setting.pairs):
        limit = {dtype: gemm.rate() for dtype, gemm in gemms.items()}
        for dtype, rate in limit.items():
            limits[str(dtype).removeprefix("torch.")].append(rate)
        order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
        for name in order:
            synchronise(setting.device)
            begin = time.perf_counter()
            tokens, flops = sides[name].run()
            synchronise(setting.device)
            seconds = time.perf_counter() - begin
            rates[name].append(tokens / seconds)
            if flops and limit:
                used[name].append(flops / seconds / limit[sides[name].dtype])
    return {"tokens_per_second": rates, "mfu": used, "gemm_flops": limits, "difference": differ}


def environment(setting: Setting) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    packages = ("llm2comp", "torch", "transformers", "peft", "sentence-transformers")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(setting.device) if setting.device != "cpu" else None,
    }


def peaks_at_once(setting: Setting) -> int:
    """Processes beside each other that measure peaks, each with its share of the threads."""
    return 2 if setting.device == "cpu" else 1


def measured(name: str, row_name: str, folder: Path, side: str | None) -> dict[str, Any]:
    """As the module's docstring says.

    Raises:
        SystemExit: what the row needs is not here, or two of its sides differ.
    """
    setting, row = SETTINGS[name], ROWS[row_name]
    quiet_libraries()
    console.quiet = True  # no progress of what is timed
    if setting.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: run without --device cuda")
    if side == ABOUT:
        return environment(setting)
    if side == PREPARE:
        assert row.prepare is not None
        row.prepare(setting, folder)
        return {}
    if side is None:
        return measure_times(row, setting, folder)
    torch.set_num_threads(max(1, torch.get_num_threads() // peaks_at_once(setting)))
    return measure_peak(row, side, setting, folder)
