"""A short study, finished after a job of every stage was killed: recorded, shared, repeated and edited."""

import re

import pytest

from tests.workflow.project import Project, clone, copy
from tests.workflow.short_study import MAMBA, write_mamba
from universality.activations.format import read_manifest
from universality.corpus.tokenizer import identity, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workflow")]


def test_a_model_brings_its_own_tokenizer(study):
    results, own = study.folder / "results", identity(load_tokenizer(study.folder / MAMBA))
    assert identity(load_tokenizer(results / "models" / "mamba")) == own
    for model, same in (("mamba", True), ("neox", False)):
        shard = results / "activations" / model / "resid_post.1" / "evaluation" / "shard_0"
        assert (read_manifest(shard).tokenizer == own) == same
    assert not (results / "saes" / "mamba" / "topk" / "seed_0" / "layer_0").exists()


def test_a_changed_checkpoint_is_loaded_anew(study, tmp_path):
    project = copy(study, tmp_path / "copy")
    write_mamba(project.folder / MAMBA, seed=9)
    plan = project.snakemake("-n", "--quiet", "host").stdout
    assert "results/models/mamba" in plan
    assert "output: results/models/neox" not in plan


def test_afterwards_there_is_nothing_to_do(study):
    assert "Nothing to be done" in study.snakemake("-n").stdout
    assert study.dvc_changed() == set()
    assert "up to date" in study.run("dvc", "repro").stdout
    assert "Nothing to be done" in study.snakemake("-n").stdout


@pytest.fixture(scope="module")
def colleague(study, tmp_path_factory) -> Project:
    """A second clone after `make sync`."""
    project = clone(study, tmp_path_factory.mktemp("clone") / "b")
    project.run("make", "sync")
    return project


def test_a_colleague_gets_it_all_without_running_anything(study, colleague):
    assert "Nothing to be done" in colleague.snakemake("-n").stdout
    assert colleague.dvc_changed() == set()
    assert "up to date" in colleague.run("dvc", "repro").stdout
    assert colleague.result_hashes() == study.result_hashes()


def test_an_audit_on_one_core_finds_the_same_bytes(study, colleague):
    """Everything again, serially, on one core where the first runs had all, and without interruption where jobs were
    killed in those; dvc.lock must not change. Early among these tests: it leaves the other core to the other worker."""
    before = (colleague.folder / "dvc.lock").read_bytes()
    colleague.run("taskset", "--cpu-list", "0", "make", "audit")
    assert (colleague.folder / "dvc.lock").read_bytes() == before
    assert colleague.result_hashes() == study.result_hashes()


AFTER_ALIGNMENT = {"alignment", "ablation", "analysis", "report"}
AFTER_SAES = {"saes", "features"} | AFTER_ALIGNMENT


def test_an_edited_k_reruns_the_saes_and_what_follows_in_both_tools(study, colleague):
    # The other variant is untouched by k, as is what the comparison of its SAEs goes into.
    colleague.set("saes.variants.matryoshka.k", 5)
    assert colleague.planned_rules() == {"saes", "features", "alignment", "report"}
    saes = colleague.snakemake("-n", "--quiet", "host").stdout
    assert "topk" not in "".join(re.findall(r"output: (results/saes\S*\n)", saes)).replace("matryoshka_batchtopk", "")
    assert colleague.dvc_changed() == {"saes"}
    colleague.snakemake()
    assert "Nothing to be done" in colleague.snakemake("-n").stdout
    made = colleague.result_hashes()
    changed = {name for name, digest in made.items() if study.result_hashes().get(name) != digest}
    assert {name.split("/")[0] for name in changed} == {"saes", "features", "alignment", "report", "metrics.json"}
    assert not any("topk" in name for name in changed)
    # DVC's stages are whole: what they make again, both variants, is what Snakemake made; the others are to follow.
    again = colleague.run("dvc", "repro", "--single-item", "features").stdout
    assert re.findall(r"Running stage '(\w+)'", again) == ["features"]
    assert colleague.result_hashes() == made
    assert colleague.dvc_changed() == AFTER_SAES - {"features"}
    # Not of all files: a requirements.lock written anew would have `make` set up another environment.
    colleague.run("git", "checkout", "-q", "params.yaml", "dvc.lock", "results")
    colleague.run("dvc", "checkout", "-q", "--force")  # over what Snakemake made, which is not in the cache
    colleague.snakemake("--touch", "--forceall", "--cores", "1")
    assert colleague.result_hashes() == study.result_hashes()


@pytest.mark.parametrize(
    ("file", "stages", "rules"),
    [
        ("src/universality/saes/topk.py", {"saes", "features", "ablation", "analysis"}, AFTER_SAES),
        ("src/universality/circuits/off_by_one.py", {"circuits"}, {"circuits", "report"}),
        ("src/universality/report/page.html.j2", {"report"}, {"report"}),
        ("src/universality/ablation/tables.py", {"ablation"}, {"ablation", "report"}),
        ("src/universality/analysis/ngrams.py", {"analysis"}, {"analysis", "report"}),
        ("src/universality/alignment/mppc.py", {"alignment", "analysis"}, AFTER_ALIGNMENT),
    ],
)
def test_edited_code_reruns_the_stages_that_run_it(study, tmp_path, file, stages, rules):
    """`stages` depend on the file themselves, which DVC's status tells; `rules` are these and what follows."""
    project = copy(study, tmp_path / "copy")
    path = project.folder / file
    path.write_text(path.read_text() + "\n")
    assert project.planned_rules() == rules
    assert project.dvc_changed() == stages


@pytest.mark.parametrize(
    ("key", "value", "rules"),
    [
        # Which layers are compared does not load the model anew; its activations hold all compared layers.
        ("models.zoo.mamba.layers", [0, 1], AFTER_SAES | {"activations"}),
        ("activations.evaluation_sequences", 512, AFTER_SAES | {"activations"}),
        ("alignment.statistics.bootstrap_samples", 60, AFTER_ALIGNMENT),
        ("circuits.measuring.task_seed", 51, {"circuits", "ablation", "report"}),
    ],
)
def test_edited_settings_rerun_only_what_depends_on_them(study, tmp_path, key, value, rules):
    project = copy(study, tmp_path / "copy")
    project.set(key, value)
    assert project.planned_rules() == rules


@pytest.mark.parametrize(
    ("key", "value"), [("activations.evaluation_sequences", 512), ("saes.evaluation.sequences", 16)]
)
def test_measuring_on_other_documents_trains_nothing(study, tmp_path, key, value):
    project = copy(study, tmp_path / "copy")
    project.set(key, value)
    planned = project.planned_names()
    assert {"saes_evaluation", "saes_metrics", "report"} <= planned
    assert not {"saes", "models"} & planned


def test_more_tokens_add_shards_and_leave_the_old_ones_alone(study, tmp_path):
    project = copy(study, tmp_path / "copy")
    project.set("activations.train_sequences", 512)
    plan = project.snakemake("-n", "--quiet", "host").stdout
    shards = set(re.findall(r"output: results/activations/\S*?/(train|evaluation)/(shard_\d+)", plan))
    assert shards == {("train", "shard_1")}
    before = {name: digest for name, digest in study.result_hashes().items() if name.startswith("activations/")}
    project.snakemake("all_activations")
    after = project.result_hashes()
    assert {name: after[name] for name in before} == before
    new = {name for name in after if name.startswith("activations/")} - before.keys()
    assert {name.split("/")[4] for name in new} == {"shard_1"}


def test_results_of_another_study_are_not_recorded(study, tmp_path):
    project = copy(study, tmp_path / "copy")
    left = project.folder / "results" / "alignment" / "renamed.parquet"
    left.write_bytes(b"old")
    run = project.run("make", "record", check=False)
    assert run.returncode != 0
    assert "error: results/alignment/renamed.parquet: not made by this study (1 such files)" in run.stdout
    project.run("universality", "study", "prune", "--yes")
    assert not left.exists()
    assert project.result_hashes() == study.result_hashes()
