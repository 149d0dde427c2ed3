# The study, checked before any job, and what the rules of all stages share.

import json
import re
import sys
from pathlib import Path

from universality.activations.sites import residual_site
from universality.analysis.endpoint import Endpoint
from universality.config import check_study, load_study
from universality.corpus.sources import local_paths
from universality.errors import StudyError
from universality.plan import Plan
from universality.provenance import code_hash
from universality.storage import check_writable
from universality.study.needs import needs, product_rate, total_line

ROOT = Path(workflow.basedir)

try:
    # A study given by --configfile replaces params.yaml as a whole; merging two studies would mix their models.
    study = check_study(config, "config") if config else load_study("params.yaml")
    for folder in ("results", *Plan.lasting_folders):
        check_writable(Path(folder))
    corpus_files = local_paths(study.corpus.documents.corpora)
except StudyError as error:
    sys.exit(f"error: {error}")

plan = Plan(study)


def print_needs():
    """At the start of a real run: about how much disk and time the study takes, and whether a judge is missing."""
    print(total_line(needs(study), product_rate()), file=sys.stderr)
    if study.analysis.judge is not None and study.analysis.judge.kind == "endpoint":
        try:
            Endpoint.of_environment()
        except StudyError as error:
            print(f"Judging will fail: {error}", file=sys.stderr)


def judge_files(wildcards):
    """The files of a language model in a local folder that is asked."""
    judge = study.analysis.judge
    return folder_files(judge.path) if judge and judge.kind == "local" else []


def one_of(paths):
    """A pattern that matches these and nothing else."""
    return "|".join(re.escape(path) for path in paths) or "(?!)"


wildcard_constraints:
    model="[A-Za-z][A-Za-z0-9_]*",
    variant="[A-Za-z][A-Za-z0-9_]*",
    comparison="[A-Za-z][A-Za-z0-9_]*",
    task=one_of(study.circuits.tasks),
    corpus=one_of(study.corpus.documents.held_out),
    tokenizer=one_of(plan.tokenizers()),
    tokens=one_of(plan.tokens()),
    seed=r"\d+",
    layer=r"\d+",
    shard=r"\d+",
    i=r"\d+",
    j=r"\d+",
    side="[ab]",
    dictionary=one_of(d.path for d in plan.dictionaries()),
    evaluation=one_of(plan.evaluations_of_layers()),
    crosscoder=one_of(plan.crosscoders()),


def code(stage, *extra, module="commands"):
    """Hash of the code a stage runs: Snakemake does not see edits inside the package."""
    return code_hash(ROOT, f"universality.{stage}.{module}", extra)


def as_json(**settings):
    """Settings as the command line takes them, in one line with sorted keys."""
    plain = {
        k: v.model_dump(mode="json") if hasattr(v, "model_dump") else v
        for k, v in settings.items()
    }
    return json.dumps(plain, sort_keys=True)


def section(settings):
    """One settings object as the command line takes it."""
    return as_json(**settings.model_dump(mode="json"))


def folder_files(folder):
    """The files right in a local folder, so that an edited one is read anew; none if it is a name of the hub."""
    return sorted(str(path) for path in Path(folder).glob("*") if path.is_file())


def tokenizer_files(wildcards):
    """The files of a tokenizer that comes from a local folder."""
    _, tokenizer = plan.tokenizers()[wildcards.tokenizer]
    return folder_files(tokenizer.name) if tokenizer.kind == "pretrained" else []


def tokenizer_settings(wildcards):
    """The tokenizer's settings, with its name if it is not the study's own."""
    name, tokenizer = plan.tokenizers()[wildcards.tokenizer]
    return as_json(tokenizer=tokenizer, **({"name": name} if name else {}))


def checkpoint_files(wildcards):
    """The files of a model that comes from a local folder."""
    model = study.models.zoo[wildcards.model]
    return folder_files(model.path) if model.source == "folder" else []


def like_folder(wildcards):
    """The folder of the model that an untrained one is like."""
    model = study.models.zoo[wildcards.model]
    return [f"results/models/{model.like}"] if model.source == "untrained" else []


def model_threads(wildcards):
    """Numerical threads, which are also the cores that Snakemake keeps for the job."""
    return study.models.zoo[wildcards.model].threads


def model_settings(wildcards):
    """The model's settings; how to train only where it is trained."""
    model = study.models.zoo[wildcards.model]
    # Which layers are compared, and how its tokenizer is called, does not change the model.
    made = model.model_dump(mode="json", exclude={"layers", "tokenizer"})
    if model.source == "train":
        return as_json(model=made, training=study.models.training)
    return as_json(model=made)


def store_folder(wildcards, output):
    """The model's folder of the store, below which a job fills {site}/{split}/shard_{shard} for each site."""
    return str(Path(output[0]).parents[2])


def trained_in(jobs, wildcards):
    """The dictionaries that a job of the rule trains."""
    return jobs.members or [plan.dictionary(wildcards.dictionary)]


def tokens_of_all(dictionaries):
    """The tokens that all models of the dictionaries run on: those of a crosscoder share a tokenizer."""
    [tokens] = {plan.tokens_of(model) for d in dictionaries for model in d.models}
    return tokens


def dictionary_inputs(jobs):
    """Input function: the shards of a job's sites, or the models and tokens to run them on."""

    def inputs(wildcards):
        first = trained_in(jobs, wildcards)[0]
        if study.activations.train == "stream":
            return {
                "models": [f"results/models/{model}" for model in first.models],
                "tokens": tokens_of_all([first]),
            }
        return {
            "activations": [
                shard
                for source in first.sources
                for shard in plan.shards(*source, "train")
            ]
        }

    return inputs


def source_flags(sources):
    return [f"--source {model}:{site}" for model, site in sources]


def dictionary_flags(jobs):
    """Parameter function: what a job trains on, every input behind its flag."""

    def flags(wildcards, input):
        sources = source_flags(trained_in(jobs, wildcards)[0].sources)
        if study.activations.train == "stream":
            models = [f"--stream-model {model}" for model in input.models]
            return [*sources, *models, f"--tokens {input.tokens}"]
        return sources + [f"--activations {shard}" for shard in input.activations]

    return flags


def dictionary_settings(jobs):
    """Parameter function: what is trained and how; what is streamed only where it is."""

    def settings(wildcards):
        wanted = [
            {"variant": d.variant.model_dump(mode="json"), "seed": d.seed}
            for d in trained_in(jobs, wildcards)
        ]
        settings = {"saes": wanted, "training": study.saes.training}
        if study.activations.train == "stream":
            settings["stream"] = study.activations.stream
        return as_json(**settings)

    return settings


def evaluated(wildcards):
    """The dictionaries that an evaluation measures."""
    return plan.evaluated(wildcards.get("evaluation") or wildcards.crosscoder)


def evaluated_saes(wildcards):
    return [f"results/saes/{dictionary.path}" for dictionary in evaluated(wildcards)]


def evaluated_shards(wildcards):
    sources = {
        source for dictionary in evaluated(wildcards) for source in dictionary.sources
    }
    return [
        shard
        for source in sorted(sources)
        for shard in plan.shards(*source, "evaluation")
    ]


def evaluated_models(wildcards):
    models = {m for dictionary in evaluated(wildcards) for m in dictionary.models}
    return [f"results/models/{model}" for model in sorted(models)]


def evaluation_flags(wildcards, input):
    """Every input of an evaluation behind its flag."""
    names = {
        "--sae": input.saes,
        "--activations": input.activations,
        "--model": input.models,
    }
    return [f"{flag} {path}" for flag, paths in names.items() for path in paths]


def evaluation_settings(wildcards):
    """Whose dictionaries they are, how they are measured, and what the models run on."""
    saes = [
        {
            "sources": [f"{model}:{site}" for model, site in d.sources],
            "variant": d.name,
            "seed": d.seed,
        }
        for d in evaluated(wildcards)
    ]
    return as_json(saes=saes, evaluation=study.saes.evaluation, run=model_run())


def model_run():
    """What models run on after training, as they did for the stored activations."""
    cache = study.activations.cache
    return {key: getattr(cache, key) for key in ("sample_seed", "products", "device")}


def held_out_shards(wildcards):
    """The shards of a held-out corpus that an SAE encodes."""
    return plan.shards(
        wildcards.model, residual_site(int(wildcards.layer)), wildcards.corpus
    )


def side_values(side, block=None):
    """Input function: what side "a" or "b" compares, in the order of its layers: codes, or shards of a basis. Of all its
    layers, or of the block that the wildcard `block` numbers."""

    def values(wildcards):
        comparison = study.alignment.comparisons[wildcards.comparison]
        chosen = getattr(comparison, side)
        if chosen.basis is not None:
            return plan.basis_shards(chosen, comparison.corpus)
        layers = block_layers(chosen, wildcards[block] if block else None)
        features = [f for f in plan.side(chosen) if f.layer in layers]
        return [f"results/features/{comparison.corpus}/{f.path}" for f in features]

    return values


def side_saes(side):
    """Input function: the SAEs of a side, in the order of its layers."""

    def folders(wildcards):
        chosen = getattr(study.alignment.comparisons[wildcards.comparison], side)
        return [f"results/saes/{features.path}" for features in plan.side(chosen)]

    return folders


def side_residuals(side):
    """Input function: shards of the residual stream after all layers of a side's model."""

    def shards(wildcards):
        comparison = study.alignment.comparisons[wildcards.comparison]
        return plan.residual_shards(getattr(comparison, side).model, comparison.corpus)

    return shards


def block_layers(side, block):
    """The layers of a block, or all."""
    if block is None:
        return plan.layers(side.model)
    return plan.alignment_blocks(side)[int(block)]


def side_rows(side):
    """Input function: shards of the side's model on the comparison's corpus, which tell tokens and documents."""

    def shards(wildcards):
        comparison = study.alignment.comparisons[wildcards.comparison]
        return plan.row_shards(getattr(comparison, side).model, comparison.corpus)

    return shards


def match_settings(wildcards):
    """One comparison with the layers of its sides that a job compares."""
    comparison = study.alignment.comparisons[wildcards.comparison]
    return as_json(
        comparison=comparison,
        layers_a=block_layers(comparison.a, wildcards.get("i")),
        layers_b=block_layers(comparison.b, wildcards.get("j")),
        matching=study.alignment.matching,
    )


def comparison_settings(wildcards):
    """One comparison with all layers of its sides, and what is told of it."""
    matched = json.loads(match_settings(wildcards))
    return as_json(**matched, statistics=study.alignment.statistics)


def spaces_settings(wildcards):
    """The same, and how whole layers are compared."""
    compared = json.loads(comparison_settings(wildcards))
    spaces = study.alignment.spaces.model_copy(update={"comparisons": []})
    return as_json(**compared, spaces=spaces)


def side_flags(wildcards, input):
    """Every input of a comparison behind its flag."""
    names = {
        "--a": input.a,
        "--b": input.b,
        "--rows-a": input.rows_a,
        "--rows-b": input.rows_b,
    }
    return [f"{flag} {path}" for flag, paths in names.items() for path in paths]


def task_settings(wildcards):
    """One task, what is told of effects on it, and how they are estimated."""
    return as_json(
        name=wildcards.task,
        task=study.circuits.tasks[wildcards.task],
        measuring=study.circuits.measuring,
        attribution=study.circuits.attribution,
    )


def side_of(wildcards):
    """The side of a comparison that a job is of."""
    return getattr(study.alignment.comparisons[wildcards.comparison], wildcards.side)


def side_codes(wildcards):
    """Its codes, in the order of its layers."""
    corpus = study.alignment.comparisons[wildcards.comparison].corpus
    return [
        f"results/features/{corpus}/{f.path}" for f in plan.side(side_of(wildcards))
    ]


def ablation_settings(wildcards):
    """Which features are ablated, and what is measured on what."""
    return as_json(
        side=wildcards.side,
        layers=plan.layers(side_of(wildcards).model),
        corpus=study.alignment.comparisons[wildcards.comparison].corpus,
        sequences=study.ablation.sequences,
        features=study.ablation.features,
        tasks={
            name: task.model_dump(mode="json")
            for name, task in study.circuits.tasks.items()
        },
        measuring=study.circuits.measuring,
        run=model_run(),
    )


def tokens_of_model(wildcards):
    return plan.tokens_of(wildcards.model)


def held_out(corpus):
    """The sequences of a held-out corpus that activations were cached of."""
    sequences = study.activations.evaluation_sequences
    return {"corpus": corpus, "sequences": sequences, "run": model_run()}


def analysis_features_settings(wildcards):
    """Which contexts are kept of one SAE's features, and how much is measured by truncating them."""
    return as_json(
        layer=int(wildcards.layer),
        held=held_out(wildcards.corpus),
        contexts=study.analysis.contexts,
        truncation=study.analysis.truncation,
    )


def side_analyses(kind, side):
    """Input function: folders of the analysis stage, "features" or "judged", of a side's layers; none of a judge where
    there is none."""

    def folders(wildcards):
        if kind == "judged" and study.analysis.judge is None:
            return []
        comparison = study.alignment.comparisons[wildcards.comparison]
        return [
            f"results/analysis/{kind}/{comparison.corpus}/{f.path}"
            for f in plan.side(getattr(comparison, side))
        ]

    return folders


def analysis_flags(wildcards, input):
    """Those of both sides behind their flags."""
    return [
        f"--{kind}-{side} {path}"
        for kind in ("measures", "judged")
        for side in ("a", "b")
        for path in getattr(input, f"{kind}_{side}")
    ]


def similarity_settings(wildcards):
    """One comparison with all layers of its sides, and how correlations are told."""
    matched = json.loads(match_settings(wildcards))
    return as_json(**matched, against=study.analysis.against)


def idiosyncratic_settings(wildcards):
    """Which features of one side are listed, and what they are ablated in."""
    return as_json(
        side=wildcards.side,
        layers=plan.layers(side_of(wildcards).model),
        held=held_out(study.alignment.comparisons[wildcards.comparison].corpus),
        idiosyncratic=study.analysis.idiosyncratic,
    )
