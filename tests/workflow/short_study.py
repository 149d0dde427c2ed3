"""A study of few jobs with a rule of every stage: one model trained here, one from elsewhere with its own tokenizer.

The smoke study, which holds every kind of analysis, is run once; this one is killed, repeated, shared and edited.
"""

from pathlib import Path

import yaml

from tests.conftest import SENTENCE, tiny_model
from tests.workflow.project import ROOT
from universality.corpus.tokenizer import train_bpe

MAMBA = "given/mamba"  # in the form the hub has it


def write_mamba(folder: Path, seed: int = 1) -> None:
    """A random Mamba with a tokenizer of its own, as a colleague's git repository holds it."""
    tiny_model("mamba", vocab_size=290, context=32, seed=seed).hf.save_pretrained(folder)
    train_bpe([f"another text {number} {SENTENCE}" for number in range(300)], 290).save_pretrained(folder)


def write_short_study(folder: Path) -> None:
    """params.yaml and the checkpoint it names. The keys that stay are the smoke study's."""
    study = yaml.safe_load((ROOT / "studies" / "smoke.yaml").read_text())
    zoo, topk = study["models"]["zoo"], {"variant": "topk", "seed": 0}
    study["corpus"]["documents"]["others"] = {}
    study["corpus"]["other_tokenizers"] = {"own": {"kind": "pretrained", "name": MAMBA}}
    mamba = {"source": "folder", "family": "mamba", "path": MAMBA, "tokenizer": "own", "n_layers": 2, "d_model": 16}
    study["models"]["zoo"] = {"neox": zoo["neox"] | {"layers": [1]}, "mamba": mamba | {"layers": [1]}}
    saes = study["saes"]
    saes |= {"also": [], "transcoders": {}, "crosscoders": {}}
    one, other = ({"model": "mamba", "variant": variant, "seed": 0} for variant in ("topk", "matryoshka"))
    study["alignment"]["comparisons"] = {
        "cross": {"setting": "cross_architecture", "a": {"model": "neox", **topk}, "b": {"model": "mamba", **topk}},
        "variants": {"setting": "any", "a": one, "b": other},
    }
    study["circuits"]["tasks"] = {"induction": study["circuits"]["tasks"]["induction"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(study))
    write_mamba(folder / MAMBA)
