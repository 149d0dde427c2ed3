"""The circuits of studies/paper.yaml at the sizes of Pythia-160M and Mamba-130M, on checkpoints made from nothing.

    python benchmarks/circuits_paper.py --folder /tmp/paper [--samples 8] [--threads 2] [--all]

Makes, in the formats of the hub, a GPT-NeoX and a Mamba of these sizes with weights as they are drawn, a tokenizer
whose vocabulary holds first names, and a corpus; then runs the study's circuit targets by Snakemake on them, with few
prompts: those that published values are of, or all, and sets the published values beside those measured. Weights that
were never trained do no task, so the bar for accuracy is set to 0 and the measured values mean nothing; they show
that every analysis runs at these sizes, and how long it takes. Prints the seconds of each job; the last line is those
of all as they passed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import yaml
from side_by_side import use_threads

from universality.circuits.tasks.ioi import NAMES
from universality.corpus.settings import DocstringsSource
from universality.corpus.sources import read_documents

ROOT = Path(__file__).parents[1]
_VOCAB = 32768
_PACKAGES = ["numpy", "scipy", "sklearn", "pandas", "torch", "transformers"]


def make_corpus(path: Path) -> list[str]:
    """Docstrings, and sentences that make every name a word of its own."""
    texts = [document.text for document in read_documents(DocstringsSource(packages=_PACKAGES), "corpus")]
    texts += [" ".join(f"Then {name} and {other} said so." for name in NAMES) for other in NAMES for _ in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf8")
    return texts


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=_VOCAB, special_tokens=["<|endoftext|>"])
    end = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **end).save_pretrained(folder)


def make_models(folder: Path) -> None:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    pythia = GPTNeoXConfig(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=2048,
    )  # fmt: skip
    # With the default, 0.1, random models amplify rounding a thousandfold.
    mamba = MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, initializer_range=0.02)
    GPTNeoXForCausalLM(pythia).save_pretrained(folder / "pythia")
    MambaForCausalLM(mamba).save_pretrained(folder / "mamba")


def write_study(folder: Path, samples: int, threads: int) -> Path:
    """studies/paper.yaml with what comes from the hub replaced by what is in the folder."""
    study = yaml.safe_load((ROOT / "studies" / "paper.yaml").read_text())
    study["corpus"]["documents"]["source"] = {"kind": "files", "paths": [str(folder / "corpus.jsonl")]}
    study["corpus"]["tokenizer"]["name"] = str(folder / "tokenizer")
    for name, model in study["models"]["zoo"].items():
        del model["name"]
        model |= {"source": "folder", "path": str(folder / name), "threads": threads}
    study["circuits"]["threads"] = threads
    study["circuits"]["measuring"] |= {"samples": samples, "batch_size": min(samples, 16), "min_accuracy": 0.0}
    study["circuits"]["attribution"]["edge_prompts"] = 2
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="Also tasks of which nothing is published.")
    settings = parser.parse_args()
    use_threads(settings.threads)
    folder = settings.folder.resolve()
    if not (folder / "mamba").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_tokenizer(folder / "tokenizer", make_corpus(folder / "corpus.jsonl"))
        make_models(folder)
    study = write_study(folder, settings.samples, settings.threads)
    start = time.perf_counter()
    command = ["snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder / "run", "--configfile", study]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    (folder / "run").mkdir(exist_ok=True)
    target = "all_circuits" if settings.all else "results/circuits/published.parquet"
    subprocess.run([*command, "--cores", str(settings.threads), target], check=True, env=environment)
    published = pd.read_parquet(folder / "run" / "results" / "circuits" / "published.parquet")
    print(published.to_string(index=False))
    for path in sorted((folder / "run" / "logs" / "circuits").rglob("*.tsv")):
        seconds = path.read_text().splitlines()[1].split("\t")[0]
        print(f"{path.relative_to(folder / 'run' / 'logs' / 'circuits')!s:40s} {float(seconds):8.0f} s")
    print(f"seconds={time.perf_counter() - start:.0f}")


if __name__ == "__main__":
    main()
