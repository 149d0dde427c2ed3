"""How kernels are compiled, and where what was compiled is kept: by its sources, for all checkouts of a user.

Compiling all kernels takes minutes. numba keeps what it compiled beside a kernel's file, and looks at that file only:
another checkout of the same code would compile everything again, and a change in a file that a kernel takes functions
from would go unseen.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding
import numba
from numba.core import caching

from universality.provenance import running_code


class BySources(caching.InTreeCacheLocator):
    """A folder for each module and state of the source files it imports, in $NUMBA_CACHE_DIR or the user's cache."""

    def __init__(self, py_func, py_file: str):
        self._py_file = py_file
        self._lineno = py_func.__code__.co_firstlineno
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "universality" / "kernels"
        name = f"{py_func.__module__}-{running_code(py_func.__module__)[:16]}"
        self._cache_path = str(Path(numba.config.CACHE_DIR or base) / name)

    @classmethod
    def from_function(cls, py_func, py_file: str):
        """None has numba keep it beside the kernel's file: where the folder can't be written, or a user has no home."""
        try:
            return super().from_function(py_func, py_file)
        except RuntimeError:
            return None


class _Cache(caching.FunctionCache):
    """numba's, in whose index jobs that compile at the same time would lose entries, or point at each other's code."""

    def _save_overload(self, sig, data) -> None:
        self._impl.locator.ensure_cache_path()
        with open(Path(self.cache_path) / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super()._save_overload(sig, data)


_LOCATORS = f"{__name__}.{BySources.__name__},InTreeCacheLocator,UserWideCacheLocator"


def njit(**options) -> Callable:
    """numba's njit with these options, its result kept on disk as said above."""

    def compiled(function: Callable) -> Callable:
        dispatcher = numba.njit(**options)(function)
        others, numba.config.CACHE_LOCATOR_CLASSES = numba.config.CACHE_LOCATOR_CLASSES, _LOCATORS
        try:
            dispatcher._cache = _Cache(function)
        finally:
            numba.config.CACHE_LOCATOR_CLASSES = others
        return dispatcher

    return compiled


def _use_wide_vectors() -> None:
    """Let the compiler use 512-bit vectors where the CPU has them; by default it holds to 256 on many that do."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f") and numba.config.CPU_FEATURES is None:
        numba.config.CPU_NAME = llvmlite.binding.get_host_cpu_name()
        numba.config.CPU_FEATURES = features.flatten() + ",-prefer-256-bit"


_use_wide_vectors()
