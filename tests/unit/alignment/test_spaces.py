import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import write_store
from tests.unit.alignment.test_compare import MATCHING, STATISTICS
from universality.alignment.settings import Spaces
from universality.alignment.sides import Pooling
from universality.alignment.spaces import _rows, write_spaces
from universality.alignment.token_order import order_by_document
from universality.alignment.whole_space import sample_rows, whole_space

SETTINGS = Spaces(
    comparisons=[], tokens=600, rsa_tokens=80, token_seed=3, variance_share=0.99, max_directions=8, bootstrap_samples=30
)
N = 1000  # tokens, ten a document


@pytest.fixture
def streams(tmp_path):
    """Layers 0 and 1 of two models; both layers of a, and layer 1 of b, see one thing, layer 0 of b another."""
    rng = np.random.default_rng(1)
    seen, other = rng.standard_normal((2, N, 4))
    shards, values = {}, {}
    for model, sources in {"a": (seen, seen), "b": (other, seen)}.items():
        for layer, source in enumerate(sources):
            x = source @ rng.standard_normal((4, 6)) + 0.1 * rng.standard_normal((N, 6))
            values[model, layer] = torch.from_numpy(x).float()
            described = {"model": model, "site": f"resid_post.{layer}", "split": "evaluation"}
            folder = tmp_path / model / str(layer)
            shards.setdefault(model, []).extend(write_store(folder, values[model, layer], [600, 400], **described))
    return shards, values


def test_layers_that_see_the_same_are_alike_and_the_null_is_not(streams, tmp_path):
    shards, values = streams
    rows = tuple(shards[model][:2] for model in "ab")
    layers = [0, 1], [0, 1]
    sides = shards["a"], shards["b"]
    write_spaces(("a", "b"), layers, sides, rows, MATCHING, STATISTICS, SETTINGS, tmp_path / "out.parquet")
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert len(table) == 2 * 2 * 4
    assert (table.tokens == 600).all()
    assert (table.documents == 60).all()
    alike = table[table.other_layer == 1].set_index(["layer", "measure"])
    apart = table[table.other_layer == 0].set_index(["layer", "measure"])
    for layer in (0, 1):
        for measure in ("cka", "cka_debiased", "svcca", "rsa"):
            assert alike.low[layer, measure] <= alike.value[layer, measure] <= alike.high[layer, measure]
            assert alike.low[layer, measure] > apart.high[layer, measure]
            assert alike.low[layer, measure] > alike.null[layer, measure]
    order = order_by_document(np.arange(N) // 10, MATCHING.token_shares, MATCHING.max_groups, MATCHING.order_seed)
    x, y = (values[model, 1].numpy()[order.rows[:600]] for model in "ab")
    plain = whole_space(
        x, y, np.zeros(600, dtype=int), np.ones((1, 1)), rsa_rows=sample_rows(600, 80, 3), max_directions=8
    )
    for measure, found in plain.items():
        assert alike.value[1, measure] == pytest.approx(found.value, abs=1e-9)


def test_a_span_has_the_row_of_its_last_token():
    order = order_by_document(np.arange(16) // 2, [], 8, seed=0)
    span = np.array([0, 0, 1, -1, 2, 2, 2, *range(3, 16)])
    places = _rows(order, Pooling(span, 16))
    last = [1, 2, 6, *range(7, 20)]
    assert (places == np.array(last)[order.rows]).all()
