"""What the activation store costs: writing it beside the plain forward pass, and reading it shuffled.

    python benchmarks/activation_cache.py --family gpt_neox --layers 12 --width 768 --length 256 --sequences 64 \
        --batch 8 --threads 2 --rounds 5 --rows 400000

Writing: a model of random weights runs over random tokens and every residual stream is captured, in turn with and
without filling a shard a site. Reading: batches from a store of random rows, shuffled over all of it, beside numpy's
fancy indexing of a memory map in the same order, one batch at a time, without checksums; both from the page cache if
the store fits into memory. Prints a table of medians and, last, ratio=<median of the time with writing over without>.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numba
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from universality.activations.batches import StoredBatches
from universality.activations.cache import capture, fill_shards
from universality.activations.format import ENCODINGS, TokenRows, map_values, read_manifest
from universality.activations.sample import Sample
from universality.activations.settings import ShardSettings
from universality.activations.shuffle import shuffled_epochs
from universality.activations.sites import residual_site
from universality.activations.store import ActivationStore
from universality.activations.writer import ShardWriter
from universality.models.language_model import FAMILIES, LanguageModel
from universality.models.settings import TrainedModel

VOCABULARY = 50_304
SHARDS = 4
DESCRIBED = {
    "model": "random", "split": "train", "sample_seed": 0, "tokenizer": "random", "first_row": 0,
    "products": "float32", "product_error": 0.0, "device": "cpu",
}  # fmt: skip


def random_model(options) -> LanguageModel:
    settings = TrainedModel(
        family=options.family, seed=0, n_layers=options.layers, d_model=options.width,
        n_heads=max(1, options.width // 64), steps=1, batch_size=2, learning_rate=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = FAMILIES[options.family].configure(settings, VOCABULARY, options.length, 0)
    return LanguageModel(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))


def random_sample(options) -> Sample:
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (options.sequences, options.length), dtype=np.int32)
    tokens[:, 0] = 0
    return Sample(tokens, np.zeros_like(tokens), tokens != 0, "random")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_writing(options, folder: Path) -> float:
    """Print both sides; the median ratio of the time with writing over the time without."""
    model, sample = random_model(options), random_sample(options)
    sites = [residual_site(layer) for layer in range(options.layers)]
    settings = ShardSettings(
        sample_seed=0,
        shard_sequences=options.sequences,
        batch_size=options.batch,
        dtype=options.dtype,
        products="float32",
        device="cpu",
    )
    described = DESCRIBED | {"first_sequence": 0, "sequences": options.sequences}
    folders = {site: folder / "written" / site for site in sites}

    def plain() -> None:
        for start in range(0, options.sequences, options.batch):
            capture(model, sample.tokens[start : start + options.batch], sites)

    def writing() -> None:
        fill_shards(model, "random", sample, described, settings, folders)

    capture(model, sample.tokens[: options.batch], sites)  # the first warms up: compilation, allocation
    times: dict[str, list[float]] = {"forward": [], "forward and writing": []}
    for _ in range(options.rounds):
        times["forward"].append(seconds(plain))
        times["forward and writing"].append(seconds(writing))
    n_bytes = sum(path.stat().st_size for path in (folder / "written").rglob("*") if path.is_file())
    for name, values in times.items():
        median = statistics.median(values)
        written = f"{n_bytes / median / 1e9:8.3f} GB/s" if "writing" in name else ""
        print(f"{name:24s} {median:9.3f} s {sample.n_rows / median:12.0f} tokens/s {written}", flush=True)
    return statistics.median(b / a for a, b in zip(*times.values(), strict=True))


def random_store(options, folder: Path) -> list[Path]:
    shards, size = [], options.rows // SHARDS
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for number in range(SHARDS):
        zeros = np.zeros(size, dtype=np.int32)
        place = {"site": "resid_post.0", "first_row": number * size, "first_sequence": number, "sequences": 1}
        shards.append(folder / f"shard_{number}")
        writer = ShardWriter(shards[-1], DESCRIBED | place, TokenRows(*[zeros] * 5), (options.width,), options.dtype)
        for start in range(0, size, 4096):
            rows = torch.randn(min(4096, size - start), options.width, generator=generator)
            writer.write(rows.to(ENCODINGS[options.dtype].torch))
        writer.finish()
    return shards


def measure_reading(options, folder: Path) -> None:
    """Print both sides for one epoch each round, after the pass for the statistics, which checks all blocks."""
    shards = random_store(options, folder / "read")
    store = ActivationStore(shards)
    batches = StoredBatches(store)
    size, steps = options.train_batch, store.n_rows // options.train_batch
    mapped = [map_values(shard, read_manifest(shard)) for shard in shards]
    bounds = np.cumsum([0, *(len(values) for values in mapped)])

    def shuffled() -> None:
        with closing(batches.batches(size, 0)) as found:
            for _ in itertools.islice(found, steps):
                pass

    def plain() -> None:
        for rows in itertools.islice(shuffled_epochs(store.n_rows, 0, 0, size), steps):
            batch = np.empty((size, store.d_in), mapped[0].dtype)
            where = np.searchsorted(bounds, rows, side="right") - 1
            for number, values in enumerate(mapped):
                chosen = np.flatnonzero(where == number)
                batch[chosen] = values[rows[chosen] - bounds[number]]
            torch.from_numpy(batch).view(ENCODINGS[options.dtype].torch).float()

    print(f"statistics, checking all {seconds(batches.statistics):9.3f} s", flush=True)
    times: dict[str, list[float]] = {"shuffled batches": [], "plain memory map": []}
    for _ in range(options.rounds):
        times["shuffled batches"].append(seconds(shuffled))
        times["plain memory map"].append(seconds(plain))
    for name, values in times.items():
        median, rows = statistics.median(values), steps * size
        rate = rows * store.row_bytes / median / 1e9
        print(f"{name:24s} {median:9.3f} s {rows / median:12.0f} rows/s   {rate:8.3f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="gpt_neox")
    parser.add_argument("--dtype", choices=sorted(ENCODINGS), default="bf16")
    parser.add_argument("--folder", help="Where to write; a temporary folder of the system's by default.")
    numbers = {"layers": 12, "width": 768, "length": 256, "sequences": 64, "batch": 8, "threads": 2, "rounds": 5}
    numbers |= {"rows": 400_000, "train-batch": 4096}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ratio = measure_writing(options, Path(folder))
        measure_reading(options, Path(folder))
    print(f"ratio={ratio:.3f}")


if __name__ == "__main__":
    main()
