"""The smoke study from one command: complete, recorded, shared, repeated and edited."""

import json
import math
import re

import pytest

from tests.workflow.killing import STAGES
from tests.workflow.project import ROOT, Project, clone, copy, stage_edges
from universality.config import load_study
from universality.plan import Plan
from universality.storage import read_table

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workflow")]


def numbers(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float | int):
        yield value


def test_the_results_are_all_there(study):
    results = study.folder / "results"
    metrics = json.loads((results / "metrics.json").read_text())
    assert all(math.isfinite(n) for n in numbers(metrics))
    settings = load_study(study.folder / "params.yaml")
    plan = Plan(settings)
    assert set(metrics["alignment"]) == set(settings.alignment.comparisons)
    assert set(metrics["models"]) == set(metrics["circuits"]["induction"]) == {"mamba", "neox", "neox_seed1"}
    assert set(metrics["circuits"]) == {"induction", "recall"}
    assert "off_by_one" in metrics["circuits"]["induction"]["mamba"]
    assert "rank correlation with measured" in metrics["circuits"]["recall"]["neox"]["attribution"]
    columns = {
        "model",
        "layer",
        "feature",
        "best_layer",
        "best_feature",
        "mppc",
        "heldout_mppc",
        "p_value",
        "mutual",
        "dead",
    }
    for name, comparison in settings.alignment.comparisons.items():
        table = read_table(results / "alignment" / name / "features.parquet").to_pandas()
        assert columns <= set(table.columns)
        assert set(table.model) == {comparison.a.model, comparison.b.model}
        if comparison.of_saes:
            n_layers = sum(len(plan.layers(side.model)) for side in (comparison.a, comparison.b))
            assert len(table) == n_layers * settings.saes.training.d_sae
        live = table[~table.dead]
        assert live.mppc.between(-1, 1).all()
        assert (live.best_layer >= 0).all()
    assert "alignment" in study.run("dvc", "metrics", "show", "--json").stdout
    differences = read_table(results / "alignment" / "differences.parquet").to_pandas()
    assert {"cross", "neurons", "untrained"} <= {*differences.one, *differences.other}
    assert "cross_code" not in {*differences.one, *differences.other}  # of other documents
    spaces = read_table(results / "alignment" / "spaces" / "cross.parquet").to_pandas()
    assert set(spaces.measure) == {"cka", "cka_debiased", "svcca", "rsa"}
    assert spaces.value.between(-1, 1).all()
    shares = read_table(results / "alignment" / "decoders" / "sae_seed_neox_shares.parquet").to_pandas()
    assert ((shares.low <= shares.share) & (shares.share <= shares.high)).all()
    effects = read_table(results / "ablation" / "cross" / "b" / "effects.parquet").to_pandas()
    assert set(effects.what) == {"loss", "induction", "recall"}
    assert set(effects.group) == {"none", "well", "badly", "random", "well - badly"}
    assert metrics["ablation"]["cross"]["b"]["model"] == "mamba"
    assert [row["column"] for row in metrics["published"]] == ["logit", "prob"]
    assert all(row["low"] <= row["measured"] <= row["high"] for row in metrics["published"])
    quality = read_table(results / "alignment" / "quality.parquet").to_pandas()
    assert quality.mean_mppc.between(-1, 1).all()
    assert quality.explained_variance.notna().all()


def test_a_feature_is_shown_with_its_partners_and_contexts(study):
    table = read_table(study.folder / "results" / "alignment" / "cross" / "features.parquet").to_pandas()
    first = table[(table.direction == "a_to_b") & ~table.dead].iloc[0]
    shown = study.run("universality", "align", "show", f"a:{first.layer}:{first.feature}", "--contexts", "3").stdout
    assert f"partners of neox/topk/seed_0 {first.layer}:{first.feature}" in shown
    assert f"top contexts of mamba/topk/seed_0 {first.best_layer}:{first.best_feature}" in shown
    assert f"{first.mppc:.3f}" in shown
    refused = study.run("universality", "align", "show", "c:1:2", check=False)
    assert refused.returncode == 1
    assert "error: FEATURE: 'c:1:2' is not SIDE:LAYER:FEATURE" in refused.stdout


def test_the_page_needs_nothing_but_itself(study):
    page = (study.folder / "results" / "report" / "index.html").read_text()
    assert page.count("<svg") == 10
    outside = re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)[^\"']*", page)
    assert [link for link in outside if "w3.org" not in link and '"data:' not in link] == []
    for name in load_study(study.folder / "params.yaml").alignment.comparisons:
        assert name in page


def test_every_job_leaves_a_log_and_its_benchmark(study, finished):
    printed = (finished / "killed.log").read_text()
    logs = study.folder / "logs"
    plan = Plan(load_study(study.folder / "params.yaml"))
    n_saes = len(plan.dictionaries()) + len(plan.evaluations()) + 1
    counts = {"corpus": 3, "models": len(plan.models()), "saes": n_saes, "features": len(plan.feature_sets())}
    names = plan.study.alignment.comparisons
    counts["alignment"] = 1 + sum(1 + len(plan.alignment_parts(name)) for name in names)
    counts["alignment"] += len(plan.decoder_tables("shares")) + len(plan.space_tables())
    counts["circuits"] = len(plan.circuits()) + len(plan.circuit_similarities()) + len(plan.published_circuits())
    counts["ablation"] = len(plan.ablations())
    for stage, count in counts.items():
        for suffix in ("log", "tsv"):
            assert len(list((logs / stage).rglob(f"*.{suffix}"))) == count, (stage, suffix)
    assert re.search(r"neox step 40: text [\d.]+ nats", (logs / "models" / "neox.log").read_text())
    assert re.search(r"steps: 60/60, [\d.]+/s, 0 s left", printed)
    assert printed.count("This study needs about") == len(STAGES)  # one for each run
    assert (finished / "run.log").read_text().count("This study needs about") == 1
    assert "This study needs" not in study.snakemake("-n", "--forceall").stdout


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


AFTER_SAES = {"saes", "features", "alignment", "ablation", "report"}


def test_an_edited_k_reruns_the_saes_and_what_follows_in_both_tools(study, colleague):
    # The second variant is untouched by k; with Snakemake its SAEs stay, DVC reruns whole stages.
    colleague.edit("params.yaml", "topk: {architecture: topk, k: 4,", "topk: {architecture: topk, k: 5,")
    assert colleague.planned_rules() == AFTER_SAES
    saes = colleague.snakemake("-n", "--quiet", "host").stdout
    assert "matryoshka" not in "".join(re.findall(r"output: (results/saes\S*\n)", saes))
    assert colleague.dvc_changed() == {"saes"}
    output = colleague.run("dvc", "repro").stdout
    ran = set(re.findall(r"Running stage '(\w+)'", output))
    assert ran == AFTER_SAES
    assert "Nothing to be done" in colleague.snakemake("-n").stdout
    changed = {name for name, digest in colleague.result_hashes().items() if study.result_hashes().get(name) != digest}
    assert {name.split("/")[0] for name in changed} <= {*AFTER_SAES, "metrics.json"}
    assert not any("matryoshka" in name for name in changed if name.startswith(("saes", "features")))
    # Not of all files: a requirements.lock written anew would have `make` set up another environment.
    colleague.run("git", "checkout", "-q", "params.yaml", "dvc.lock", "results")
    colleague.run("dvc", "checkout", "-q")
    colleague.snakemake("--touch", "--forceall", "--cores", "1")
    assert colleague.result_hashes() == study.result_hashes()


@pytest.mark.parametrize(
    ("file", "stages", "rules"),
    [
        ("src/universality/saes/topk.py", {"saes", "features", "ablation"}, AFTER_SAES),
        ("src/universality/circuits/off_by_one.py", {"circuits"}, {"circuits", "report"}),
        ("src/universality/report/page.html.j2", {"report"}, {"report"}),
        ("src/universality/ablation/groups.py", {"ablation"}, {"ablation", "report"}),
        ("src/universality/alignment/mppc.py", {"alignment"}, {"alignment", "ablation", "report"}),
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
    ("old", "new", "rules"),
    [
        # Which layers are compared does not retrain the model; its activations hold all compared layers.
        ("    neox: {source: train,", "    neox: {layers: [1], source: train,", AFTER_SAES | {"activations"}),
        ("evaluation_sequences: 256", "evaluation_sequences: 512", AFTER_SAES | {"activations"}),
        ("bootstrap_samples: 50", "bootstrap_samples: 60", {"alignment", "ablation", "report"}),
        ("task_seed: 50", "task_seed: 51", {"circuits", "ablation", "report"}),
    ],
)
def test_edited_settings_rerun_only_what_depends_on_them(study, tmp_path, old, new, rules):
    project = copy(study, tmp_path / "copy")
    project.edit("params.yaml", old, new)
    assert project.planned_rules() == rules


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("evaluation_sequences: 256", "evaluation_sequences: 512"),
        ("evaluation: {sequences: 64", "evaluation: {sequences: 32"),
    ],
)
def test_measuring_on_other_documents_trains_nothing(study, tmp_path, old, new):
    project = copy(study, tmp_path / "copy")
    project.edit("params.yaml", old, new)
    planned = project.planned_names()
    assert {"saes_evaluation", "saes_evaluation_of_crosscoder", "saes_metrics", "report"} <= planned
    assert not {"saes", "models"} & planned


def test_more_tokens_add_shards_and_leave_the_old_ones_alone(study, tmp_path):
    project = copy(study, tmp_path / "copy")
    project.edit("params.yaml", "  train_sequences: 256", "  train_sequences: 512")
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


def test_dvc_yaml_is_what_the_code_says():
    from universality.study.dvc import dvc_yaml

    assert (ROOT / "dvc.yaml").read_text() == dvc_yaml(ROOT), "run `make dvc.yaml`"


def test_both_tools_have_one_dag(study):
    """Edges between DVC's stages, from its own graph, against edges between Snakemake's rules."""
    dot = study.snakemake("--rulegraph", "dot", "--forceall", "--quiet", "all").stdout
    rules = stage_edges(dot)
    mermaid = study.run("dvc", "dag", "--dot").stdout
    stages = set(re.findall(r'"(\w+)" -> "(\w+)"', mermaid))
    assert reduced(stages) == reduced(rules)
    assert {name for edge in stages for name in edge} == {name for edge in rules for name in edge}


def reduced(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without edges that a longer path implies: Snakemake leaves those out of its drawing."""
    import networkx

    return set(networkx.transitive_reduction(networkx.DiGraph(edges)).edges)
