"""What a new user would get wrong: one clear line, a non-zero exit, nothing half-written taken as done."""

import contextlib
import re
import subprocess

import pytest
import typer
import yaml
from typer.testing import CliRunner

from tests.conftest import SENTENCE
from tests.workflow.project import ROOT, Project, copy
from universality.cli import application

SMOKE = yaml.safe_load((ROOT / "studies" / "smoke.yaml").read_text())


def study_in(folder, change) -> Project:
    """A folder with only a params.yaml, the smoke study on local files after `change`."""
    study = yaml.safe_load(yaml.safe_dump(SMOKE))
    study["corpus"]["documents"]["source"] = {"kind": "files", "paths": ["texts"]}
    study["corpus"]["documents"] |= {"others": {}, "evaluation_fraction": 0.4}
    del study["alignment"]["comparisons"]["cross_code"]
    study["corpus"]["tokenizer"]["vocab_size"] = 270
    change(study)
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(study))
    return Project(folder)


def snakemake(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return project.snakemake("--snakefile", str(ROOT / "Snakefile"), "--cores", "2", *arguments, check=False)


def errors(run) -> list[str]:
    """The lines that tell the user what is wrong, without the clock before them."""
    lines = [line for line in run.stdout.splitlines() if re.match(r"(\d\d:\d\d:\d\d )?error: ", line)]
    return sorted({line.split("error: ", 1)[1] for line in lines})


def write_texts(folder, n=60):
    (folder / "texts").mkdir(exist_ok=True)
    for number in range(n):
        (folder / "texts" / f"{number:02d}.txt").write_text(f"{number} {SENTENCE} " * 3)


def set_value(*path):
    """A change that puts the last of `path` at the keys before it."""

    def change(study):
        *keys, last, value = path
        for key in keys:
            study = study[key]
        study[last] = value

    return change


BEFORE_ANY_JOB = [
    (set_value("models", "zoo", "neox", "family", "gpt5"), "models.zoo.neox.family: 'gpt5' is not allowed"),
    (set_value("models", "zoo", "mamba", "layers", [5]), "layer 5 is out of range: n_layers=2 has 0 to 1"),
    (set_value("saes", "variants", "topk", "kk", 3), "saes.variants.topk.kk: unknown key; allowed here: "),
    (set_value("corpus", "documents", "source", "paths", ["texts/*.md"]), "'texts/*.md' matches no .txt, .jsonl, "),
    (lambda study: None, "'texts' matches no .txt, .jsonl, .parquet file"),
    (
        set_value("alignment", "comparisons", "cross", "corpus", "code"),
        "alignment.comparisons.cross.corpus: 'code' is no corpus of held-out documents: evaluation",
    ),
    (
        set_value("models", "zoo", "neox", "tokenizer", "own"),
        "models.zoo.neox.tokenizer: 'own' is not in corpus.other_tokenizers: none",
    ),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Project:
    """A study whose corpus is made. Tests that copy it are one group, so that it is made once."""
    folder = tmp_path_factory.mktemp("packed")
    write_texts(folder)
    project = study_in(folder, lambda study: None)
    assert snakemake(project, "results/corpus/tokens").returncode == 0
    return project


on_packed = pytest.mark.xdist_group("packed")


@pytest.mark.parametrize(("change", "message"), BEFORE_ANY_JOB)
def test_refused_before_any_job(tmp_path, change, message):
    run = snakemake(study_in(tmp_path, change))
    assert run.returncode != 0
    assert len(errors(run)) == 1
    assert message in errors(run)[0]
    assert "Job stats" not in run.stdout


def test_results_that_cannot_be_written(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "results").write_text("a file where the folder should be")
    run = snakemake(study_in(tmp_path, lambda study: None))
    assert run.returncode != 0
    assert errors(run) == ["results: not a folder that can be written to: File exists"]


def fails_with(project: Project, target: str, message: str) -> None:
    run = snakemake(project, target)
    assert run.returncode != 0
    assert len(errors(run)) == 1, run.stdout
    assert message in errors(run)[0]
    assert not (project.folder / target).exists()


def test_a_file_that_is_not_utf8(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "texts" / "latin.txt").write_bytes(b"caf\xe9")
    project = study_in(tmp_path, lambda study: None)
    fails_with(project, "results/corpus/documents.parquet", "texts/latin.txt: not UTF-8: byte 3 is 0xe9")


@on_packed
def test_a_corpus_shorter_than_one_sequence(packed, tmp_path):
    project = copy(packed, tmp_path / "copy")
    study_in(project.folder, set_value("corpus", "sequence_length", 50_000))
    fails_with(project, "results/corpus/tokens", "corpus.sequence_length: 50000 is longer than the whole")


@on_packed
def test_a_truncated_parquet(packed, tmp_path):
    project = copy(packed, tmp_path / "copy")
    documents = project.folder / "results" / "corpus" / "documents.parquet"
    documents.write_bytes(documents.read_bytes()[:-30])
    fails_with(project, "results/corpus/tokenizer", "results/corpus/documents.parquet: not a readable parquet file")


@on_packed
def test_a_hub_name_without_network(packed, tmp_path):
    project = copy(packed, tmp_path / "copy")
    hub = {"source": "hub", "family": "gpt_neox", "name": "EleutherAI/pythia-160m", "n_layers": 12, "d_model": 768}
    study_in(project.folder, set_value("models", "zoo", "neox", hub))
    fails_with(project, "results/models/neox", "models.zoo.neox (EleutherAI/pythia-160m): cannot be loaded")
    data_set = {"kind": "hub", "name": "nobody/nothing", "max_documents": 3}
    study_in(project.folder, set_value("corpus", "documents", "source", data_set))
    fails_with(project, "results/corpus/documents.parquet", "data set nobody/nothing: cannot be streamed")


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    """Without offline mode the libraries try, and try again; the end is one line all the same."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    project = study_in(tmp_path, lambda study: None)
    settings = (
        '{"source": {"kind": "hub", "name": "nobody/nothing", "max_documents": 3}, "others": {}, "min_characters": 3, '
    )
    settings += '"evaluation_fraction": 0.5, "split_seed": 1}'
    run = project.run("universality", "corpus", "documents", "--settings", settings, "--out", "d.parquet", check=False)
    assert run.returncode == 1
    assert errors(run)[0].startswith("data set nobody/nothing: cannot be streamed")
    assert len(run.stdout.splitlines()) == 1


def fill(path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(b"x" * 4096)


def test_a_full_disk_that_holds_logs_and_all(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        write_texts(small)
        project = study_in(small, lambda study: None)
        assert snakemake(project, "results/corpus/documents.parquet").returncode == 0
        fill(small / "filling")
        command = ["universality", "corpus", "tokenizer", "--documents", "results/corpus/documents.parquet"]
        command += [
            "--settings",
            '{"tokenizer": {"kind": "bpe", "vocab_size": 270}}',
            "--out",
            "results/corpus/tokenizer",
        ]
        run = project.run(*command, "--log", "logs/tokenizer.log", check=False)
        assert run.returncode == 1
        assert len(errors(run)) == 1, run.stdout
        assert "No space left on device" in errors(run)[0]
        assert "Traceback" not in run.stdout
        assert not (small / "results" / "corpus" / "tokenizer").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@on_packed
def test_a_full_disk(packed, tmp_path):
    project = copy(packed, tmp_path / "copy")
    study_in(project.folder, set_value("models", "zoo", "neox", "d_model", 128))
    small = project.folder / "results" / "models"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = snakemake(project, "results/models/neox")
        assert run.returncode != 0
        assert len(errors(run)) == 1, run.stdout
        assert re.search(r"results/models/neox: cannot be written: .*[Nn]o space left", errors(run)[0])
        assert [p.name for p in small.iterdir()] == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_papers_study_plans_without_network(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "studies" / "paper.yaml").read_text())
    run = snakemake(Project(tmp_path), "-n", "--quiet", "host", "reason")
    assert run.returncode == 0
    counts = dict(re.findall(r"^(\w+) +(\d+)$", run.stdout, re.M))
    # L1 for two seeds and TopK for one, on 12 + 24 layers; 20 train and 2 evaluation shards of each model
    assert int(counts["saes"]) == int(counts["features"]) == 3 * (12 + 24)
    for model in ("pythia", "mamba"):
        assert int(counts[f"activations_{model}_train"]) == 20
        assert int(counts[f"activations_{model}_evaluation"]) == 2
    assert int(counts["models"]) == 2
    outputs = set(re.findall(r"output: results/saes/(\w+)/relu_l1/seed_0/layer_(\d+)", run.stdout))
    assert outputs == {("pythia", str(n)) for n in range(12)} | {("mamba", str(n)) for n in range(24)}


def command_names():
    for stage, group in typer.main.get_command(application()).commands.items():
        for command in group.commands:
            yield stage, command


@pytest.mark.parametrize(("stage", "command"), list(command_names()))
def test_every_command_has_help_with_an_example(stage, command):
    run = CliRunner().invoke(application(), [stage, command, "--help"], prog_name="universality")
    assert run.exit_code == 0
    assert f"universality {stage} {command}" in run.output
    assert f"Example: universality {stage} {command}" in " ".join(run.output.split())
