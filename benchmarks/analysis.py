"""Contexts and offline measures of 24,576 features on 1M tokens, L0 64: seconds and memory of each part.

    python benchmarks/analysis.py [--features 24576] [--tokens 1000000] [--l0 64]

Codes are synthetic, of Zipfian tokens: half of the features are decided by the token, the others by chance. There is no
peer that measures the same; the bounds are ten minutes and 6 GB on two cores. The last line is the total's share of ten
minutes.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import scipy.sparse
import torch
from side_by_side import use_threads

from universality.activations.format import TokenRows
from universality.analysis.contexts import find_contexts
from universality.analysis.features import measured

_SEQUENCE, _DOCUMENT = 1024, 500
_VOCABULARY, _D_MODEL = 50_304, 768
_BOUND = 600  # seconds


def text(n_tokens: int, rng: np.random.Generator) -> TokenRows:
    tokens = (rng.zipf(1.2, n_tokens) % _VOCABULARY).astype(np.int32)
    places = np.arange(n_tokens, dtype=np.int32)
    return TokenRows(tokens, places // _DOCUMENT, places % _SEQUENCE, places, places)


def codes_of(rows: TokenRows, n_features: int, l0: int, rng: np.random.Generator) -> scipy.sparse.csc_array:
    """`l0` features at each token, one of each stretch of n_features / l0."""
    step, n_tokens = n_features // l0, len(rows.tokens)
    drawn = rng.integers(0, step, (n_tokens, l0), dtype=np.int32)
    half = l0 // 2
    drawn[:, :half] = (rows.tokens[:, None] * (np.arange(half, dtype=np.int32) * 2 + 1)) % step
    features = drawn + np.arange(l0, dtype=np.int32) * step
    values = rng.exponential(1.0, features.size).astype(np.float32)
    starts = np.arange(n_tokens + 1, dtype=np.int64) * l0
    by_token = scipy.sparse.csr_array((values, features.ravel(), starts), shape=(n_tokens, n_features))
    return scipy.sparse.csc_array(by_token)


def timed(what: str, run: Callable):
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:20s} {seconds:7.1f} s   {memory:5.2f} GiB at most so far", flush=True)
    return result, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"features": 24_576, "tokens": 1_000_000, "l0": 64, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    use_threads(settings.threads)
    rng = np.random.default_rng(0)
    rows = text(settings.tokens, rng)
    codes, _ = timed("codes made", lambda: codes_of(rows, settings.features, settings.l0, rng))
    W_dec = torch.from_numpy(rng.normal(size=(settings.features, _D_MODEL)).astype(np.float32))
    promoting = torch.from_numpy(rng.normal(size=(_VOCABULARY, _D_MODEL)).astype(np.float32))
    needed = np.full(settings.features, np.nan)  # truncation runs a model, on a sample
    contexts, one = timed("contexts", lambda: find_contexts(codes, rows, 20, 4, 5, 0))
    _, other = timed("measures", lambda: measured(codes, rows, contexts, needed, W_dec, promoting))
    print(f"share={(one + other) / _BOUND:.2f}")


if __name__ == "__main__":
    main()
