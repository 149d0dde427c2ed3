# The study, checked before any job, and what the rules of all stages share.

import json
import sys
from pathlib import Path

from universality.config import check_study, load_study
from universality.corpus.sources import local_paths
from universality.errors import StudyError
from universality.plan import Plan
from universality.provenance import code_hash
from universality.storage import check_writable

ROOT = Path(workflow.basedir)

try:
    # A study given by --configfile replaces params.yaml as a whole; merging two studies would mix their models.
    study = check_study(config, "config") if config else load_study("params.yaml")
    check_writable(Path("results"))
    corpus_files = local_paths(study.corpus.documents.source)
except StudyError as error:
    sys.exit(f"error: {error}")

plan = Plan(study)


wildcard_constraints:
    model="[A-Za-z][A-Za-z0-9_]*",
    variant="[A-Za-z][A-Za-z0-9_]*",
    comparison="[A-Za-z][A-Za-z0-9_]*",
    split="train|evaluation",
    seed=r"\d+",
    layer=r"\d+",
    shard=r"\d+",


def code(stage, *extra):
    """Hash of the code a stage runs: Snakemake does not see edits inside the package."""
    return code_hash(ROOT, f"universality.{stage}.commands", extra)


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


def tokenizer_files(tokenizer):
    """The files of a tokenizer that comes from a local folder."""
    return folder_files(tokenizer.name) if tokenizer.kind == "pretrained" else []


def checkpoint_files(wildcards):
    """The files of a model that comes from a local folder."""
    model = study.models.zoo[wildcards.model]
    return folder_files(model.path) if model.source == "folder" else []


def model_threads(wildcards):
    """Numerical threads, which are also the cores that Snakemake keeps for the job."""
    return study.models.zoo[wildcards.model].threads


def model_settings(wildcards):
    """The model's settings; how to train only where it is trained."""
    model = study.models.zoo[wildcards.model]
    made = model.model_dump(
        mode="json", exclude={"layers"}
    )  # which layers are compared does not change the model
    if model.source == "train":
        return as_json(model=made, training=study.models.training)
    return as_json(model=made)


def side_codes(side):
    """Input function: the codes of side "a" or "b", in the order of its layers."""

    def codes(wildcards):
        features = plan.side(
            getattr(study.alignment.comparisons[wildcards.comparison], side)
        )
        return [f"results/features/{f.path}" for f in features]

    return codes


def side_rows(side):
    """Input function: the evaluation shards of the side's model, which tell token, document and neurons."""
    return lambda wildcards: plan.shards(
        getattr(study.alignment.comparisons[wildcards.comparison], side).model,
        "evaluation",
    )


def comparison_settings(wildcards):
    """One comparison with the layers of its sides."""
    comparison = study.alignment.comparisons[wildcards.comparison]
    return as_json(
        comparison=comparison,
        layers_a=plan.layers(comparison.a.model),
        layers_b=plan.layers(comparison.b.model),
        statistics=study.alignment.statistics,
    )


def side_flags(wildcards, input):
    """Every input of a comparison behind its flag."""
    names = {
        "--a": input.a,
        "--b": input.b,
        "--rows-a": input.rows_a,
        "--rows-b": input.rows_b,
    }
    return [f"{flag} {path}" for flag, paths in names.items() for path in paths]
