"""The smoke study from one command: every kind of analysis, complete, told and logged."""

import json
import math
import re

import pytest

from tests.workflow.project import ROOT, copy, stage_edges
from universality.config import load_study
from universality.plan import Plan
from universality.storage import read_table

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smoke")]


def numbers(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float | int):
        yield value


def test_the_results_are_all_there(smoke):
    results = smoke.folder / "results"
    metrics = json.loads((results / "metrics.json").read_text())
    assert all(math.isfinite(n) for n in numbers(metrics))
    settings = load_study(smoke.folder / "params.yaml")
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
    assert "alignment" in smoke.run("dvc", "metrics", "show", "--json").stdout
    differences = read_table(results / "alignment" / "differences.parquet").to_pandas()
    assert {"cross", "neurons", "untrained"} <= {*differences.one, *differences.other}
    assert "cross_code" not in {*differences.one, *differences.other}  # of other documents
    spaces = read_table(results / "alignment" / "spaces" / "cross.parquet").to_pandas()
    assert set(spaces.measure) == {"cka", "cka_debiased", "svcca", "rsa"}
    assert spaces.value.between(-1, 1).all()
    shares = read_table(results / "alignment" / "decoders" / "sae_seed_mamba_shares.parquet").to_pandas()
    assert ((shares.low <= shares.share) & (shares.share <= shares.high)).all()
    effects = read_table(results / "ablation" / "cross" / "b" / "effects.parquet").to_pandas()
    assert set(effects.what) == {"loss", "induction", "recall"}
    assert set(effects.group) == {"none", "well", "badly", "random", "well - badly"}
    assert metrics["ablation"]["cross"]["b"]["model"] == "mamba"
    assert [row["column"] for row in metrics["published"]] == ["logit", "prob"]
    assert all(row["low"] <= row["measured"] <= row["high"] for row in metrics["published"])
    correlations = read_table(results / "analysis" / "similarity" / "cross" / "correlations.parquet").to_pandas()
    assert set(correlations.model) == {"neox", "mamba"}
    assert correlations.value.dropna().between(-1, 1).all()
    assert metrics["analysis"]["idiosyncratic"]["cross"]["b"]["listed"] == 4
    own = read_table(results / "analysis" / "idiosyncratic" / "cross" / "a" / "features.parquet").to_pandas()
    assert own.effect.notna().any()
    quality = read_table(results / "alignment" / "quality.parquet").to_pandas()
    assert quality.mean_mppc.between(-1, 1).all()
    assert quality.explained_variance.notna().all()


def test_a_feature_is_shown_with_its_partners_and_contexts(smoke):
    table = read_table(smoke.folder / "results" / "alignment" / "cross" / "features.parquet").to_pandas()
    first = table[(table.direction == "a_to_b") & ~table.dead].iloc[0]
    shown = smoke.run("universality", "align", "show", f"a:{first.layer}:{first.feature}", "--contexts", "3").stdout
    assert f"partners of neox/topk/seed_0 {first.layer}:{first.feature}" in shown
    assert f"top contexts of mamba/topk/seed_0 {first.best_layer}:{first.best_feature}" in shown
    assert f"{first.mppc:.3f}" in shown
    refused = smoke.run("universality", "align", "show", "c:1:2", check=False)
    assert refused.returncode == 1
    assert "error: FEATURE: 'c:1:2' is not SIDE:LAYER:FEATURE" in refused.stdout


def test_a_feature_is_shown_as_its_tables_have_it(smoke):
    place = "evaluation/neox/topk/seed_0/layer_1"
    table = read_table(smoke.folder / "results" / "analysis" / "features" / place / "measures.parquet").to_pandas()
    first = table[~table.dead].iloc[0]
    shown = smoke.run("universality", "analysis", "show", place, str(first.feature)).stdout
    assert f"token_entropy {first.token_entropy:.4g}" in shown
    assert "quantile" in shown
    refused = smoke.run("universality", "analysis", "show", place, "999", check=False)
    assert refused.returncode == 1
    assert f"error: FEATURE: 999 of {place} is dead or not there" in refused.stdout


def test_the_page_needs_nothing_but_itself(smoke):
    page = (smoke.folder / "results" / "report" / "index.html").read_text()
    assert page.count("<svg") == 12
    outside = re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)[^\"']*", page)
    assert [link for link in outside if "w3.org" not in link and '"data:' not in link] == []
    for name in load_study(smoke.folder / "params.yaml").alignment.comparisons:
        assert name in page


def test_every_job_leaves_a_log_and_its_benchmark(smoke):
    printed = (smoke.folder.parent / "run.log").read_text()
    logs = smoke.folder / "logs"
    plan = Plan(load_study(smoke.folder / "params.yaml"))
    n_saes = len(plan.dictionaries()) + len(plan.evaluations()) + 1
    counts = {"corpus": 3, "models": len(plan.models()), "saes": n_saes, "features": len(plan.feature_sets())}
    names = plan.study.alignment.comparisons
    counts["alignment"] = 1 + sum(1 + len(plan.alignment_parts(name)) for name in names)
    counts["alignment"] += len(plan.decoder_tables("shares")) + len(plan.space_tables())
    counts["circuits"] = len(plan.circuits()) + len(plan.circuit_similarities()) + len(plan.published_circuits())
    counts["ablation"], counts["analysis"] = len(plan.ablations()), len(plan.analyses())
    for stage, count in counts.items():
        for suffix in ("log", "tsv"):
            assert len(list((logs / stage).rglob(f"*.{suffix}"))) == count, (stage, suffix)
    assert re.search(r"neox step 40: text [\d.]+ nats", (logs / "models" / "neox.log").read_text())
    assert re.search(r"steps: 60/60, [\d.]+/s, 0 s left", printed)
    assert printed.count("This study needs about") == 1
    assert "This study needs" not in smoke.snakemake("-n", "--forceall").stdout


def test_measuring_a_crosscoder_on_other_documents_trains_nothing(smoke, tmp_path):
    project = copy(smoke, tmp_path / "copy")
    project.set("saes.evaluation.sequences", 16)
    planned = project.planned_names()
    assert {"saes_evaluation", "saes_evaluation_of_crosscoder", "saes_metrics", "report"} <= planned
    assert not {"saes", "models"} & planned


def test_dvc_yaml_is_what_the_code_says():
    from universality.study.dvc import dvc_yaml

    assert (ROOT / "dvc.yaml").read_text() == dvc_yaml(ROOT), "run `make dvc.yaml`"


def test_both_tools_have_one_dag(smoke):
    """Edges between DVC's stages, from its own graph, against edges between Snakemake's rules."""
    dot = smoke.snakemake("--rulegraph", "dot", "--forceall", "--quiet", "all").stdout
    rules = stage_edges(dot)
    mermaid = smoke.run("dvc", "dag", "--dot").stdout
    stages = set(re.findall(r'"(\w+)" -> "(\w+)"', mermaid))
    assert reduced(stages) == reduced(rules)
    assert {name for edge in stages for name in edge} == {name for edge in rules for name in edge}


def reduced(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without edges that a longer path implies: Snakemake leaves those out of its drawing."""
    import networkx

    return set(networkx.transitive_reduction(networkx.DiGraph(edges)).edges)
