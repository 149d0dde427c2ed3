"""A killed job, and a killed Snakemake, cost nothing but time: the next run completes with the same bytes."""

import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from tests.workflow.project import Project, copy, environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruption")]


STAGES = ("corpus", "models", "activations", "saes", "features", "alignment", "circuits", "report")


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


def test_killed_jobs_run_again_to_the_same_bytes(untouched, tmp_path):
    project = copy(untouched, tmp_path / "copy")
    results = project.folder / "results"
    for stage in STAGES:
        shutil.rmtree(results / stage)
    (results / "metrics.json").unlink()
    for stage in STAGES:
        shutil.rmtree(results / stage, ignore_errors=True)  # earlier rounds may have made it already
        assert run_and_kill(project, stage, tmp_path / "log") != 0, stage
    completed = project.snakemake()
    assert project.result_hashes() == untouched.result_hashes(), completed.stdout[-3000:]
    partial = list(results.rglob(".*partial*"))
    assert partial == [], "leftovers of killed jobs"


def test_a_killed_snakemake_is_unlocked_and_goes_on(untouched, tmp_path):
    project = copy(untouched, tmp_path / "copy")
    shutil.rmtree(project.folder / "results" / "alignment")
    run = subprocess.Popen(["snakemake"], cwd=project.folder, env=environment(), start_new_session=True)
    while not any(stage_of(child) == "alignment" for child in psutil.Process(run.pid).children(recursive=True)):
        time.sleep(0.05)
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    project.snakemake("--unlock")
    project.snakemake()
    assert project.result_hashes() == untouched.result_hashes()
