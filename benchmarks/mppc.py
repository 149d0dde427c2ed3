"""MPPC between all features of two layers: ours, on sparse codes, against the paper's dense product in float32.

    python benchmarks/mppc.py [--tokens 100000] [--peer-tokens 100000] [--growth]

Ours finds both directions, the best partners on all tokens and on prefixes, and held-out partners, from codes as they
are read; the peer finds one maximum a feature. The peer's time is linear in tokens; with fewer --peer-tokens than
--tokens it is scaled up, and the output says so. Codes are synthetic: L0 features a token, drawn evenly.
"""

import argparse

import numpy as np
import scipy.sparse
import torch
from side_by_side import in_turn, ratio, table, use_threads

from universality.alignment.layers import sparse_layer
from universality.alignment.mppc import Drawn, match_sparse
from universality.alignment.token_order import TokenOrder, order_by_document, rotations

_DOCUMENT = 500  # tokens


def codes(n_tokens: int, n_features: int, l0: int, seed: int) -> scipy.sparse.csr_array:
    """[T, F] with exactly `l0` features at each token, exponentially distributed."""
    rng = np.random.default_rng(seed)
    step = n_features // l0
    features = rng.integers(0, step, (n_tokens, l0), dtype=np.int32) + np.arange(l0, dtype=np.int32) * step
    values = rng.exponential(1.0, n_tokens * l0).astype(np.float32)
    starts = np.arange(n_tokens + 1) * l0
    return scipy.sparse.csr_array((values, features.ravel(), starts), shape=(n_tokens, n_features))


def ours(a, b, order: TokenOrder, null_share: float = 0.0) -> np.ndarray:
    """Both directions, from codes by token."""
    layers = sparse_layer(a, order), sparse_layer(b, order)
    size = int(null_share * a.shape[1])
    chosen = [np.sort(np.random.default_rng(k).choice(a.shape[1], size, replace=False)) for k in range(2)]
    found = match_sparse(*layers, order, 5, Drawn(*chosen, rotations(order, 1, 2)))
    return found[0].r[:, 0]


def dense(a, b, batch: int = 2048) -> np.ndarray:
    """The paper's way: float32 sums of batches of dense activations, then one matrix of correlations."""
    n, f = a.shape
    xy = torch.zeros(f, b.shape[1])
    sums = [torch.zeros(size) for size in (f, f, b.shape[1], b.shape[1])]
    for start in range(0, n, batch):
        x, y = (torch.from_numpy(z[start : start + batch].toarray()) for z in (a, b))
        xy.addmm_(x.T, y)
        for total, value in zip(sums, (x, x * x, y, y * y), strict=True):
            total += value.sum(dim=0)
    x, xx, y, yy = sums
    xy.mul_(n).sub_(torch.outer(x, y))
    xy.div_((n * xx - x * x).clamp(min=1e-9).sqrt()[:, None]).div_((n * yy - y * y).clamp(min=1e-9).sqrt())
    return xy.max(dim=1).values.numpy()


def growth(n_features: int, l0: int) -> None:
    """Seconds by tokens, and by L0; what all have in common is the scan of all pairs of features for the largest."""
    sizes = [(tokens, l0) for tokens in (100_000, 200_000, 400_000, 800_000)]
    for tokens, active in [*sizes, (400_000, l0 // 2), (400_000, 2 * l0)]:
        a, b = (codes(tokens, n_features, active, seed) for seed in (1, 2))
        order = order_by_document(np.arange(tokens) // _DOCUMENT, [0.125, 0.25], 1000, 3)
        [seconds] = in_turn({"ours": lambda a=a, b=b, order=order: ours(a, b, order)}, 3, warm=True).values()
        print(f"tokens {tokens:7d}  L0 {active:3d}  {np.median(seconds):6.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 100_000), ("peer-tokens", 100_000), ("features", 24_576), ("l0", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growth", action="store_true")
    settings = parser.parse_args()
    use_threads(settings.threads)
    a, b = (codes(settings.tokens, settings.features, settings.l0, seed) for seed in (1, 2))
    order = order_by_document(np.arange(settings.tokens) // _DOCUMENT, [0.125, 0.25], 1000, 3)
    fewer = [z[: settings.peer_tokens] for z in (a, b)]
    small = order_by_document(np.arange(settings.peer_tokens) // _DOCUMENT, [], 1000, 3)
    worst = np.abs(ours(*fewer, small) - dense(*fewer)).max()
    print(f"largest difference from the dense product on {settings.peer_tokens} tokens: {worst:.1e}")
    ways = {
        "ours": lambda: ours(a, b, order),
        "ours with a null for 1 in 8": lambda: ours(a, b, order, 1 / 8),
        "dense, float32": lambda: dense(*fewer),
    }
    times = in_turn(ways, settings.rounds, warm=True)
    scale = settings.tokens / settings.peer_tokens
    if scale != 1:
        print(f"dense: {settings.peer_tokens} tokens were timed; their time is multiplied by {scale:g}")
        times["dense, float32"] = [scale * seconds for seconds in times["dense, float32"]]
    table(times, settings.tokens, "tokens")
    if settings.growth:
        growth(settings.features, settings.l0)
    print(f"ratio={ratio(times, 'ours', 'dense, float32'):.1f}")


if __name__ == "__main__":
    main()
