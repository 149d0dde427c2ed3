import numpy as np
import pytest
import scipy.sparse
import scipy.stats

from universality.alignment.assignment import one_to_one
from universality.alignment.bootstrap import centred_interval, normal_interval, percentile_interval, resample_weights
from universality.alignment.layers import sparse_layer
from universality.alignment.null import critical, p_values, significant
from universality.alignment.pairs import correlations, group_sums, influence, summed_influence
from universality.alignment.token_order import order_by_document


class Blocks:
    """A dense layer around an array in token order."""

    def __init__(self, x):
        self.x, self.n_tokens, self.n_features = x - x.mean(axis=0), *x.shape

    def block(self, start, stop, columns):
        return self.x[start:stop][:, columns]


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(24), rng.integers(5, 15, 24))
    x = rng.random((len(documents), 4)) * (rng.random((len(documents), 4)) < 0.3)
    y = 0.5 * x + rng.random(x.shape) * (rng.random(x.shape) < 0.3)
    x[:, 3] += 50  # a dense column, whose sums would cancel
    return x.astype(np.float32), y.astype(np.float32), order_by_document(documents, [], 24, seed=1)


@pytest.mark.parametrize("rotated", [False, True])
def test_summed_influences_are_the_sums_of_influences(pair, rotated):
    """Of more pairs than one part holds, of none, of ranges; of sparse layers and of dense ones."""
    x, y, order = pair
    rotation = int(order.documents[5]) if rotated else 0
    n, sizes = len(order.groups) - 1, np.diff(order.groups).astype(float)
    i, j = np.divmod(np.arange(160) % 16, 4)
    ranges = [(0, n), (3, n), (0, 7), (0, 0)]
    sparse = [sparse_layer(scipy.sparse.csr_array(z), order) for z in (x, y)]
    dense = [Blocks(z[order.rows].astype(np.float64)) for z in (x, y)]
    for layers in (sparse, dense):
        sums = group_sums(*layers, i, j, order, rotation)
        found = summed_influence(*layers, i, j, order, rotation, ranges)
        for moves, (first, last) in zip(found, ranges, strict=True):
            expected = influence(sums[:, first:last], sizes[first:last]).sum(axis=1)
            np.testing.assert_allclose(moves, expected, atol=1e-12)
        assert not summed_influence(*layers, i[:0], j[:0], order, rotation, [(0, n)])[0].any()


@pytest.mark.parametrize("rotated", [False, True])
def test_resampled_correlations_equal_a_plain_bootstrap(pair, rotated):
    """Against building each resample token by token and numpy.corrcoef."""
    x, y, order = pair
    rotation = int(order.documents[5]) if rotated else 0
    weights = resample_weights(len(order.groups) - 1, 20, seed=4)
    i, j = np.arange(4), np.array([0, 1, 3, 2])
    layers = [sparse_layer(scipy.sparse.csr_array(z), order) for z in (x, y)]
    sizes = np.diff(order.groups).astype(float)
    r = correlations(group_sums(*layers, i, j, order, rotation), sizes, weights)
    dense = [Blocks(z[order.rows].astype(np.float64)) for z in (x, y)]
    r_dense = correlations(group_sums(*dense, i, j, order, rotation), sizes, weights)
    np.testing.assert_allclose(r_dense, r, atol=1e-6)
    a, b = x[order.rows].astype(float), np.roll(y[order.rows], -rotation, axis=0).astype(float)
    group = np.searchsorted(order.groups, np.arange(len(a)), side="right") - 1
    for sample, counts in enumerate(weights.astype(int)):
        tokens = np.concatenate([np.tile(np.flatnonzero(group == g), n) for g, n in enumerate(counts)]).astype(int)
        for k in range(4):
            assert r[sample, k] == pytest.approx(np.corrcoef(a[tokens, i[k]], b[tokens, j[k]])[0, 1], abs=1e-6)


def test_influence_is_the_derivative_of_the_correlation(pair):
    """Against finite differences of each group's weight, and its spread against the bootstrap's."""
    x, y, order = pair
    layers = [sparse_layer(scipy.sparse.csr_array(z), order) for z in (x, y)]
    sums, sizes = group_sums(*layers, np.arange(3), np.arange(3), order, 0), np.diff(order.groups).astype(float)
    moves, step = influence(sums, sizes), 1e-5
    for g in range(len(sizes)):
        weights = np.ones((2, len(sizes)))
        weights[:, g] += [step, -step]
        r = correlations(sums, sizes, weights)
        np.testing.assert_allclose(moves[g], (r[0] - r[1]) / (2 * step), atol=1e-7)
    resampled = correlations(sums, sizes, resample_weights(len(sizes), 4000, seed=1)).mean(axis=1)
    low, high = normal_interval(0.0, moves.mean(axis=1), 0.95)
    assert (high - low) / 3.92 == pytest.approx(resampled.std(), rel=0.1)
    constant = np.zeros_like(sums)
    constant[[0, 2]], constant[[1, 3]], constant[4] = sizes[:, None], 4 * sizes[:, None], 2 * sizes[:, None]
    assert not influence(constant, sizes).any()


def test_sums_add_up(pair):
    x, y, order = pair
    layers = [sparse_layer(scipy.sparse.csr_array(z), order) for z in (x, y)]
    sums = group_sums(*layers, np.array([0]), np.array([1]), order, 0)
    assert sums[0].sum() == pytest.approx(x[:, 0].sum(dtype=float))
    assert sums[4].sum() == pytest.approx((x[:, 0].astype(float) * y[:, 1]).sum())


def test_intervals_cover_the_true_correlation():
    """100 samples of clustered pairs with true correlation 0.6: a 90% interval should cover about 90 of them."""
    rng = np.random.default_rng(0)
    order = order_by_document(np.repeat(np.arange(80), 5), [], 80, seed=1)
    covered = 0
    for _ in range(100):
        common = np.repeat(rng.standard_normal((80, 2)), 5, axis=0)
        mixed = np.sqrt(0.5) * common + np.sqrt(0.5) * rng.standard_normal((400, 2))
        x, y = mixed[:, :1], 0.6 * mixed[:, :1] + 0.8 * mixed[:, 1:]
        weights = resample_weights(80, 200, seed=int(rng.integers(1 << 30)))
        sums = group_sums(Blocks(x), Blocks(y), np.array([0]), np.array([0]), order, 0)
        r = correlations(sums, np.diff(order.groups).astype(float), weights)
        low, high = percentile_interval(r, 0.9)
        covered += bool(low[0] <= 0.6 <= high[0])
    assert scipy.stats.binom.ppf(0.001, 100, 0.9) <= covered <= scipy.stats.binom.ppf(0.999, 100, 0.9)


def test_centred_intervals_hold_the_estimate_in_their_middle():
    values = np.random.default_rng(0).normal(0.2, 0.01, (2000, 1))
    low, high = centred_interval(0.25, values, 0.95)
    assert (low[0], high[0]) == pytest.approx((0.25 - 0.0196, 0.25 + 0.0196), abs=0.002)


def test_p_values_are_uniform_where_the_null_holds_and_frequency_matters():
    """Null maxima depend on frequency; features are compared with those of about their own."""
    rng = np.random.default_rng(0)
    frequency = rng.uniform(0.001, 0.1, 4000)
    level = 0.3 - 2 * frequency
    null_r, r = level + rng.normal(0, 0.01, (2, 4000)), level + rng.normal(0, 0.01, 4000)
    p = p_values(r, frequency, null_r, frequency, 200)
    for alpha in (0.05, 0.5):
        assert (p <= alpha).mean() == pytest.approx(alpha, abs=4 * np.sqrt(alpha * (1 - alpha) / 4000) + 0.01)
    rare, frequent = frequency < 0.02, frequency > 0.08
    for part in (rare, frequent):
        assert (p[part] <= 0.1).mean() == pytest.approx(0.1, abs=0.05)
    assert np.isnan(p_values(np.array([np.nan]), np.array([0.1]), null_r, frequency, 200)).all()


def test_the_critical_correlation_is_where_the_p_value_passes():
    rng = np.random.default_rng(1)
    frequency = rng.uniform(0.001, 0.1, 300)
    null_r, r = rng.random((1, 300)), rng.random(300)
    p = p_values(r, frequency, null_r, frequency, 60)
    for level in (0.03, 0.1, 0.5):
        assert ((r >= critical(level, frequency, null_r, frequency, 60)) == (p <= level)).all()


def test_discoveries_are_those_of_benjamini_and_hochberg():
    p = np.array([0.001, np.nan, 0.2, 0.01, 0.02, 0.9])
    found, level = significant(p, 0.05)
    assert found.tolist() == [True, False, False, True, True, False]
    assert level == 0.02
    assert significant(np.array([0.5, np.nan]), 0.05)[1] == 0


def test_one_to_one_matching_is_the_best_there_is():
    """Against scipy's assignment on the dense matrix, where pairs without an edge weigh nothing."""
    rng = np.random.default_rng(0)
    for shape in ((6, 9), (9, 6), (7, 7)):
        r = rng.uniform(-0.5, 1, shape) * (rng.random(shape) < 0.5)
        a, b = np.nonzero(r)
        partner = one_to_one(np.tile(a, 2), np.tile(b, 2), np.tile(r[a, b], 2), *shape)  # both sides name each edge
        matched = np.flatnonzero(partner >= 0)
        rows, columns = scipy.optimize.linear_sum_assignment(np.maximum(r, 0), maximize=True)
        assert r[matched, partner[matched]].sum() == pytest.approx(np.maximum(r, 0)[rows, columns].sum())
        assert len(set(partner[matched])) == len(matched)
        assert (r[matched, partner[matched]] > 0).all()


def test_percentiles_pass_over_what_is_missing():
    values = np.random.default_rng(0).standard_normal((50, 2, 3))
    values[:7, 0, 1], values[:, 1, 2] = np.nan, np.nan
    low, high = percentile_interval(values, 0.9)
    assert np.isnan(low[1, 2])
    assert np.isnan(high[1, 2])
    assert (low[0, 1], high[0, 1]) == pytest.approx(tuple(np.quantile(values[7:, 0, 1], [0.05, 0.95])))
    assert low[0, 0] == pytest.approx(np.quantile(values[:, 0, 0], 0.05))
    assert percentile_interval(values[:, 0, 1], 0.9)[0] == low[0, 1]
    assert percentile_interval(np.zeros((5, 0)), 0.9)[0].shape == (0,)
