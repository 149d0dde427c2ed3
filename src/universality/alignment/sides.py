"""The two sides of a comparison: which layers, and how to get at each."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse

from universality.activations.store import ActivationStore, check_aligned
from universality.alignment.dense import DenseLayer, read_dense_layers
from universality.alignment.layers import Layer, sparse_layer
from universality.alignment.settings import Comparison, Matching
from universality.alignment.token_order import TokenOrder, order_by_document
from universality.errors import StudyError
from universality.features.codes import read_codes


class ModelSide(NamedTuple):
    """`numbers`: of the model's layers that are compared; `load(number, order)` reads one."""

    model: str
    numbers: list[int]
    load: Callable[[int, TokenOrder], Layer]


def read_order(rows_a: list[Path], rows_b: list[Path], settings: Matching) -> TokenOrder:
    """Raises StudyError unless the shards of both sides hold the same tokens."""
    check_aligned(rows_a, rows_b)
    documents = ActivationStore(rows_a).rows().documents
    return order_by_document(documents, settings.token_shares, settings.max_groups, settings.order_seed)


def read_side(comparison: Comparison, side: str, numbers: list[int], paths: list[Path]) -> ModelSide:
    """`paths`: the codes of each layer, or shards of the neurons of all."""
    model = getattr(comparison, side).model
    if comparison.setting == "neurons":
        stores = read_dense_layers(model, numbers, paths)
        return ModelSide(model, numbers, lambda number, order: DenseLayer(stores[number], order))
    return features_side(model, dict(zip(numbers, paths, strict=True)))


def features_side(model: str, folders: dict[int, Path]) -> ModelSide:
    def load(number: int, order: TokenOrder) -> Layer:
        codes = read_codes(folders[number]).by_token
        if codes.shape[0] != order.n_tokens:
            raise StudyError(
                f"{folders[number]}: codes of {codes.shape[0]} tokens, but {order.n_tokens} tokens were cached; "
                "remake its features"
            )
        return sparse_layer(codes, order)

    return ModelSide(model, list(folders), load)


def in_memory(model: str, codes: dict[int, scipy.sparse.csr_array]) -> ModelSide:
    """A side of codes by token [T, F] at hand, by number of the layer."""
    return ModelSide(model, list(codes), lambda number, order: sparse_layer(codes[number], order))


def null_features(settings: Matching, side: int, number: int, n_features: int) -> np.ndarray:
    """Those of a layer that the null is computed for, the same in every job."""
    size = max(1, round(settings.null_share * n_features))
    drawn = np.random.default_rng([settings.null_seed, side, number]).choice(n_features, size, replace=False)
    return np.sort(drawn)
