"""The two sides of a comparison: which layers, and how to get at each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse

from universality.activations.store import ActivationStore, check_aligned
from universality.alignment.dense import DenseLayer, principal_components, read_dense_layers
from universality.alignment.layers import Layer, SparseLayer, sparse_layer
from universality.alignment.settings import SIGNED, Comparison, Matching
from universality.alignment.spans import pool, shared_spans
from universality.alignment.token_order import TokenOrder, order_by_document
from universality.errors import StudyError
from universality.features.codes import read_codes
from universality.runtime import progress

_HELD = 6  # layers of side a that are in memory at a time


class ModelSide(NamedTuple):
    """`numbers`: of the model's layers that are compared; `load(number, order)` reads one; `sparse`: whether these are
    sparse codes."""

    model: str
    numbers: list[int]
    load: Callable[[int, TokenOrder], Layer]
    sparse: bool = True


class Pooling(NamedTuple):
    """Which span each token of a side belongs to [T], or -1, and how many spans there are."""

    span: np.ndarray
    n_spans: int


class Text(NamedTuple):
    """What a comparison goes through: `order` of tokens or, where the tokenizers of the sides differ, of spans of text
    that both see the ends of; `pooling` of each side, None where tokens are compared as they are."""

    order: TokenOrder
    pooling: tuple[Pooling | None, Pooling | None]


def read_text(rows_a: list[Path], rows_b: list[Path], settings: Matching) -> Text:
    """Raises StudyError if sides of one tokenizer hold different tokens, or have hardly any text in common."""
    a, b = ActivationStore(rows_a), ActivationStore(rows_b)
    documents = a.rows().documents
    pooling: tuple[Pooling | None, Pooling | None] = (None, None)
    if a.tokenizer == b.tokenizer:
        check_aligned(rows_a, rows_b)
    else:
        spans = shared_spans(a.rows(), b.rows())
        documents = spans.documents
        pooling = Pooling(spans.of_a, spans.n_spans), Pooling(spans.of_b, spans.n_spans)
    order = order_by_document(documents, settings.token_shares, settings.max_groups, settings.order_seed)
    return Text(order, pooling)


def read_sides(
    comparison: Comparison, layers: tuple[list[int], list[int]], paths: tuple[list[Path], list[Path]], text: Text
) -> tuple[ModelSide, ModelSide]:
    """Of both sides: the numbers of their layers, and what read_side takes."""
    a, b = (read_side(comparison, *one) for one in zip(("a", "b"), layers, paths, text.pooling, strict=True))
    return a, b


def read_side(
    comparison: Comparison, side: str, numbers: list[int], paths: list[Path], pooling: Pooling | None
) -> ModelSide:
    """`paths`: the codes of each layer, or shards of the basis' sites of all."""
    model, basis = getattr(comparison, side).model, getattr(comparison, side).basis
    if basis is None:
        return features_side(model, dict(zip(numbers, paths, strict=True)), pooling)
    if pooling is not None:
        raise StudyError(f"{model}: {basis} are compared token by token; both models must have one tokenizer")
    stores = read_dense_layers(model, numbers, paths)

    def load(number: int, order: TokenOrder) -> Layer:
        rotation = principal_components(stores[number], order) if basis == "pca" else None
        return DenseLayer(stores[number], order, rotation, signed=basis in SIGNED)

    return ModelSide(model, numbers, load, sparse=False)


def features_side(model: str, folders: dict[int, Path], pooling: Pooling | None = None) -> ModelSide:
    def load(number: int, order: TokenOrder) -> Layer:
        return sparse_layer(_read(folders[number], order, pooling), order)

    return ModelSide(model, list(folders), load)


def _read(folder: Path, order: TokenOrder, pooling: Pooling | None) -> scipy.sparse.csr_array:
    codes = read_codes(folder).by_token
    due = order.n_tokens if pooling is None else len(pooling.span)
    if codes.shape[0] != due:
        raise StudyError(
            f"{folder}: codes of {codes.shape[0]} tokens, but {due} tokens were cached; remake its features"
        )
    return codes if pooling is None else pool(codes, pooling.span, pooling.n_spans)


def pairs_of_layers(
    a: ModelSide, b: ModelSide, order: TokenOrder, what: str
) -> Iterator[tuple[int, Layer, int, Layer]]:
    """Every layer of a with every layer of b, to sum over pairs of their features; `what` it is for is told.

    A layer of b is read once for each few layers of a, which are held; sparse ones by feature alone.
    """
    held: dict[int, Layer] = {}
    steps = [(a.numbers[k : k + _HELD], y) for k in range(0, len(a.numbers), _HELD) for y in b.numbers]
    for some, y in progress(steps, f"{a.model} and {b.model}, {what}"):
        of_b = _slim(b.load(y, order), a)
        if list(held) != some:
            held.clear()
            held |= {x: _slim(a.load(x, order), b) for x in some}
        for x, of_a in held.items():
            yield x, of_a, y, of_b


def _slim(layer: Layer, other: ModelSide) -> Layer:
    return layer.by_feature() if isinstance(layer, SparseLayer) and other.sparse else layer


def in_memory(model: str, codes: dict[int, scipy.sparse.csr_array]) -> ModelSide:
    """A side of codes by token [T, F] at hand, by number of the layer."""
    return ModelSide(model, list(codes), lambda number, order: sparse_layer(codes[number], order))


def null_features(settings: Matching, side: int, number: int, n_features: int) -> np.ndarray:
    """Those of a layer that the null is computed for, the same in every job."""
    size = max(1, round(settings.null_share * n_features))
    drawn = np.random.default_rng([settings.null_seed, side, number]).choice(n_features, size, replace=False)
    return np.sort(drawn)
