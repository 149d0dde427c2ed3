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


def model_run():
    """What models run on after training, as they did for the stored activations."""
    cache = study.activations.cache
    return {key: getattr(cache, key) for key in ("sample_seed", "products", "device")}
