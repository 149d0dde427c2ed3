"""Runs of a study in which jobs are killed."""

import os
import shutil
import signal
import subprocess
import time

import psutil

from tests.workflow.project import Project, environment

# In an order in which hardly any job of a stage is run before its turn.
STAGES = (
    "corpus", "models", "circuits", "activations", "saes", "features", "alignment", "ablation", "analysis", "report",
)  # fmt: skip


def stage_of(process: psutil.Process) -> str | None:
    """The stage a `universality` process works on; None for any other process."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return None
    names = [os.path.basename(part) for part in command[:2]]
    return command[names.index("universality") + 1] if "universality" in names and "python" in names[0] else None


def run_and_kill(project: Project, stage: str, log, *arguments: str) -> int:
    """Run Snakemake and kill -9 the first job of `stage` soon after it began; the exit status of Snakemake."""
    with open(log, "a") as out:
        run = subprocess.Popen(
            ["snakemake", *arguments], cwd=project.folder, env=environment(), stdout=out, stderr=subprocess.STDOUT
        )
        killed = False
        while run.poll() is None:
            if not killed:
                for child in psutil.Process(run.pid).children(recursive=True):
                    if stage_of(child) == stage:
                        time.sleep(0.5)
                        if child.is_running():
                            child.send_signal(signal.SIGKILL)
                            killed = True
                        break
            time.sleep(0.05)
    assert killed, f"no job of {stage} was seen"
    return run.returncode


def kill_a_job_of_every_stage(project: Project, log) -> None:
    """Runs of a new study, each until a job of the next stage is killed."""
    for stage in STAGES:
        shutil.rmtree(project.folder / "results" / stage, ignore_errors=True)  # earlier rounds may have made it already
        assert run_and_kill(project, stage, log) != 0, stage
