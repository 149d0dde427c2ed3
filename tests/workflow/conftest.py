"""One finished and recorded smoke study, which the workflow tests look at and start from."""

import pytest

from tests.workflow.project import Project, commit, new_project


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Project:
    """The smoke study after `make run` and `make record`, pushed to a remote in a local folder. Not to be changed."""
    base = tmp_path_factory.mktemp("study")
    project = new_project(base / "a")
    project.run_log = project.run("make", "run").stdout  # type: ignore[attr-defined]
    project.run("make", "record")
    project.run("dvc", "remote", "add", "-d", "shared", str(base / "remote"))
    commit(project, "Record")
    project.run("dvc", "push")
    return project
