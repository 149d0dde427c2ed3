"""Two finished studies to look at and start from. Tests of one are one group of tests, so that each is made once."""

import shutil
from pathlib import Path

import pytest

from tests.workflow.killing import kill_a_job_of_every_stage
from tests.workflow.project import ROOT, Project, commit, new_project
from tests.workflow.short_study import write_short_study


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Project:
    """The smoke study after `make run`; run.log is what this printed. Not to be changed."""
    project = new_project(
        tmp_path_factory.mktemp("smoke") / "a",
        lambda folder: shutil.copy(ROOT / "studies" / "smoke.yaml", folder / "params.yaml"),
    )
    printed = project.run("make", "run").stdout
    (project.folder.parent / "run.log").write_text(printed)
    return project


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with the short study after a run and `make record`, pushed to a remote in a local folder: `a` to look
    at, `untouched` to copy, in which no command is ever run. A job of every stage is killed on the way and tried again:
    what the run printed is in killed.log."""
    base = tmp_path_factory.mktemp("finished")
    project = new_project(base / "a", write_short_study)
    kill_a_job_of_every_stage(project, base / "killed.log")
    project.run("make", "record")
    project.run("dvc", "remote", "add", "-d", "shared", str(base / "remote"))
    commit(project, "Record")
    project.run("dvc", "push")
    shutil.copytree(project.folder, base / "untouched", symlinks=True)
    return base


@pytest.fixture(scope="session")
def study(finished) -> Project:
    """The finished short study. Not to be changed."""
    return Project(finished / "a")


@pytest.fixture(scope="session")
def untouched(finished) -> Project:
    """The same, in which no command is run at all, so that it may be copied at any time."""
    return Project(finished / "untouched")
