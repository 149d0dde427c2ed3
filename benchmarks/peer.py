"""A peer library in a process and an environment of its own, which does one thing at a time when asked to."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-sae-lens"


class Peer:
    """Runs benchmarks/peers/{script}.py; `ask` sends a command and waits for the answer."""

    def __init__(self, script: str, job: dict, python: Path = ENVIRONMENT / "bin" / "python"):
        if not python.exists():
            sys.exit(f"{python}: is missing; `pytest tests/interop/test_sae_lens.py` makes the peers' environment")
        command = [python, Path(__file__).parent / "peers" / f"{script}.py"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.ask(json.dumps(job))

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"{self._process.args}: ended at {line[:40]!r}:\n{self._errors.read()[-2000:]}")
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
