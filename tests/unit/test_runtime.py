import logging
import os
import pty
import re
import subprocess
import sys

from universality import runtime

SCRIPT = """
import time
from universality.runtime import configure, progress
configure(1, None)
for _ in progress(range(20), "sheep", total=30, done=10):
    time.sleep(0.02)
"""


def test_without_a_terminal_progress_is_plain_lines_with_rate_and_time_left():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert re.fullmatch(r"\d\d:\d\d:\d\d sheep: 30/30, [\d.]+/s, 0 s left\n", run.stderr)


def shown_on_a_terminal(script: str) -> str:
    ours, theirs = pty.openpty()
    run = subprocess.Popen([sys.executable, "-c", script], stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert run.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_on_a_terminal_progress_is_a_bar():
    assert re.search(r"sheep.*━.*30/30.*/s.*\d:\d\d:\d\d", shown_on_a_terminal(SCRIPT))


def test_jobs_with_a_log_file_share_the_terminal_in_lines_with_a_bar(tmp_path):
    script = SCRIPT.replace("None", f"__import__('pathlib').Path({str(tmp_path / 'job.log')!r})")
    text = shown_on_a_terminal(script)
    assert "━" not in text
    assert f"sheep: [{'#' * 24}] 30/30" in text
    assert "30/30" in (tmp_path / "job.log").read_text()


def test_lines_come_at_intervals_with_the_right_rate(monkeypatch):
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(runtime.time, "monotonic", lambda: float(next(clock)))
    lines: list[str] = []  # of a handler of its own: what other tests left attached makes no difference
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    for name, value in {"handlers": [handler], "propagate": False, "level": logging.INFO, "_cache": {}}.items():
        monkeypatch.setattr(runtime.log, name, value)
    assert list(runtime.progress(range(10), "items")) == list(range(10))
    # one item every four seconds, a line at least ten seconds after the last one, and at the end
    assert [line.split(",")[0] for line in lines] == [
        "items: 3/10", "items: 6/10", "items: 9/10", "items: 10/10",
    ]  # fmt: skip
    assert "0.2/s, 28 s left" in lines[0]


def test_threads_are_set_for_every_library_and_messages_go_to_the_log(tmp_path):
    code = (
        "from pathlib import Path; from universality.runtime import configure, deterministic_torch, log\n"
        f"configure(2, Path({str(tmp_path / 'deep' / 'job.log')!r})); log.info('said')\n"
        "import numba; torch = deterministic_torch(2)\n"
        "assert torch.get_num_threads() == 2 and numba.config.NUMBA_NUM_THREADS == 2\n"
        "assert torch.are_deterministic_algorithms_enabled()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.endswith("said\n")
    assert (tmp_path / "deep" / "job.log").read_text().endswith("said\n")
