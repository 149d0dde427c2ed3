"""Time several ways of doing one thing in turn, so that whatever else the machine does falls on all of them."""

import statistics
import threading
import time
from collections.abc import Callable

import numba
import psutil
import torch


def use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)


def in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; a first round, of compilation and allocation, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
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
    """MiB by which `way` raises the resident memory at its peak, sampled every millisecond."""
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    way()
    done.set()
    watcher.join()
    return (peak - before) / 2**20
