"""A study all of whose models come from elsewhere: local folders as the hub has Pythia and Mamba, with their tokenizer.

The short study runs such a model through every stage.
"""

import re

import pytest
import yaml

from tests.conftest import tiny_model
from tests.workflow.project import ROOT, stage_edges
from tests.workflow.test_bad_input import errors, set_value, snakemake, study_in, write_texts
from universality.corpus.tokenizer import load_tokenizer, train_bpe
from universality.storage import read_table
from universality.study.dvc import dvc_stages

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("loaded")]


@pytest.fixture
def folders(tmp_path, corpus):
    """checkpoints/pythia and checkpoints/mamba, sharing the tokenizer of the tests' corpus."""
    for name, family in (("pythia", "gpt_neox"), ("mamba", "mamba")):
        folder = tmp_path / "checkpoints" / name
        tiny_model(family, vocab_size=304, context=32).hf.save_pretrained(folder)
        load_tokenizer(corpus / "tokenizer").save_pretrained(folder)
    return tmp_path


def loaded_models(study):
    zoo = {"pythia": ("gpt_neox", "checkpoints/pythia"), "mamba": ("mamba", "checkpoints/mamba")}
    study["models"]["zoo"] = {
        name: {"source": "folder", "family": family, "path": path, "n_layers": 2, "d_model": 16}
        for name, (family, path) in zoo.items()
    }
    study["models"]["zoo"]["mamba"]["layers"] = [1]
    study["corpus"]["tokenizer"] = {"kind": "pretrained", "name": "checkpoints/pythia"}
    study["activations"] |= {"train_sequences": 40, "evaluation_sequences": 20}
    study["activations"]["cache"]["shard_sequences"] = 20
    study["ablation"]["sequences"] = 20
    sides = [{"model": "pythia", "layer": 1}, {"model": "mamba", "layer": 1}]
    study["saes"] |= {"also": [], "transcoders": {}, "evaluation": study["saes"]["evaluation"] | {"sequences": 20}}
    study["saes"]["crosscoders"]["neox_mamba"]["sides"] = sides
    side = {"variant": "topk", "seed": 0}
    study["alignment"]["block_layers"] = 1
    study["alignment"]["comparisons"] = {
        "cross": {"setting": "cross_architecture", "a": {"model": "pythia", **side}, "b": {"model": "mamba", **side}},
        "neurons": {
            "setting": "neurons",
            "a": {"model": "pythia", "basis": "neurons"},
            "b": {"model": "mamba", "basis": "neurons"},
        },
    }


def test_a_mismatch_of_tokenizers_names_both_models(folders):
    write_texts(folders)
    train_bpe([f"another text {n}" for n in range(300)], 290).save_pretrained(folders / "checkpoints" / "mamba")
    run = snakemake(study_in(folders, loaded_models), "results/models/mamba")
    assert run.returncode != 0
    assert len(errors(run)) == 1
    for name in ("models.zoo.mamba (checkpoints/mamba)", "checkpoints/pythia", "as models.zoo.mamba.tokenizer"):
        assert name in errors(run)[0]


def test_a_model_with_its_own_tokenizer_needs_nothing_of_the_studys(folders):
    write_texts(folders, 80)

    def own_tokenizer(study):
        loaded_models(study)
        study["corpus"]["other_tokenizers"] = {"own": {"kind": "pretrained", "name": "checkpoints/mamba"}}
        study["models"]["zoo"]["mamba"]["tokenizer"] = "own"
        study["saes"]["crosscoders"] = {}

    project = study_in(folders, own_tokenizer)
    plan = snakemake(project, "-n", "results/saes/mamba/topk/seed_0/layer_1", "--quiet", "host", "reason").stdout
    assert "output: results/corpus/other_tokens/own" in plan
    assert "output: results/corpus/tokens" not in plan
    dot = snakemake(project, "--rulegraph", "dot", "--forceall", "--quiet", "all").stdout
    assert stage_edges(dot) <= known_edges()
    for place in ("tokens", "other_tokens/own"):
        assert place in snakemake(project, "-n", "all_corpus", "--forceall", "--quiet", "host", "reason").stdout


def streamed(study):
    loaded_models(study)
    study["saes"]["also"] = [{"model": "pythia", "variant": "relu_l1", "seed": 3}]  # shares a pass with another
    study["activations"] |= {"train": "stream", "buffer_rows": 300}


def test_a_study_that_trains_on_a_stream_stores_no_train_activations(folders):
    write_texts(folders, 80)
    project = study_in(folders, streamed)
    plan = snakemake(project, "-n", "--quiet", "host", "reason").stdout
    assert set(re.findall(r"^activations_\w+", plan, re.M)) == {
        "activations_pythia_evaluation",
        "activations_mamba_evaluation",
    }
    made = ["pythia/topk/seed_0/layer_1", "crosscoders/neox_mamba"]
    assert snakemake(project, *(f"results/saes/{path}" for path in made)).returncode == 0
    assert not (folders / "results" / "activations").exists()
    curves = read_table(folders / "results" / "saes" / "pythia" / "topk" / "seed_0" / "layer_1" / "training.parquet")
    assert curves["explained_variance"].to_pylist()[-1] > 0.2
    assert (folders / "results" / "saes" / "pythia" / "relu_l1" / "seed_3" / "layer_1" / "cfg.json").exists()


def test_dvc_knows_every_dependency_of_a_study_that_streams(folders):
    write_texts(folders)
    dot = snakemake(study_in(folders, streamed), "--rulegraph", "dot", "--forceall", "--quiet", "all").stdout
    edges = stage_edges(dot)
    assert ("models", "saes") in edges
    assert edges <= known_edges()


def known_edges() -> set[tuple[str, str]]:
    """Edges between DVC's stages."""
    stages = dvc_stages(ROOT)["stages"]
    makes = {out: name for name, stage in stages.items() for out in stage["outs"]}
    return {(makes[dep], name) for name, stage in stages.items() for dep in stage["deps"] if dep in makes}


def test_a_judge_is_asked_of_every_layer_and_a_changed_one_anew(folders):
    """A plan alone: what is asked, and of what, is tested beside the command."""

    def judged(study):
        loaded_models(study)
        study["analysis"]["judge"] = {
            "kind": "local",
            "path": "checkpoints/mamba",
            "features": 2,
            "tested": 2,
            "seed": 1,
        }

    write_texts(folders)
    project = study_in(folders, judged)
    plan = snakemake(project, "-n", "results/analysis/similarity/cross", "--quiet", "host", "reason").stdout
    places = set(re.findall(r"--judged-[ab] (results/analysis/judged/\S+)", snakemake(project, "-n", "-p").stdout))
    assert len(places) == 3
    assert all(f"output: {place}" in plan for place in places)
    assert "checkpoints/mamba/config.json" in re.search(r"rule analysis_judged:\n\s+input: (.*)", plan)[1]


def test_a_study_given_by_configfile_replaces_params_yaml(folders):
    write_texts(folders)
    project = study_in(folders, set_value("report", "title", "another"))
    study = yaml.safe_load((folders / "params.yaml").read_text())
    loaded_models(study)
    (folders / "other.yaml").write_text(yaml.safe_dump(study))
    plan = snakemake(project, "-n", "--configfile", "other.yaml").stdout
    assert "results/models/pythia" in plan
    assert "results/models/neox" not in plan
