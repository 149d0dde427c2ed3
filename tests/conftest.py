"""Small real things that tests of several stages share."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from universality.activations.format import ENCODINGS, TokenRows
from universality.activations.settings import DType
from universality.activations.writer import ShardWriter
from universality.corpus.documents import write_documents
from universality.corpus.packing import write_tokens
from universality.corpus.settings import DocumentsSettings, FilesSource, TrainedTokenizer
from universality.corpus.tokenizer import write_tokenizer
from universality.models.language_model import FAMILIES, LanguageModel
from universality.models.settings import TrainedModel
from universality.saes.settings import SAETraining

SENTENCE = "a model learns what its data holds and a feature fires where its meaning stands in the text of the study"
LENGTH = 16


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """120 little documents of English words."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for number in range(120):
        (folder / f"{number:03d}.txt").write_text(" ".join(rng.choice(SENTENCE.split(), 60)), encoding="utf8")
    return folder


@pytest.fixture(scope="session")
def other_text_folder(tmp_path_factory) -> Path:
    """20 little documents in other letters, each the length of several sequences."""
    folder = tmp_path_factory.mktemp("other-texts")
    for number in range(20):
        (folder / f"{number:02d}.txt").write_text(f"{number} Fühlt ∑ 你好 ZÜGE " * 4, encoding="utf8")
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder, other_text_folder, tmp_path_factory) -> Path:
    """A corpus folder as the workflow makes it: documents, tokenizer, tokens; another tokenizer and its tokens."""
    out = tmp_path_factory.mktemp("corpus")
    # Which documents are held out follows from their paths, which are the same in every run from the folder above.
    source = FilesSource(paths=[text_folder.name])
    others = {"other": FilesSource(paths=[other_text_folder.name])}
    settings = DocumentsSettings(source=source, others=others, min_characters=10, evaluation_fraction=0.3, split_seed=0)
    with contextlib.chdir(text_folder.parent):
        write_documents(settings, out / "documents.parquet")
    write_tokenizer(TrainedTokenizer(vocab_size=300), out / "documents.parquet", out / "tokenizer")
    write_tokenizer(TrainedTokenizer(vocab_size=270), out / "documents.parquet", out / "other_tokenizers" / "small")
    write_tokens(out / "documents.parquet", out / "tokenizer", LENGTH, out / "tokens")
    write_tokens(out / "documents.parquet", out / "other_tokenizers" / "small", LENGTH, out / "other_tokens" / "small")
    return out


def tiny_settings(family: str, **changes) -> TrainedModel:
    values = {"family": family, "seed": 1, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_state": 4}
    return TrainedModel(**values | {"steps": 6, "batch_size": 4, "learning_rate": 0.003} | changes)


def tiny_model(family: str, vocab_size: int = 50, context: int = LENGTH, **changes) -> LanguageModel:
    """A random model of transformers' own making, with weights large enough that every path matters."""
    from transformers import AutoModelForCausalLM

    settings = tiny_settings(family, **changes)
    torch.manual_seed(settings.seed)
    hf = AutoModelForCausalLM.from_config(FAMILIES[family].configure(settings, vocab_size, context, 0))
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim >= 2 and "A_log" not in name:
                parameter.mul_(6 if family == "falcon_h1" else 2)
    return LanguageModel(hf.eval().requires_grad_(False))


def write_store(folder: Path, values: torch.Tensor, sizes: list[int], dtype: DType = "fp32", **described) -> list[Path]:
    """Shards of `sizes` rows of `values` [T, ...], as the cache writes them; row t is token t of document t // 10."""
    where = {"model": "m", "site": "resid_post.0", "split": "train", "sample_seed": 0, "tokenizer": "t"}
    described = where | {"products": "float32", "product_error": 0.0, "device": "cpu"} | described
    values = values.to(ENCODINGS[dtype].torch)
    shards, start = [], 0
    for number, size in enumerate(sizes):
        numbers = np.arange(start, start + size, dtype=np.int32)
        rows = TokenRows(numbers, numbers // 10, numbers % 10, numbers % 10, numbers % 10 + 1)
        place = {"first_row": start, "first_sequence": number, "sequences": 1}
        shards.append(folder / f"shard_{number}")
        folder.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(shards[-1], described | place, rows, tuple(values.shape[1:]), dtype)
        for part in values[start : start + size].split(7):
            writer.write(part)
        writer.finish()
        start += size
    return shards


def small_training(**changes) -> SAETraining:
    """How dictionaries of tests are trained."""
    values = {"d_sae": 48, "learning_rate": 0.004, "batch_size": 256, "steps": 1500, "warmup_steps": 50}
    values |= {"sparsity_warmup_steps": 50, "decay_fraction": 0.3, "dead_steps": 20, "gradient_norm": 1.0}
    values |= {"products": "float32", "data_seed": 5, "checkpoint_steps": 10, "log_steps": 50}
    return SAETraining(**values | changes)


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param
