"""A whole comparison at the paper's sizes, on synthetic codes: 12 layers against 24, d_sae 24,576, 1M tokens, L0 64.

    python benchmarks/mppc_paper.py --folder /tmp/codes [--layers-a 12] [--layers-b 24] [--tokens 1000000]
    python benchmarks/mppc_paper.py --folder /tmp/codes --matched 3579     # of an earlier run: statistics alone

Codes are made first, if the folder has none, and not timed. Then, as the workflow's jobs do it one after the other: the
matching of blocks of layers with the null of one feature in eight, and all statistics with 1,000 resamples. Matched
features are planted: half of every layer's features have copies in all layers, of which only the values differ. Prints
seconds and the largest memory of each; the last line is what statistics (null and resamples) add, as a multiple of the
matching without them.
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from side_by_side import use_threads

from universality.alignment.blocks import write_block
from universality.alignment.compare import write_comparison
from universality.alignment.settings import Comparison, Matching, Statistics
from universality.alignment.sides import ModelSide, features_side
from universality.alignment.token_order import TokenOrder, order_by_document
from universality.runtime import configure
from universality.storage import replacing, write_json, write_table

_DOCUMENT = 500  # tokens
MATCHING = Matching(
    partners=5, token_shares=[0.125, 0.25], order_seed=1, rotations=1, null_share=0.125, null_seed=2, max_groups=512
)
STATISTICS = Statistics(
    bootstrap_seed=3, bootstrap_samples=1000, confidence=0.95, null_neighbours=256, false_discovery_rate=0.05,
    thresholds=[0.3, 0.5, 0.7], unmatched_below=0.3, depth_features=512,
)  # fmt: skip
SIDES = {side: {"model": side, "variant": "topk", "seed": 0} for side in ("a", "b")}


def write_codes(folder: Path, n_tokens: int, n_features: int, l0: int, seed: int) -> None:
    """Exactly `l0` features at each token, one of each stretch of n_features / l0. Half of the stretches are drawn by a
    seed that all layers share, so that their features have copies there; the values' noise is each layer's own."""
    own, common = np.random.default_rng([seed, 1]), np.random.default_rng(0)
    step = n_features // l0
    drawn = np.empty((n_tokens, l0), dtype=np.int32)
    half = l0 // 2
    drawn[:, :half] = common.integers(0, step, (n_tokens, half), dtype=np.int32)
    drawn[:, half:] = own.integers(0, step, (n_tokens, l0 - half), dtype=np.int32)
    features = drawn + np.arange(l0, dtype=np.int32) * step
    values = own.exponential(1.0, features.size).astype(np.float32)
    table = {"token": np.repeat(np.arange(n_tokens, dtype=np.int32), l0), "feature": features.ravel(), "value": values}
    with replacing(folder) as made:
        made.mkdir()
        write_table(made / "codes.parquet", table)
        write_json(made / "summary.json", {"n_tokens": n_tokens, "d_sae": n_features})


def sides(folder: Path, settings: argparse.Namespace) -> tuple[ModelSide, ModelSide]:
    found = []
    for side, count in (("a", settings.layers_a), ("b", settings.layers_b)):
        folders = {layer: folder / f"{side}_{layer}" for layer in range(count)}
        for layer, path in folders.items():
            if not path.exists():
                seed = 1000 * ("ab".index(side) + 1) + layer
                write_codes(path, settings.tokens, settings.features, settings.l0, seed)
                print(f"made {path.name}", flush=True)
        found.append(features_side(side, folders))
    return found[0], found[1]


def matched(
    a: ModelSide, b: ModelSide, order: TokenOrder, matching: Matching, block_layers: int, out: Path
) -> list[Path]:
    """The jobs of blocks, one after the other; every layer of b is a block of its own here, as it is in memory."""
    out.mkdir(exist_ok=True)
    parts = parts_in(a, block_layers, out)
    for start, part in zip(range(0, len(a.numbers), block_layers), parts, strict=True):
        write_block(a._replace(numbers=a.numbers[start : start + block_layers]), b, order, matching, part)
    return parts


def parts_in(a: ModelSide, block_layers: int, folder: Path) -> list[Path]:
    return [folder / f"{start}.safetensors" for start in range(0, len(a.numbers), block_layers)]


def timed(what: str, run: Callable) -> tuple[float, object]:
    start, busy = time.perf_counter(), time.process_time()
    result = run()
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cpu = time.process_time() - busy
    print(f"{what:34s} {seconds:8.0f} s  ({cpu:.0f} s of processors)  {memory:5.2f} GiB at most so far", flush=True)
    return seconds, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    sizes = {"layers-a": 12, "layers-b": 24, "tokens": 1_000_000, "features": 24_576, "l0": 64, "block-layers": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matched", type=float, help="Seconds that the matching took, whose parts are in the folder.")
    parser.add_argument("--only-make", action="store_true", help="Make the codes and stop.")
    settings = parser.parse_args()
    use_threads(settings.threads)
    configure(settings.threads, None)  # so that progress is told
    settings.folder.mkdir(exist_ok=True)
    a, b = sides(settings.folder, settings)
    if settings.only_make:
        return
    documents = np.arange(settings.tokens) // _DOCUMENT
    order = order_by_document(documents, MATCHING.token_shares, MATCHING.max_groups, MATCHING.order_seed)
    if settings.matched:
        matching, parts = settings.matched, parts_in(a, settings.block_layers, settings.folder / "p")
    else:
        matching, parts = timed(
            "matching, null of 1 in 8",
            lambda: matched(a, b, order, MATCHING, settings.block_layers, settings.folder / "p"),
        )
    comparison, out = Comparison(setting="any", **SIDES), settings.folder / "compared"
    compared, _ = timed(
        "tables and intervals", lambda: write_comparison(comparison, a, b, parts, order, MATCHING, STATISTICS, out)
    )
    null = null_seconds(a, b, order, settings.block_layers, settings.folder / "f")
    alone = matching - null
    print(f"of the matching, {null:.0f} s are the null's, by the last lines")
    print(f"added={(null + compared) / alone:.2f}")


def null_seconds(a: ModelSide, b: ModelSide, order: TokenOrder, block_layers: int, out: Path) -> float:
    """What the null adds to the matching of all pairs of layers: what it adds to that of a block with one layer, twice
    in turn after a round of compilation."""
    block, layer = a._replace(numbers=a.numbers[:block_layers]), b._replace(numbers=b.numbers[:1])
    without = MATCHING.model_copy(update={"null_share": 1e-9})  # one feature a layer: there is no comparison without
    ways = {"no null": without, "null": MATCHING}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, matching in ways.items():
            took, _ = timed(
                f"one block and one layer, {name}", partial(matched, block, layer, order, matching, 99, out)
            )
            seconds[name].append(took)
    added = np.mean(seconds["null"][1:]) - np.mean(seconds["no null"][1:])
    return float(added * len(a.numbers) * len(b.numbers) / len(block.numbers))


if __name__ == "__main__":
    main()
