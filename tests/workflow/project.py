"""A copy of the project in a folder of its own, running a study through the very commands users type."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
# Left out of comparisons: what tools note for themselves.
NOT_RESULTS = {".snakemake_timestamp", "README.md"}


def environment() -> dict[str, str]:
    """The tests' environment, with the tools of the interpreter's own virtual environment first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COVERAGE_", "MAKE", "MFLAGS"))}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        kept.pop(name, None)
    git = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return kept | git | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def stage_of(rule: str) -> str:
    """The DVC stage of a rule; several stages have several rules."""
    several = [
        stage for stage in ("activations", "saes", "alignment", "circuits", "analysis") if rule.startswith(f"{stage}_")
    ]
    return several[0] if several else rule


def stage_edges(dot: str) -> set[tuple[str, str]]:
    """Edges of Snakemake's graph of rules, between the stages of these rules."""
    names = {number: stage_of(rule) for number, rule in re.findall(r'(\d+)\[label = "(\w+)"', dot)}
    edges = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", dot)}
    return {(a, b) for a, b in edges if b != "all" and a != b}


class Project:
    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        run = subprocess.run(
            command, cwd=self.folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if check and run.returncode:
            raise AssertionError(f"{' '.join(command)} failed with {run.returncode}:\n{run.stdout[-6000:]}")
        return run

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("snakemake", *arguments, check=check)

    def planned_rules(self) -> set[str]:
        """The stages whose rules a run would execute now, without those that only gather."""
        return {stage_of(name) for name in self.planned_names()}

    def planned_names(self, *arguments: str) -> set[str]:
        """The rules that a run would execute now, without those that only gather."""
        table = self.snakemake("-n", "--quiet", "host", "reason", *arguments).stdout
        if "Nothing to be done" in table:
            return set()
        lines = table[table.index("Job stats:") :].splitlines()[3:]
        names = [line.split()[0] for line in lines[: lines.index("")]]
        return {name for name in names if name not in ("all", "total") and not name.startswith("all_")}

    def dvc_changed(self) -> set[str]:
        """Stages that `dvc status` finds changed."""
        import json

        return set(json.loads(self.run("dvc", "status", "--json").stdout))

    def set(self, key: str, value: object) -> None:
        """Put `value` at a dotted key of params.yaml."""
        path = self.folder / "params.yaml"
        study = yaml.safe_load(path.read_text())
        *parents, last = key.split(".")
        section = study
        for name in parents:
            section = section[name]
        section[last] = value
        path.write_text(yaml.safe_dump(study))

    def result_hashes(self) -> dict[str, str]:
        """Path below results -> sha256."""
        base = self.folder / "results"
        files = [p for p in base.rglob("*") if p.is_file() and p.name not in NOT_RESULTS]
        return {str(p.relative_to(base)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def link_environment(folder: Path) -> None:
    """Let the Makefile find the environment that runs the tests, as if `make setup` had been run."""
    venv = Path(sys.prefix)
    if not (venv / ".ready").exists():
        (venv / ".ready").touch()
    (folder / ".venv").symlink_to(venv)
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(folder / name, (0, 0))


def new_project(folder: Path, write_study: Callable[[Path], None]) -> Project:
    """The working tree as it stands, as a git repository with the params.yaml that `write_study` puts there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    write_study(folder)
    link_environment(folder)
    project = Project(folder)
    project.run("git", "init", "-q")
    commit(project, "Study")
    return project


def commit(project: Project, message: str) -> None:
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", message)


def clone(project: Project, folder: Path) -> Project:
    project.run("git", "clone", "-q", str(project.folder), str(folder))
    link_environment(folder)
    return Project(folder)


def copy(project: Project, folder: Path) -> Project:
    """All of it: results, what both tools remember of them, and the environment."""
    shutil.copytree(project.folder, folder, symlinks=True)
    return Project(folder)
