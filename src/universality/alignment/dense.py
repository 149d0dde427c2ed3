"""Layers whose values are dense, such as neurons or axes of the residual stream: read from the store a block of tokens
and a tile of features at a time, so that neither all tokens nor all pairs of features are ever in memory.
"""

from pathlib import Path

import numpy as np

from universality.activations.sites import layer_of
from universality.activations.store import ActivationStore, stores_by_site
from universality.alignment.layers import Layer, Moments, SparseLayer, constant
from universality.alignment.mppc import Drawn, correlation, match_sparse, scales
from universality.alignment.token_order import TokenOrder
from universality.alignment.top import Found
from universality.errors import StudyError

_TOKENS = 4096  # a block
_TILE = 1024  # features of each side


class DenseLayer:
    """The values of one layer [T, F], its sites side by side; see layers.Dense.

    With a `rotation` [D, F'] they are values @ rotation. `signed`: each comes twice, first all as they are, then all
    with the other sign.
    """

    def __init__(
        self,
        sites: list[ActivationStore],
        order: TokenOrder,
        rotation: np.ndarray | None = None,
        signed: bool = False,
    ):
        self._sites, self._rows, self._rotation = sites, order.rows, rotation
        self._width = sum(site.d_in for site in sites) if rotation is None else rotation.shape[1]
        self.n_tokens, self.n_features = order.n_tokens, self._width * (2 if signed else 1)
        self._shift = np.zeros(self.n_features)
        self._shift, self.frequency, largest = self._first_pass()
        self.moments = self._moments(order, largest)

    def block(self, start: int, stop: int, columns: np.ndarray) -> np.ndarray:
        values = side_by_side(self._sites, self._rows[start:stop])
        if self._rotation is not None:
            values = values.astype(np.float64) @ self._rotation
        signs = np.where(columns < self._width, 1.0, -1.0)
        return values[:, columns % self._width] * signs - self._shift[columns]

    def _blocks(self, start: int, stop: int):
        everything = np.arange(self.n_features)
        for low in range(start, stop, _TOKENS):
            yield self.block(low, min(low + _TOKENS, stop), everything)

    def _first_pass(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, share of tokens where it is not zero, largest size [F]."""
        total, fired, largest = (np.zeros(self.n_features) for _ in range(3))
        for block in self._blocks(0, self.n_tokens):
            total += block.sum(axis=0)
            fired += (block != 0).sum(axis=0)
            largest = np.maximum(largest, np.abs(block).max(axis=0))
        return total / self.n_tokens, fired / self.n_tokens, largest

    def _moments(self, order: TokenOrder, largest: np.ndarray) -> Moments:
        """Of segments put together from the stretches between cuts; values are less the mean of all."""
        stretches = list(zip([0, *order.cuts[:-1]], order.cuts, strict=True))
        sums, squares = (np.zeros((len(stretches), self.n_features)) for _ in range(2))
        for k, (low, high) in enumerate(stretches):
            for block in self._blocks(low, high):
                sums[k] += block.sum(axis=0)
                squares[k] += (block**2).sum(axis=0)
        mean, sd = (np.empty((len(stretches) + 1, self.n_features)) for _ in range(2))
        ends = np.array([high for _, high in stretches])
        for k, (low, high) in enumerate(order.segments()):
            inside = (ends > low) & (ends <= high)
            mean[k] = sums[inside].sum(axis=0) / (high - low)
            variance = squares[inside].sum(axis=0) / (high - low) - mean[k] ** 2
            sd[k] = constant(np.sqrt(np.maximum(variance, 0)), largest)
        return Moments(mean, sd)


def side_by_side(sites: list[ActivationStore], rows: np.ndarray) -> np.ndarray:
    """Values [n, F] of several sites at rows [n] of the store, float32."""
    return np.concatenate([site.gather(rows).float().numpy() for site in sites], axis=1)


def principal_components(sites: list[ActivationStore], order: TokenOrder) -> np.ndarray:
    """Eigenvectors [D, D] of the covariance of a layer's values over the tokens compared, by falling variance, each
    with its largest entry positive."""
    width = sum(site.d_in for site in sites)
    total, products = np.zeros(width), np.zeros((width, width))
    first = side_by_side(sites, order.rows[:1]).astype(np.float64)  # near the mean, so that nothing cancels
    for low in range(0, order.n_tokens, _TOKENS):
        block = side_by_side(sites, order.rows[low : low + _TOKENS]) - first
        total += block.sum(axis=0)
        products += block.T @ block
    mean = total / order.n_tokens
    _, vectors = np.linalg.eigh(products / order.n_tokens - np.outer(mean, mean))
    vectors = vectors[:, ::-1]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(width)]
    return vectors * np.sign(largest)


def read_dense_layers(model: str, layers: list[int], shards: list[Path]) -> dict[int, list[ActivationStore]]:
    """Layer -> stores of its sites, from evaluation shards of all of them."""
    stores = stores_by_site(shards, model=model)
    for site, store in stores.items():
        if store.row_checksums != next(iter(stores.values())).row_checksums:
            raise StudyError(f"{model}: the shards of {site} hold other tokens than those of {next(iter(stores))}")
    by_layer = {layer: [store for site, store in stores.items() if layer_of(site) == layer] for layer in layers}
    for layer, found in by_layer.items():
        if not found:
            raise StudyError(f"no shard of {model} holds values of layer {layer}; given are {', '.join(stores)}")
    return by_layer


def match_dense(a: Layer, b: Layer, order: TokenOrder, m: int, drawn: Drawn) -> tuple[Found, Found]:
    """What match_sparse finds, by products of blocks; either side may be sparse."""
    sides = _Merge(a.n_features, m, order), _Merge(b.n_features, m, order)
    scale_a, scale_b = scales(a.moments), scales(b.moments)
    for columns_a in _tiles(a.n_features):
        for columns_b in _tiles(b.n_features):
            looks = _products(a, b, columns_a, columns_b, order.cuts, 0)
            r = [
                (product / n) * scale_a[0][s][columns_a, None] * scale_b[0][s][columns_b]
                - scale_a[1][s][columns_a, None] * scale_b[1][s][columns_b]
                for s, (product, n) in enumerate(_with_test(looks, order))
            ]
            sides[0].add(r, columns_a, columns_b)
            sides[1].add([x.T for x in r], columns_b, columns_a)
    nulls = [_null(x, y, chosen, drawn.rotations) for x, y, chosen in ((a, b, drawn.a), (b, a, drawn.b))]
    return sides[0].found(*nulls[0]), sides[1].found(*nulls[1])


def _tiles(n: int) -> list[np.ndarray]:
    return [np.arange(low, min(low + _TILE, n)) for low in range(0, n, _TILE)]


def _products(a: Layer, b: Layer, columns_a, columns_b, cuts: np.ndarray, rotation: int):
    """sum x y up to each cut, [C] arrays [columns_a, columns_b]."""
    total = np.zeros((len(columns_a), len(columns_b)))
    looks, low = [], 0
    for cut in cuts:
        for start in range(low, cut, _TOKENS):
            stop = min(start + _TOKENS, cut)
            total += a.block(start, stop, columns_a).T @ rotated_block(b, start, stop, columns_b, rotation)
        looks.append(total.copy())
        low = cut
    return looks


def rotated_block(layer: Layer, start: int, stop: int, columns: np.ndarray, rotation: int) -> np.ndarray:
    """Values at places (t + rotation) mod T for start <= t < stop."""
    low, high, n = start + rotation, stop + rotation, layer.n_tokens
    if low >= n:
        return layer.block(low - n, high - n, columns)
    if high <= n:
        return layer.block(low, high, columns)
    return np.concatenate([layer.block(low, n, columns), layer.block(0, high - n, columns)])


def _with_test(looks: list[np.ndarray], order: TokenOrder):
    """(sums, tokens) of each prefix, then of the second half."""
    yield from zip(looks, order.cuts, strict=True)
    yield looks[-1] - looks[order.half], order.n_tokens - order.cuts[order.half]


def _null(x: Layer, y: Layer, chosen: np.ndarray, rotations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r = np.full((len(rotations), len(chosen)), -np.inf)
    partner = np.full(r.shape, -1, dtype=np.int32)
    whole = len(x.moments.sd) - 2
    (scale_x, offset_x), (scale_y, offset_y) = scales(x.moments), scales(y.moments)
    for k, rotation in enumerate(rotations):
        for low in range(0, len(chosen), _TILE):
            part = chosen[low : low + _TILE]
            for columns in _tiles(y.n_features):
                [product] = _products(x, y, part, columns, np.array([x.n_tokens]), rotation)
                found = (product / x.n_tokens) * scale_x[whole][part, None] * scale_y[whole][columns]
                found -= offset_x[whole][part, None] * offset_y[whole][columns]
                found = np.where(np.isnan(found), -np.inf, found)
                best = found.argmax(axis=1)
                best_r = found[np.arange(len(part)), best]
                better = best_r > r[k, low : low + _TILE]
                r[k, low : low + _TILE][better] = best_r[better]
                partner[k, low : low + _TILE][better] = columns[best[better]]
    return correlation(r), partner


class _Merge:
    """The best so far of n features, tile after tile."""

    def __init__(self, n: int, m: int, order: TokenOrder):
        self._half, self._m = order.half, m
        self._r, self._partner = np.full((n, m), -np.inf), np.full((n, m), -1, dtype=np.int32)
        self._prefix_r = np.full((len(order.cuts) - 1, n), -np.inf)
        self._chosen, self._heldout_r = np.full(n, -1, dtype=np.int32), np.full(n, -np.inf)

    def add(self, r: list[np.ndarray], rows: np.ndarray, columns: np.ndarray) -> None:
        """`r`: correlations [rows, columns] on each prefix, on all tokens, on the second half."""
        *prefixes, whole, test = [np.where(np.isnan(x), -np.inf, x) for x in r]
        for k, x in enumerate(prefixes):
            best = x.argmax(axis=1)
            best_r = x[np.arange(len(rows)), best]
            better = best_r > self._prefix_r[k, rows]
            self._prefix_r[k, rows[better]] = best_r[better]
            if k == self._half:
                self._chosen[rows[better]] = columns[best[better]]
                self._heldout_r[rows[better]] = test[np.flatnonzero(better), best[better]]
        candidates = np.concatenate([self._r[rows], whole], axis=1)
        names = np.concatenate([self._partner[rows], np.broadcast_to(columns, whole.shape)], axis=1)
        kept = np.argsort(-candidates, axis=1, kind="stable")[:, : self._m]
        self._r[rows] = np.take_along_axis(candidates, kept, axis=1)
        self._partner[rows] = np.where(np.isneginf(self._r[rows]), -1, np.take_along_axis(names, kept, axis=1))

    def found(self, null_r: np.ndarray, null_partner: np.ndarray) -> Found:
        return Found(
            correlation(self._r), self._partner, correlation(self._prefix_r), self._chosen,
            correlation(self._heldout_r), null_r, null_partner,
        )  # fmt: skip


def match(a: Layer, b: Layer, order: TokenOrder, m: int, drawn: Drawn) -> tuple[Found, Found]:
    if isinstance(a, SparseLayer) and isinstance(b, SparseLayer):
        return match_sparse(a, b, order, m, drawn)
    return match_dense(a, b, order, m, drawn)
