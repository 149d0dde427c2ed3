"""One finished and recorded smoke study, which the workflow tests look at and start from."""

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from tests.workflow.killing import kill_a_job_of_every_stage
from tests.workflow.project import Project, commit, new_project


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id) -> Path:
    """A folder with the smoke study after `make run` and `make record`, pushed to a remote in a local folder: `a` to
    look at, `untouched` to copy. A job of every stage is killed on the way: what these runs printed is in killed.log,
    what the one that completed did in run.log. The first worker that asks makes it, others wait."""
    shared = tmp_path_factory.getbasetemp()
    base = (shared if worker_id == "master" else shared.parent) / "finished"
    with FileLock(base.with_suffix(".lock")):
        if not base.exists():
            base.mkdir()
            make(base)
        elif not (base / "untouched").exists():
            pytest.fail("the smoke study could not be made; another worker tells why")
    return base


def make(base: Path) -> None:
    project = new_project(base / "a")
    kill_a_job_of_every_stage(project, base / "killed.log")
    (base / "run.log").write_text(project.run("make", "run").stdout)
    project.run("make", "record")
    project.run("dvc", "remote", "add", "-d", "shared", str(base / "remote"))
    commit(project, "Record")
    project.run("dvc", "push")
    shutil.copytree(project.folder, base / "untouched.partial", symlinks=True)
    (base / "untouched.partial").rename(base / "untouched")


@pytest.fixture(scope="session")
def study(finished) -> Project:
    """The finished study. Not to be changed."""
    return Project(finished / "a")


@pytest.fixture(scope="session")
def untouched(finished) -> Project:
    """The same, in which no command is run at all, so that it may be copied at any time."""
    return Project(finished / "untouched")
