"""Compiled kernels are kept by their sources: for every checkout that has the same, and for no other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from universality.provenance import source_files

SRC = Path(__file__).parents[3] / "src"
INNER = """
import numba

@numba.njit
def double(x):
    return {factor} * x
"""
KERNEL = """
from universality.kernels.compiled import njit
from universality.kernels.inner import double

@njit()
def kernel(x):
    return double(x) + 1.0
"""


def checkout(folder: Path, factor: float = 2.0) -> Path:
    """What compiles, and one kernel with a function from another file."""
    for path in source_files(SRC, "universality.kernels.compiled"):
        (folder / path.relative_to(SRC)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(SRC))
    (folder / "universality/kernels/inner.py").write_text(INNER.format(factor=factor))
    (folder / "universality/kernels/planted.py").write_text(KERNEL)
    return folder


def run(folder: Path, **environment: str) -> tuple[float, int]:
    """kernel(3.0), and how many kernels were found compiled."""
    value, hits = ended(start(folder, "float64", **environment))
    return float(value), int(hits)


def ended(job: subprocess.Popen[str]) -> list[str]:
    output = job.communicate()[0]
    assert job.returncode == 0
    return output.split()


LINGERS = """
import time
from numba.core.caching import IndexDataCacheFile as File
save = File._save_index
File._save_index = lambda *index: (time.sleep(1), save(*index))
"""
"""Between reading the index and writing it anew."""


def start(folder: Path, *types: str, first: str = "", **environment: str) -> subprocess.Popen[str]:
    """A process that calls the kernel with 3 as a number of each type, having run the code `first`."""
    code = first + (
        "import sys, numpy as np; from universality.kernels.planted import kernel; found = 0\n"
        "for name in sys.argv[1:]: found = kernel(np.dtype(name).type(3))\n"
        "print(found, sum(kernel.stats.cache_hits.values()))"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *types], env=kept | {"PYTHONPATH": str(folder)} | environment,
        cwd=folder, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_checkouts_share_what_they_have_in_common(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert run(checkout(tmp_path / "a"), **cache) == (7.0, 0)
    assert run(tmp_path / "a", **cache) == (7.0, 1)
    assert run(checkout(tmp_path / "b"), **cache) == (7.0, 1)
    assert not list(tmp_path.glob("[ab]/**/*.nbi"))


def test_a_change_in_another_file_of_a_kernel_compiles_it_anew(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert run(checkout(tmp_path / "a"), **cache) == (7.0, 0)
    assert run(checkout(tmp_path / "a", factor=5.0), **cache) == (16.0, 0)
    assert run(checkout(tmp_path / "a"), **cache) == (7.0, 1)


def test_the_folder_can_be_named_and_need_not_be_writable(tmp_path):
    named = {"NUMBA_CACHE_DIR": str(tmp_path / "named")}
    assert run(checkout(tmp_path / "a"), **named) == (7.0, 0)
    assert run(checkout(tmp_path / "b"), **named) == (7.0, 1)
    (tmp_path / "file").touch()  # a folder can't be made below it, whoever asks
    without = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    assert run(tmp_path / "b", **without) == (7.0, 0)
    assert run(tmp_path / "b", **without) == (7.0, 1)
    assert list(tmp_path.glob("b/**/*.nbi"))


def test_jobs_that_compile_at_once_keep_each_others_kernels(tmp_path):
    cache, types = {"XDG_CACHE_HOME": str(tmp_path / "cache")}, ("float64", "float32", "int64", "int32")
    folder = checkout(tmp_path / "a")
    jobs = [start(folder, name, first=LINGERS, **cache) for name in types]
    assert [ended(job) for job in jobs] == [["7.0", "0"]] * 4
    assert ended(start(folder, *types, **cache)) == ["7.0", "4"]
