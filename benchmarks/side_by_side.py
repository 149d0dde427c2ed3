"""Time several ways of doing one thing in turn, so that whatever else the machine does falls on all of them."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numba
import torch

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # as commands have it; read when arrow is loaded


def use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)


def in_turn(ways: dict[str, Callable[[], object]], rounds: int, warm: bool = False) -> dict[str, list[float]]:
    """Seconds of each way in each round; unless they are `warm`, a first round, of compilation, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(0 if not warm else 1, rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def table(times: dict[str, list[float]], units: int, unit: str) -> None:
    """Medians: milliseconds and units a second."""
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:44s} {1e3 * median:10.1f} ms {units / median:12.0f} {unit}/s")


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Median over rounds of theirs / ours."""
    return statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))


def peak_memory(way: Callable[[], object]) -> float:
    """MiB by which `way` raises the resident memory at its peak, as Linux counts it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier work left in the allocator
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    kept = way()
    peak = _status("VmHWM")
    del kept
    return (peak - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
