"""dvc.yaml: the workflow's DAG for DVC, one stage a rule, each calling Snakemake restricted to that rule.

The file is written from the table below and the import closures of the stages' code; `make dvc.yaml` writes it anew.
It does not depend on any one study: what a stage makes follows from params.yaml.
"""

from pathlib import Path
from typing import NamedTuple

import yaml

from universality.provenance import LOCK, source_files

INPUTS = "inputs"  # local corpora and checkpoints that a study reads
PAGE = "src/universality/report/page.html.j2"


class Stage(NamedTuple):
    """A rule, the package whose commands it runs, what it reads and makes in results/, the keys that decide on it."""

    rule: str
    package: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    params: tuple[str, ...]
    target: str = ""
    """What Snakemake is asked for; by default `all_{rule}`, the rule that gathers the stage's jobs."""
    files: tuple[str, ...] = ()
    """Further files the stage depends on."""
    rules: str = ""
    """What names the stage's rules, where there are several and they follow from the study."""
    modules: tuple[str, ...] = ("commands",)
    """Those of the package that have the commands."""


# Which models, SAEs and comparisons there are is decided by these together.
_SHAPE = ("models.zoo", "alignment.comparisons")
_TRAINED = (*_SHAPE, "saes.also", "saes.transcoders", "saes.crosscoders")
# The study's own, and the folder of the others', which is empty where there are none.
_TOKENIZERS = ("corpus/tokenizer", "corpus/other_tokenizers")
_TOKENS = ("corpus/tokens", "corpus/other_tokens")

STAGES = (
    Stage(
        "corpus_documents",
        "corpus",
        (),
        ("corpus/documents.parquet",),
        ("corpus.documents",),
        "results/corpus/documents.parquet",
        (INPUTS,),
    ),
    Stage(
        "corpus_tokenizer",
        "corpus",
        ("corpus/documents.parquet",),
        _TOKENIZERS,
        ("corpus.tokenizer", "corpus.other_tokenizers"),
        files=(INPUTS,),
    ),
    Stage(
        "corpus_tokens",
        "corpus",
        ("corpus/documents.parquet", *_TOKENIZERS),
        _TOKENS,
        ("corpus.sequence_length", "corpus.other_tokenizers"),
    ),
    Stage("models", "models", (*_TOKENS, *_TOKENIZERS), ("models",), ("models",), files=(INPUTS,)),
    Stage(
        "activations",
        "activations",
        ("models", *_TOKENS),
        ("activations",),
        ("activations", *_TRAINED),
        rules="$(universality study rules activations)",
    ),
    # Training and evaluation; models and tokens are read by evaluation, and where a study trains on a stream.
    Stage(
        "saes",
        "saes",
        ("activations", "models", *_TOKENS),
        ("saes",),
        ("saes", "activations", *_SHAPE),
        rules="$(universality study rules saes)",
        modules=("commands", "evaluation_commands"),
    ),
    Stage("features", "features", ("activations", "saes"), ("features",), ("features", *_SHAPE)),
    Stage(
        "alignment",
        "alignment",
        ("activations", "saes", "features"),
        ("alignment",),
        ("alignment", "models.zoo"),
        rules="$(universality study rules alignment)",
    ),
    Stage(
        "circuits",
        "circuits",
        ("models", *_TOKENS, *_TOKENIZERS),
        ("circuits",),
        ("circuits", "models.zoo"),
        rules="$(universality study rules circuits)",
    ),
    Stage(
        "ablation",
        "ablation",
        ("models", "saes", "features", "alignment", *_TOKENS, *_TOKENIZERS),
        ("ablation",),
        ("ablation", "activations.cache", "circuits.tasks", "circuits.measuring", *_SHAPE),
    ),
    Stage(
        "analysis",
        "analysis",
        ("models", "activations", "saes", "features", "alignment", *_TOKENS, *_TOKENIZERS),
        ("analysis",),
        ("analysis", "activations", "alignment.matching", *_SHAPE),
        rules="$(universality study rules analysis)",
    ),
    Stage(
        "report",
        "report",
        ("models", "saes", "alignment", "circuits", "ablation", "analysis"),
        ("report", "metrics.json"),
        ("report", "saes.crosscoders", "ablation.comparisons", "analysis.comparisons", *_SHAPE),
        files=(PAGE,),
    ),
)


def dvc_stages(root: Path) -> dict:
    """The content of dvc.yaml for the code below `root`."""
    return {"stages": {stage.rule: _describe(stage, root) for stage in STAGES}}


def _describe(stage: Stage, root: Path) -> dict:
    modules = [f"universality.{stage.package}.{module}" for module in stage.modules]
    code = sorted({path for module in modules for path in source_files(root / "src", module)})
    target = stage.target or f"all_{stage.rule}"
    allowed = stage.rule if stage.target else f"{stage.rules or stage.rule} {target}"
    described: dict = {
        "cmd": f"snakemake --allowed-rules {allowed} -- {target}",
        "deps": sorted(
            [path.relative_to(root).as_posix() for path in code]
            + [f"results/{name}" for name in stage.reads]
            + [*stage.files, LOCK]
        ),
        "params": sorted(stage.params),
        "outs": [f"results/{name}" for name in stage.makes if not name.endswith("metrics.json")],
    }
    measured = [f"results/{name}" for name in stage.makes if name.endswith("metrics.json")]
    if measured:
        described["metrics"] = [{name: {"cache": False}} for name in measured]
    return described


def dvc_yaml(root: Path) -> str:
    header = "# Written by `make dvc.yaml` from src/universality/study/dvc.py; edit that file, not this one.\n"
    return header + yaml.safe_dump(dvc_stages(root), sort_keys=False, width=120)
