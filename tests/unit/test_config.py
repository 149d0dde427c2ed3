import copy
import re
from pathlib import Path

import pytest
import yaml

from universality.config import check_study, load_study
from universality.errors import StudyError
from universality.plan import Plan
from universality.settings import parse_argument

ROOT = Path(__file__).parents[2]
SMOKE = yaml.safe_load((ROOT / "studies" / "smoke.yaml").read_text())
for _name in ("mamba", "neox_seed1"):
    del SMOKE["models"]["zoo"][_name]["layers"]  # these tests want all of them

PUBLISHED = SMOKE["circuits"]["published"][0]
BAD = [
    ("saes.variants.topk.kk", 3, "saes.variants.topk.kk: unknown key; allowed here: architecture, aux_coefficient"),
    ("saes.variants.topk.k", "many", "saes.variants.topk.k: 'many' is not allowed: Input should be a valid integer"),
    ("saes.variants.topk.k", 0, "saes.variants.topk.k: 0 is not allowed: Input should be greater than or equal to 1"),
    ("saes.variants.topk.k", 4000, "saes.variants.topk.k: 4000 is more than d_sae=64"),
    ("saes.variants.matryoshka.prefixes", [8, 64], "variants.matryoshka.prefixes: [8, 64] do not end below d_sae=64"),
    ("saes.variants.matryoshka.prefixes", [8, 8], "prefixes: [8, 8] do not grow from each one to the next"),
    ("saes.also", [{"model": "bert", "variant": "topk", "seed": 0}], "saes.also[0].model: 'bert' is not in models.zoo"),
    ("saes.also", [{"model": "neox", "variant": "x", "seed": 0}], "saes.also[0].variant: 'x' is not in saes.variants"),
    ("saes.transcoders.mlp.model", "bert", "saes.transcoders.mlp.model: 'bert' is not in models.zoo: mamba, neox"),
    ("saes.transcoders.mlp.dictionary.k", 65, "saes.transcoders.mlp.dictionary.k: 65 is more than d_sae=64"),
    ("saes.transcoders.topk", SMOKE["saes"]["transcoders"]["mlp"], "saes.transcoders.topk: a variant has that name"),
    (
        "saes.crosscoders.neox_mamba.sides",
        [{"model": "neox", "layer": 1}, {"model": "mamba", "layer": 2}],
        "saes.crosscoders.neox_mamba: layer 2 is out of range: mamba has n_layers=2",
    ),
    (
        "saes.crosscoders.neox_mamba.sides",
        [{"model": "neox", "layer": 1}, {"model": "neox", "layer": 1}],
        "saes.crosscoders.neox_mamba.sides: one of them is named twice",
    ),
    ("saes.evaluation.sequences", 300, "saes.evaluation.sequences: 300 is more than activations.evaluation_sequences"),
    (
        "corpus.documents.others",
        {"evaluation": {"kind": "files", "paths": ["x"]}},
        "corpus.documents: others.evaluation: the main source has a split of that name",
    ),
    ("corpus.documents.others.code.kind", "cod", "corpus.documents.others.code.kind: 'cod' is unknown; allowed: 'docs"),
    ("corpus.other_tokenizers", {"x": {"kind": "bpe", "vocab_size": 3}}, "corpus.other_tokenizers.x.vocab_size: 3 is"),
    (
        "models.zoo.neox.tokenizer",
        "small",
        "models.zoo.neox.tokenizer: 'small' is not in corpus.other_tokenizers: none",
    ),
    (
        "alignment.comparisons.cross.corpus",
        "train",
        "alignment.comparisons.cross.corpus: 'train' is no corpus of held-out documents: evaluation, code",
    ),
    (
        "corpus.documents.others.seed1_code",
        SMOKE["corpus"]["documents"]["others"]["code"],
        "corpus.documents.others: model neox_seed1 and split code read like model neox and split seed1_code",
    ),
    (
        "models.zoo.crosscoders",
        SMOKE["models"]["zoo"]["neox"],
        "models.zoo.crosscoders: results/saes keeps crosscoders",
    ),
    (
        "saes.variants.topk.architecture",
        "topp",
        "saes.variants.topk.architecture: 'topp' is unknown; allowed: 'topk', ",
    ),
    ("models.zoo.neox.family", "gpt5", "models.zoo.neox.family: 'gpt5' is not allowed: Input should be 'gpt_neox'"),
    ("models.zoo.neox.layers", [0, 7], "models.zoo.neox: layer 7 is out of range: n_layers=2 has 0 to 1"),
    (
        "models.zoo.neox.source",
        "disk",
        "neox.source: 'disk' is unknown; allowed: 'train', 'folder', 'hub', 'untrained'",
    ),
    ("models.zoo.neox.d_model", 33, "models.zoo.neox: d_model=33 must be a multiple of 2 * n_heads=4"),
    ("models.zoo.neox.learning_rate", "1e-3", "YAML reads this as text, write 0.001 or 1.0e-3"),
    (
        "models.zoo.neox_untrained.like",
        "bert",
        "models.zoo.neox_untrained.like: 'bert' is no trained or loaded model of models.zoo; allowed: mamba, neox, ",
    ),
    ("models.zoo.neox_untrained.like", "mamba_untrained", "neox_untrained.like: 'mamba_untrained' is no trained or"),
    ("models.zoo.neox_untrained.like", ["neox"], "models.zoo.neox_untrained.like: ['neox'] is no trained or loaded"),
    ("models.zoo.neox_untrained.n_layers", 3, "neox_untrained.n_layers: 3 is not that of neox, 2; it may be left out"),
    ("models.zoo.neox_untrained.family", "mamba", "family: 'mamba' is not that of neox, 'gpt_neox'; it may be left"),
    ("models.zoo.neox_untrained.layers", [2], "neox_untrained: layer 2 is out of range: n_layers=2 has 0 to 1"),
    ("models.zoo.neox_untrained.steps", 3, "models.zoo.neox_untrained.steps: unknown key; allowed here: d_model, "),
    ("models.zoo.neox_untrained.seed", -1, "models.zoo.neox_untrained.seed: -1 is not allowed"),
    ("saes.variants.topk.frozen_decoder", 1, "saes.variants.topk.frozen_decoder: 1 is not allowed: Input should be a"),
    (
        "saes.crosscoders.neox_mamba.dictionary.frozen_decoder",
        True,
        "saes.crosscoders.neox_mamba.dictionary: frozen_decoder: true is not for crosscoders",
    ),
    ("corpus.sequence_length", True, "corpus.sequence_length: True is not allowed"),
    (
        "corpus.documents.evaluation_fraction",
        1.5,
        "evaluation_fraction: 1.5 is not allowed: Input should be less than 1",
    ),
    ("corpus.documents.source", {"kind": "files"}, "corpus.documents.source.paths: missing"),
    ("corps", {}, "corps: unknown key; allowed here: ablation, activations, alignment, analysis, circuits, corpus"),
    ("alignment.comparisons.cross.a.model", "bert", "cross.a.model: 'bert' is not in models.zoo: mamba, neox"),
    ("alignment.comparisons.cross.a.variant", "x", "cross.a.variant: 'x' is not in saes.variants: topk, relu_l1"),
    ("alignment.comparisons.cross.a", {"model": "neox"}, "neox needs an SAE variant and seed"),
    (
        "alignment.comparisons.sae_seed_mamba.b.seed",
        0,
        "setting sae_seed compares one model and variant, two SAE seeds",
    ),
    (
        "alignment.comparisons.model_seed_neox.b.model",
        "mamba",
        "setting model_seed compares two trained models of a family",
    ),
    (
        "alignment.comparisons.cross.b.model",
        "neox_seed1",
        "compares two trained models of different families",
    ),
    (
        "alignment.comparisons",
        {"cross": SMOKE["alignment"]["comparisons"]["neurons"]},
        "alignment.comparisons: none is of SAE features on both sides",
    ),
    ("activations.train_sequences", 250, "train_sequences: 250 is not a multiple of cache.shard_sequences=256"),
    ("activations.dtype", "fp16", "activations.dtype: 'fp16' is not allowed: Input should be 'bf16' or 'fp32'"),
    ("activations.train", "disk", "activations.train: 'disk' is not allowed: Input should be 'store' or 'stream'"),
    ("activations.buffer_rows", 8, "activations.buffer_rows: 8 is less than saes.training.batch_size=256"),
    ("models.training.min_induction_gain", float("nan"), "min_induction_gain: nan is not allowed"),
    (
        "circuits.tasks.induction.length",
        99,
        "circuits.tasks.induction.length: 99 is more than corpus.sequence_length=32",
    ),
    (
        "circuits.published",
        [PUBLISHED | {"task": "copying"}],
        "published[0].task: 'copying' is not in tasks: induction",
    ),
    (
        "circuits.published",
        [PUBLISHED | {"model": "neox_untrained"}],
        "circuits.published[0].model: 'neox_untrained' is no model whose circuits are looked for: mamba, neox",
    ),
    (
        "circuits.published",
        [PUBLISHED | {"where": {"site": "y"}}],
        "paths.parquet has no column 'site'; allowed: model, task",
    ),
    ("circuits.published", [PUBLISHED | {"values": {"logits": 1.0}}], "paths.parquet has no column 'logits'"),
    (
        "circuits.published",
        [PUBLISHED | {"task": "recall", "table": "taps", "where": {"layer": 1}}],
        "published[0].table: taps is of induction tasks, recall is none",
    ),
    ("circuits.attribution.edge_sizes", [8, 4], "edge_sizes: [8, 4] do not ascend"),
    ("circuits.tasks.loss", {"kind": "induction", "length": 8}, "circuits.tasks.loss: ablation's tables tell the loss"),
    ("ablation.comparisons", ["neurons"], "ablation.comparisons: 'neurons' is no comparison of SAE features: cross,"),
    ("analysis.comparisons", ["neurons"], "analysis.comparisons: 'neurons' is no comparison of SAE features: cross,"),
    ("analysis.judge", {"kind": "oracle"}, "analysis.judge.kind: 'oracle' is unknown; allowed: 'endpoint', 'local'"),
    ("ablation.comparisons", ["cross", "cross"], "comparisons: cross, cross: one of them is named twice"),
    ("ablation.sequences", 512, "ablation.sequences: 512 is more than activations.evaluation_sequences=256"),
    ("ablation.features.quantile", 0.5, "ablation.features.quantile: 0.5 is not allowed"),
    ("report", None, "report: None is not allowed"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_a_bad_value_is_one_line_that_names_the_key(key, value, message):
    study = copy.deepcopy(SMOKE)
    *path, last = key.split(".")
    section = study
    for part in path:
        section = section[part]
    section[last] = value
    with pytest.raises(StudyError) as caught:
        check_study(study, "params.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("params.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_missing_section_and_a_file_that_is_no_study(tmp_path):
    with pytest.raises(StudyError, match="saes: missing"):
        check_study({k: v for k, v in SMOKE.items() if k != "saes"}, "params.yaml")
    for text, message in [("- 1", "a study is a mapping"), ("a: [", "not valid YAML"), ("", "a study is a mapping")]:
        path = tmp_path / "params.yaml"
        path.write_text(text)
        with pytest.raises(StudyError, match=message):
            load_study(path)
    with pytest.raises(StudyError, match="missing.yaml: cannot be read"):
        load_study(tmp_path / "missing.yaml")


@pytest.mark.parametrize("path", ["params.yaml", "studies/smoke.yaml", "studies/paper.yaml"])
def test_studies_that_come_with_the_project_are_valid(path):
    load_study(ROOT / path)


def test_smoke_asks_for_every_stage_and_setting_of_the_default_study():
    default, smoke = (load_study(ROOT / path) for path in ("params.yaml", "studies/smoke.yaml"))
    compared, all_compared = smoke.alignment.comparisons, default.alignment.comparisons
    assert compared.items() <= all_compared.items()
    assert {c.setting for c in compared.values()} == {c.setting for c in all_compared.values()}
    assert list(smoke.models.zoo) == list(default.models.zoo)
    assert list(smoke.saes.variants) == list(default.saes.variants)


def test_the_paper_study_has_the_papers_sizes():
    plan = Plan(load_study(ROOT / "studies" / "paper.yaml"))
    assert len(plan.layers("pythia")) == 12
    assert len(plan.layers("mamba")) == 24
    assert plan.study.saes.training.d_sae == 24_576
    train = plan.study.activations.train_sequences * (plan.study.corpus.sequence_length - 1)
    assert train == pytest.approx(10e6, rel=0.01)


def test_the_store_holds_what_the_study_reads_and_no_more():
    study = copy.deepcopy(SMOKE)
    study["models"]["zoo"]["mamba"]["layers"] = [1]
    study["saes"]["transcoders"] = {}

    def cached():
        return {(c.model, c.split): c.sites for c in Plan(check_study(study, "x")).cached()}

    inner = ["mamba.1.ssm_in", "mamba.1.gate"]
    assert cached()["mamba", "train"] == ["resid_post.1"]
    assert cached()["mamba", "evaluation"] == ["resid_post.1", *inner]
    assert cached()["neox_seed1", "evaluation"] == ["resid_post.0", "resid_post.1"]  # no neurons compared
    path = "results/activations/mamba/mamba.1.gate/evaluation/shard_0"
    assert path in Plan(check_study(study, "x")).results()
    study["activations"]["train"] = "stream"
    assert {split for _, split in cached()} == {"evaluation", "code"}
    assert Plan(check_study(study, "x")).rules("activations") == [f"activations_{m}_{s}" for m, s in cached()]
    assert Plan(check_study(study, "x")).rules("corpus") == ["corpus_documents", "corpus_tokenizer", "corpus_tokens"]
    study["alignment"]["comparisons"].pop("neurons")
    assert cached()["mamba", "evaluation"] == ["resid_post.1"]


def test_an_untrained_model_has_the_shape_and_the_layers_of_the_one_that_it_is_like():
    study = copy.deepcopy(SMOKE)
    zoo = study["models"]["zoo"]
    zoo["mamba"] |= {"layers": [1], "d_model": 48, "n_layers": 3}
    zoo["other"] = zoo["mamba_untrained"] | {"layers": [0, 2], "seed": 5, "family": "mamba"}
    plan = Plan(check_study(study, "x"))
    for name, layers in (("mamba_untrained", [1]), ("other", [0, 2])):
        model = plan.study.models.zoo[name]
        assert (model.family, model.n_layers, model.d_model) == ("mamba", 3, 48)
        assert plan.layers(name) == layers
    assert plan.models() == list(zoo)  # in the order of the file


def test_what_is_wrong_with_a_model_is_told_once():
    study = copy.deepcopy(SMOKE)
    study["models"]["zoo"]["neox"]["n_layers"] = "two"
    with pytest.raises(StudyError) as caught:
        check_study(study, "x")
    assert str(caught.value).count("two") == 1


def test_blocks_of_layers_are_the_parts_of_a_comparison():
    study = copy.deepcopy(SMOKE)
    found = {}
    for size in (1, 2, 5):
        study["alignment"]["block_layers"] = size
        plan = Plan(check_study(study, "x"))
        side = plan.study.alignment.comparisons["cross"].a
        found[size] = (plan.alignment_blocks(side), [path.split("/")[-1] for path in plan.alignment_parts("cross")])
    assert found[1] == ([[0], [1]], [f"a{i}_b{j}.safetensors" for i in (0, 1) for j in (0, 1)])
    assert found[2] == found[5] == ([[0, 1]], ["a0_b0.safetensors"])


def test_circuits_are_those_of_models_that_were_trained():
    plan = Plan(check_study(SMOKE, "x"))
    assert plan.circuit_models() == ["mamba", "neox", "neox_seed1"]
    circuits = {path for path in plan.results() if path.startswith("results/circuits/")}
    folders = {f"results/circuits/{task}/{m}" for task in ("induction", "recall") for m in plan.circuit_models()}
    assert circuits == folders | {"results/circuits/similarity/induction.parquet", "results/circuits/published.parquet"}
    assert plan.circuits(published=True) == ["results/circuits/induction/mamba"]


def test_a_model_and_a_variant_that_nothing_asks_for_need_no_dictionaries():
    study = copy.deepcopy(SMOKE)
    study["models"]["zoo"]["alone"] = study["models"]["zoo"]["neox_untrained"]
    study["saes"]["variants"]["unused"] = study["saes"]["variants"]["frozen_topk"]
    before, plan = (Plan(check_study(settings, "x")) for settings in (SMOKE, study))
    assert set(plan.results()) - set(before.results()) == {"results/models/alone"}


def test_comparisons_decide_on_which_corpora_what_is_stored_and_encoded():
    study = copy.deepcopy(SMOKE)
    study["corpus"]["documents"]["others"]["unused"] = study["corpus"]["documents"]["others"]["code"]
    plan = Plan(check_study(study, "x"))
    on_code = {c.model: c.sites for c in plan.cached() if c.split == "code"}
    assert on_code == {model: ["resid_post.0", "resid_post.1"] for model in ("mamba", "neox")}
    assert {c.split for c in plan.cached()} == {"train", "evaluation", "code"}
    assert plan.row_shards("mamba", "code") == ["results/activations/mamba/resid_post.0/code/shard_0"]
    neurons = plan.study.alignment.comparisons["neurons"].b
    assert plan.basis_shards(neurons, "code") == []
    codes = [c.path for c in plan.feature_sets() if c.corpus == "code"]
    assert codes == [f"code/{model}/topk/seed_0/layer_{layer}" for model in ("mamba", "neox") for layer in (0, 1)]
    assert {f"results/features/{path}" for path in codes} <= set(plan.results())
    assert len(plan.feature_sets()) == len(set(plan.feature_sets()))
    study["alignment"]["comparisons"]["neurons"]["corpus"] = "code"
    plan = Plan(check_study(study, "x"))
    stored = {(c.model, c.split): c.sites for c in plan.cached()}
    assert stored["mamba", "code"] == ["resid_post.0", "resid_post.1", *stored["mamba", "code"][2:]]
    assert len(stored["mamba", "code"]) == 6
    assert stored["mamba", "evaluation"] == ["resid_post.0", "resid_post.1"]
    assert len(plan.basis_shards(neurons, "code")) == 4


def own_tokenizer(model: str) -> dict:
    """The smoke study with a tokenizer of its own for the model, and no crosscoder."""
    study = copy.deepcopy(SMOKE)
    study["corpus"]["other_tokenizers"] = {"small": {"kind": "bpe", "vocab_size": 300}}
    study["models"]["zoo"][model]["tokenizer"] = "small"
    study["saes"]["crosscoders"] = {}
    return study


def test_a_model_reads_the_tokens_of_its_own_tokenizer():
    plan = Plan(check_study(own_tokenizer("mamba"), "x"))
    assert plan.tokenizer_of("mamba") == "results/corpus/other_tokenizers/small"
    assert plan.tokens_of("mamba") == "results/corpus/other_tokens/small"
    assert plan.tokens_of("neox") == "results/corpus/tokens"
    assert plan.tokens() == {"tokens": "tokenizer", "other_tokens/small": "other_tokenizers/small"}
    assert {plan.tokenizer_of("mamba"), plan.tokens_of("mamba")} <= set(plan.results())


def test_sites_of_a_crosscoder_share_a_tokenizer():
    study = own_tokenizer("mamba") | {"saes": SMOKE["saes"]}
    message = "must share one tokenizer, but neox has corpus.tokenizer, mamba has small"
    with pytest.raises(StudyError, match=re.escape(f"saes.crosscoders.neox_mamba.sides: {message}")):
        check_study(study, "x")


def test_only_compared_layers_are_planned():
    study = copy.deepcopy(SMOKE)
    study["models"]["zoo"]["mamba"]["layers"] = [1]
    plan = Plan(check_study(study, "x"))
    assert {c.features.layer for c in plan.feature_sets() if c.features.model == "mamba"} == {1}


def test_settings_come_inline_or_from_a_file(tmp_path):
    from universality.features.settings import FeaturesSettings

    inline = parse_argument(FeaturesSettings, '{"threads": 1, "batch_size": 8}')
    (tmp_path / "f.yaml").write_text("threads: 1\nbatch_size: 8\n")
    assert parse_argument(FeaturesSettings, str(tmp_path / "f.yaml")) == inline
    with pytest.raises(StudyError, match="--settings: batch_sise: unknown key"):
        parse_argument(FeaturesSettings, '{"threads": 1, "batch_size": 8, "batch_sise": 8}')


def test_small_numbers_and_any_character_survive_the_command_line():
    """Rules hand settings over as JSON, where 5e-05 has no point; YAML would take it for text."""
    study = copy.deepcopy(SMOKE)
    study["saes"]["training"]["learning_rate"] = 0.00005
    study["report"]["title"] = "naïve \U0001f40d"
    checked = check_study(study, "x")
    for section in (checked.saes.training, checked.report):
        assert parse_argument(type(section), section.model_dump_json()) == section
        assert parse_argument(type(section), section.canonical()) == section


def test_a_judge_has_a_folder_for_every_one_of_the_features_and_no_comparison_has_none():
    study = yaml.safe_load((ROOT / "studies" / "smoke.yaml").read_text())
    features = {
        path for path in Plan(check_study(study, "x")).analyses() if path.startswith("results/analysis/features")
    }
    assert len(features) == 3
    study["analysis"]["judge"] = {"kind": "local", "path": "inputs/chat", "features": 2, "tested": 2, "seed": 1}
    analyses = set(Plan(check_study(study, "x")).analyses())
    assert {path.replace("/features/", "/judged/", 1) for path in features} <= analyses
    study["analysis"]["comparisons"] = []
    assert Plan(check_study(study, "x")).analyses() == []
