"""A run of a study in which jobs are killed."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.workflow.project import Project, environment

STAGES = (
    "corpus", "models", "activations", "saes", "features", "alignment", "circuits", "ablation", "analysis", "report",
)  # fmt: skip


def stage_of(process: psutil.Process) -> str | None:
    """The stage a `universality` process works on; None for any other process."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return None
    names = [os.path.basename(part) for part in command[:2]]
    return command[names.index("universality") + 1] if "universality" in names and "python" in names[0] else None


def kill_a_job_of_every_stage(project: Project, log: Path) -> None:
    """One run of a new study in which the first job of each stage is killed by kill -9 soon after it began, and tried
    again; what Snakemake printed is in `log`."""
    left = set(STAGES)
    with open(log, "w") as out:
        run = subprocess.Popen(
            ["snakemake", "--retries", "1"], cwd=project.folder, env=environment(), stdout=out, stderr=subprocess.STDOUT
        )
        while run.poll() is None:
            for child in psutil.Process(run.pid).children(recursive=True):
                stage = stage_of(child)
                if stage in left:
                    time.sleep(0.5)
                    if child.is_running():
                        child.send_signal(signal.SIGKILL)
                        left.remove(stage)
            time.sleep(0.05)
    assert not left, f"no jobs of {sorted(left)} were seen"
    assert run.returncode == 0
