"""Whole spaces of two models compared layer by layer: CKA, SVCCA, RSA (alignment/whole_space.py tells what they are).

What is compared is the residual stream after each block, at a sample of whole documents, the first of the comparison's
order. Beside each measure stands its null: the same with the sample's documents of side b rotated by about half.
"""

from pathlib import Path

import numpy as np

from universality.alignment.bootstrap import centred_interval, resample_weights
from universality.alignment.dense import read_dense_layers, side_by_side
from universality.alignment.settings import Matching, Spaces, Statistics
from universality.alignment.sides import Pooling, read_text
from universality.alignment.token_order import TokenOrder
from universality.alignment.whole_space import Sample, compare_spaces, make_sample, represent, sample_rows
from universality.runtime import progress
from universality.storage import write_table

_GROUPS = 256  # units of the bootstrap, at most


def write_spaces(
    models: tuple[str, str],
    layers: tuple[list[int], list[int]],
    shards: tuple[list[Path], list[Path]],
    rows: tuple[list[Path], list[Path]],
    matching: Matching,
    statistics: Statistics,
    settings: Spaces,
    out: Path,
) -> None:
    """`shards`: of the residual stream after each of the layers; `rows`: of any one site. Where tokenizers differ, a
    span of text has the values of its last token."""
    text = read_text(*rows, matching)
    stores = [read_dense_layers(*one) for one in zip(models, layers, shards, strict=True)]
    order = text.order
    documents = order.documents[: max(np.searchsorted(order.documents, settings.tokens, side="right"), 3)]
    places = [_rows(order, pooling)[: documents[-1]] for pooling in text.pooling]
    sample = _sample(documents, statistics, settings)
    rotation = int(documents[len(documents) // 2])

    def values(side: int, layer: int) -> np.ndarray:
        return side_by_side(stores[side][layer], places[side]).astype(np.float64)

    shape = settings.variance_share, settings.max_directions
    held = {layer: represent(values(0, layer), sample, *shape) for layer in layers[0]}
    table: dict[str, list] = {
        name: [] for name in ("layer", "other_layer", "measure", "value", "low", "high", "null", "tokens", "documents")
    }
    for other in progress(layers[1], f"{models[0]} and {models[1]}, whole layers of {models[1]}"):
        y = values(1, other)
        plain, rotated = (represent(z, sample, *shape) for z in (y, np.roll(y, -rotation, axis=0)))
        for layer, x in held.items():
            null = compare_spaces(x, rotated, sample)
            for measure, found in compare_spaces(x, plain, sample).items():
                low, high = centred_interval(found.value, found.replicates[:, None], statistics.confidence)
                sizes = int(documents[-1]), len(documents) - 1
                row = layer, other, measure, found.value, float(low[0]), float(high[0]), null[measure].value, *sizes
                for column, value in zip(table.values(), row, strict=True):
                    column.append(value)
    write_table(out, table)


def _rows(order: TokenOrder, pooling: Pooling | None) -> np.ndarray:
    """The row of the store at each place of the order; of a span, the row of its last token."""
    if pooling is None:
        return order.rows
    last = np.zeros(pooling.n_spans, dtype=np.int64)
    inside = np.flatnonzero(pooling.span >= 0)
    np.maximum.at(last, pooling.span[inside], inside)
    return last[order.rows]


def _sample(documents: np.ndarray, statistics: Statistics, settings: Spaces) -> Sample:
    """`documents`: where those of the sample begin, and its end."""
    n, count = int(documents[-1]), len(documents) - 1
    bounds = documents[np.linspace(0, count, min(count, _GROUPS) + 1).round().astype(int)]
    group = np.searchsorted(bounds, np.arange(n), side="right") - 1
    weights = resample_weights(len(bounds) - 1, settings.bootstrap_samples, statistics.bootstrap_seed)
    return make_sample(group, weights, sample_rows(n, settings.rsa_tokens, settings.token_seed))
