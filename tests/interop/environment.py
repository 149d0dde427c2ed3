"""Environments of the libraries that ours is compared with, which need other versions than ours."""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def peer_python(library: str) -> Path:
    """The interpreter of the library's environment .venv-LIBRARY, made anew if it was not made from the lock file of
    today, LIBRARY/requirements.lock beside this file. Skips the test, with the reason, if it cannot be made."""
    requirements = Path(__file__).parent / library.replace("-", "_") / "requirements.lock"
    environment = ROOT / f".venv-{library}"
    python, ready = environment / "bin" / "python", environment / ".ready"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    with requirements.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # workers share the environment: one makes it, the others wait
        if not ready.is_file() or ready.read_text() != digest:
            shutil.rmtree(environment, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            # Most of what is installed is never imported: Python compiles the rest as it comes to it.
            install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "-r", requirements]
            made = subprocess.run(install, capture_output=True, text=True)
            if made.returncode != 0:
                errors = [line for line in made.stderr.splitlines() if line.startswith("ERROR")]
                pytest.skip(f"the environment of {library} cannot be made: {(errors or [made.stderr.strip()])[-1]}")
            ready.write_text(digest)
    return python
