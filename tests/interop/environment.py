"""Environments of the libraries that ours is compared with, which need other versions than ours."""

import fcntl
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def peer_python(library: str) -> Path:
    """The interpreter of the library's environment .venv-LIBRARY, made anew if it was not made from the lock file of
    today, LIBRARY/requirements.lock beside this file. Skips the test, with the reason, if it cannot be made.

    What is pinned to the version that runs the tests, torch first of all, is not installed a second time: the
    environment looks for it in ours, after its own.
    """
    requirements = Path(__file__).parent / library.replace("-", "_") / "requirements.lock"
    environment = ROOT / f".venv-{library}"
    python, ready = environment / "bin" / "python", environment / ".ready"
    own = [pin for pin in _pins(requirements) if not _is_ours(pin)]
    made_from = hashlib.sha256("\n".join([sys.prefix, *own]).encode()).hexdigest()
    with requirements.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # workers share the environment: one makes it, the others wait
        if not ready.is_file() or ready.read_text() != made_from:
            shutil.rmtree(environment, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            # Most of what is installed is never imported: Python compiles the rest as it comes to it.
            install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", *own]
            made = subprocess.run(install, capture_output=True, text=True)
            if made.returncode != 0:
                errors = [line for line in made.stderr.splitlines() if line.startswith("ERROR")]
                pytest.skip(f"the environment of {library} cannot be made: {(errors or [made.stderr.strip()])[-1]}")
            [packages] = environment.glob("lib/python*/site-packages")
            (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
            ready.write_text(made_from)
    return python


def _pins(requirements: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in requirements.read_text().splitlines())
    return [line for line in lines if "==" in line]


def _is_ours(pin: str) -> bool:
    """Is the very version installed here?"""
    name, _, version = pin.partition("==")
    try:
        return importlib.metadata.version(name).partition("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False
