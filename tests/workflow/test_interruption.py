"""A killed job, and a killed Snakemake, cost nothing but time: what is tried again completes with the same bytes.

A job of every stage was killed while the finished study was made; the audit in test_short_study.py finds the same bytes
without interruption.
"""

import os
import re
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from tests.workflow.killing import STAGES, stage_of
from tests.workflow.project import copy, environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workflow")]


def test_killed_jobs_leave_nothing_behind(study, finished):
    printed = (finished / "killed.log").read_text()
    failed = re.findall(r"^Error in rule (\w+):", printed, re.M)
    assert sorted(name.split("_")[0] for name in failed) == sorted(STAGES)
    assert not list((study.folder / "results").rglob(".*partial*"))


def test_a_killed_snakemake_is_unlocked_and_goes_on(study, untouched, tmp_path):
    project = copy(untouched, tmp_path / "copy")
    for folder in ("variants", "parts/variants"):  # of the two comparisons that which less follows from
        shutil.rmtree(project.folder / "results" / "alignment" / folder)
    run = subprocess.Popen(["snakemake"], cwd=project.folder, env=environment(), start_new_session=True)
    while not any(stage_of(child) == "alignment" for child in psutil.Process(run.pid).children(recursive=True)):
        time.sleep(0.05)
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    project.snakemake("--unlock")
    project.snakemake()
    assert project.result_hashes() == study.result_hashes()
