import numpy as np
import pytest
import scipy.sparse

from tests.unit.alignment.reference import correlations, top
from universality.alignment.dense import match_dense
from universality.alignment.layers import sparse_layer
from universality.alignment.mppc import Drawn, match_sparse
from universality.alignment.token_order import order_by_document, rotations

T, F_A, F_B, M = 2500, 45, 70, 4


def sparse(rng, n):
    return rng.exponential(1, (T, n)) * (rng.random((T, n)) < rng.uniform(0.01, 0.3, n))


def heavy_tailed(rng, n):
    return rng.standard_cauchy((T, n)) ** 2 * (rng.random((T, n)) < 0.1)


def almost_dense(rng, n):
    return (1 + rng.random((T, n))) * (rng.random((T, n)) < 0.98)


def far_from_zero(rng, n):
    """Means of 1e4 times the spread, half of them with a common part."""
    common = rng.standard_normal((T, 1)) * (np.arange(n) % 2)
    return 1e4 + common + rng.standard_normal((T, n))


def with_constants(rng, n):
    x = sparse(rng, n)
    x[:, 0], x[:, 1], x[:, 2], x[: T // 2, 3] = 0, 3.7, 1e4, 0
    x[:, 5] = x[:, 4]
    return x


KINDS = [sparse, heavy_tailed, almost_dense, far_from_zero, with_constants]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def case(request):
    rng = np.random.default_rng(0)
    a, b = (request.param(rng, n).astype(np.float32) for n in (F_A, F_B))
    b[:, 10], b[:, 11] = a[:, 11], a[:, 12] + b[:, 11]
    return a, b, order_by_document(rng.integers(0, 120, T), [0.125, 0.75], 40, seed=3)


def layer(x, order):
    return sparse_layer(scipy.sparse.csr_array(x), order)


def drawn(order):
    return Drawn(np.arange(0, F_A, 2), np.arange(1, F_B, 3), rotations(order, 2, seed=5))


def test_partners_are_those_of_numpys_correlations(case):
    a, b, order = case
    found = match_sparse(layer(a, order), layer(b, order), order, M, drawn(order))
    x, y = a[order.rows], b[order.rows]
    for one, r in zip(found, (correlations(x, y), correlations(x, y).T), strict=True):
        values, _ = top(r, M)
        np.testing.assert_allclose(one.r, values, atol=1e-6)
        there = np.take_along_axis(r, np.maximum(one.partner, 0), axis=1)
        np.testing.assert_allclose(np.where(one.partner < 0, np.nan, there), values, atol=1e-6)


def test_prefixes_and_halves_are_those_of_numpys_correlations(case):
    a, b, order = case
    found = match_sparse(layer(a, order), layer(b, order), order, M, drawn(order))
    x, y = a[order.rows], b[order.rows]
    half = order.cuts[order.half]
    test = correlations(x[half:], y[half:])
    for one, transposed in zip(found, (False, True), strict=True):
        for k, cut in enumerate(order.cuts[:-1]):
            r = correlations(x[:cut], y[:cut])
            values, _ = top(r.T if transposed else r, 1)
            live = ~np.isnan(one.prefix_r[k])
            np.testing.assert_allclose(one.prefix_r[k][live], values[live, 0], atol=1e-6)
        chosen = np.flatnonzero(one.chosen >= 0)
        selection = correlations(x[:half], y[:half])
        there = (selection.T if transposed else selection)[chosen, one.chosen[chosen]]
        np.testing.assert_allclose(there, one.prefix_r[order.half][chosen], atol=1e-6)
        due = (test.T if transposed else test)[chosen, one.chosen[chosen]]
        np.testing.assert_allclose(one.heldout_r[chosen], due, atol=1e-6)


def test_the_null_meets_rotated_documents(case):
    a, b, order = case
    choice = drawn(order)
    found = match_sparse(layer(a, order), layer(b, order), order, M, choice)
    x, y = a[order.rows], b[order.rows]
    for k, rotation in enumerate(choice.rotations):
        for one, chosen, own, other in zip(found, (choice.a, choice.b), (x, y), (y, x), strict=True):
            values, _ = top(correlations(own[:, chosen], np.roll(other, -rotation, axis=0)), 1)
            np.testing.assert_allclose(one.null_r[k], values[:, 0], atol=1e-6)


def test_products_of_blocks_find_the_same(case):
    a, b, order = case
    layers = layer(a, order), layer(b, order)
    fast, plain = (f(*layers, order, M, drawn(order)) for f in (match_sparse, match_dense))
    for one, other in zip(fast, plain, strict=True):
        for name in ("r", "prefix_r", "null_r"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-9, err_msg=name)


def test_any_number_of_workers_gives_the_same_bytes(case):
    a, b, order = case
    layers = layer(a, order), layer(b, order)
    results = [match_sparse(*layers, order, M, drawn(order), workers) for workers in (1, 2, 5)]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            for x, y in zip(one, two, strict=True):
                assert x.tobytes() == y.tobytes()


def test_pairs_that_never_fire_together_count(tmp_path):
    """All of b's features exclude a's only one: the best is the least negative, which has no common token at all."""
    order = order_by_document(np.repeat(np.arange(20), 10), [], 20, seed=1)
    a = np.zeros((200, 1), np.float32)
    a[::2] = 1
    b = np.zeros((200, 3), np.float32)
    b[1::2, 0], b[1::4, 1], b[1, 2] = 1, 1, 1
    found, _ = match_sparse(layer(a, order), layer(b, order), order, 3, Drawn(*[np.arange(1)] * 2, np.array([10])))
    assert found.partner[0].tolist() == [2, 1, 0]
    np.testing.assert_allclose(found.r[0], np.sort(correlations(a, b)[0])[::-1])
