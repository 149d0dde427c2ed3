"""Style, types, workflow formatting and workflow lint are clean."""

import subprocess

import pytest

from tests.workflow.project import ROOT, environment

pytestmark = pytest.mark.xdist_group("lint")  # not at the very end, as in test_killed_training.py


@pytest.mark.parametrize(
    "command",
    [
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "snakefmt --check Snakefile rules",
        "python tools/lint_workflow.py",
    ],
)
def test_lint(command):
    run = subprocess.run(command.split(), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert command in (ROOT / "Makefile").read_text()
