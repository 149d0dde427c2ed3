"""What every command shares while it runs: numerical threads, logging and progress."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

log = logging.getLogger("universality")
_PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal


def configure(threads: int, log_file: Path | None) -> None:
    """Fix the number of numerical threads, before any numerical library starts its own, and set logging up.

    The study decides on `threads`, never the scheduler: sums split over another number of threads give other bytes.
    """
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = str(threads)
    # Arrow's own allocator keeps what was freed, nearly a gigabyte after large codes. Read when arrow is loaded.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it a GPU's products are not deterministic
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; ours show rate and time left
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries; a failure is reported once, by us
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, mode="w", encoding="utf8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = handlers
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk say, must not hide the error itself


def deterministic_torch(threads: int):
    """Import torch with fixed threads and deterministic kernels; returns the module."""
    import torch

    torch.set_num_threads(threads)
    # use_deterministic_algorithms would set the same flag, and import torch's compiler: most of a second in every job.
    torch.set_deterministic_debug_mode("error")
    return torch


def progress(
    items: Iterable[T], what: str, total: int | None = None, done: int = 0, status: Callable[[], str] = str
) -> Iterator[T]:
    """Pass `items` on, showing how many are done, the rate and the time left, and what `status` says.

    A live bar on a terminal. Jobs with a log file share the terminal with others of the same run, and live bars would
    overwrite each other: they print a line with a bar now and then. Plain lines where there is no terminal.
    """
    if total is None:
        total = len(items) + done  # type: ignore[arg-type]
    has_log_file = any(isinstance(handler, logging.FileHandler) for handler in log.handlers)
    if sys.stderr.isatty() and not has_log_file:
        yield from _bar(items, what, total, done, status)
    else:
        yield from _lines(items, what, total, done, status)


def _bar(items: Iterable[T], what: str, total: int, done: int, status: Callable[[], str]) -> Iterator[T]:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[rate]:.1f}/s"), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[status]}")]
    from rich.console import Console

    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done, rate=0.0, status="")
        for count, item in enumerate(items, 1):
            yield item
            bar.update(task, advance=1, rate=count / max(time.monotonic() - start, 1e-9), status=status())


def _lines(items: Iterable[T], what: str, total: int, done: int, status: Callable[[], str]) -> Iterator[T]:
    start = last = time.monotonic()
    on_terminal = sys.stderr.isatty()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= _PLAIN_INTERVAL or done + count == total:
            rate = count / max(now - start, 1e-9)
            left = (total - done - count) / rate
            bar = _drawn_bar((done + count) / total) if on_terminal else ""
            said = f"; {status()}" if status() else ""
            log.info("%s: %s%d/%d, %.1f/s, %.0f s left%s", what, bar, done + count, total, rate, left, said)
            last = now


def _drawn_bar(share: float, width: int = 24) -> str:
    filled = round(share * width)
    return f"[{'#' * filled}{'.' * (width - filled)}] "


def progress_of_unknown_length(items: Iterable[T], what: str) -> Iterator[T]:
    """Pass `items` on, telling now and then how many there were and how fast they come."""
    start = last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= _PLAIN_INTERVAL:
            log.info("%s: %d, %.1f/s", what, count, count / max(now - start, 1e-9))
            last = now
