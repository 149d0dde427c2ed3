import numpy as np
import pytest
import scipy.sparse
import scipy.stats

from universality.alignment.bootstrap import (
    centred_sums,
    document_index,
    percentile_interval,
    resample_weights,
    resampled_correlations,
    sparse_sums,
)
from universality.alignment.compare import ModelSide, compare, shuffled
from universality.alignment.settings import Statistics
from universality.errors import StudyError

SETTINGS = Statistics(bootstrap_seed=1, bootstrap_samples=200, confidence=0.95, shuffle_seed=2)
N_TOKENS, N_FEATURES, N_SHARED = 4000, 30, 12


def planted_sides(rng):
    """Two models of two layers. Feature f < 12 of a's layer 0 is feature 29 - f of b's layer 1, rescaled and noisy."""

    def layer():
        fires = rng.random((N_TOKENS, N_FEATURES)) < 0.03
        return fires * (1 + rng.random((N_TOKENS, N_FEATURES)))

    a, b = [layer(), layer()], [layer(), layer()]
    for f in range(N_SHARED):
        x = a[0][:, f]
        b[1][:, 29 - f] = np.where(x > 0, 3 * x + 0.1 * rng.random(N_TOKENS), 0)
    a[1][:, 5] = 0
    sides = [ModelSide(name, [3, 7], [scipy.sparse.csr_array(x) for x in s]) for name, s in (("a", a), ("b", b))]
    return sides, np.repeat(np.arange(200), N_TOKENS // 200)


@pytest.fixture(scope="module")
def planted():
    (a, b), documents = planted_sides(np.random.default_rng(0))
    columns, summary = compare(a, b, documents, SETTINGS)
    return a, b, documents, columns, summary


def test_planted_shared_features_are_found_both_ways(planted):
    *_, columns, _ = planted
    a_rows = [i for i in range(len(columns["model"])) if columns["model"][i] == "a" and columns["layer"][i] == 3]
    for i in a_rows[:N_SHARED]:
        f = columns["feature"][i]
        assert columns["mppc"][i] > 0.99
        assert (columns["best_model"][i], columns["best_layer"][i], columns["best_feature"][i]) == ("b", 7, 29 - f)
    assert columns["mppc"][a_rows[N_SHARED:]].max() < 0.3
    back = [i for i in range(len(columns["model"])) if columns["model"][i] == "b" and columns["layer"][i] == 7]
    assert (columns["best_layer"][back[18:]] == 3).all()
    assert columns["best_feature"][back[18:]].tolist() == list(range(11, -1, -1))


def test_the_table_has_a_row_a_feature(planted):
    a, _, _, columns, summary = planted
    assert len(columns["mppc"]) == 4 * N_FEATURES
    dead = columns["dead"]
    assert dead.sum() == 1 == summary["both"]["dead"] == summary["a_to_b"]["dead"]
    where = int(np.flatnonzero(dead)[0])
    assert (columns["layer"][where], columns["feature"][where], columns["best_layer"][where]) == (7, 5, -1)
    frequency = np.concatenate([(layer.toarray() > 0).mean(0) for layer in a.layers])
    np.testing.assert_allclose(columns["frequency"][: 2 * N_FEATURES], frequency)
    assert summary["both"]["mean"] == pytest.approx(np.nanmean(columns["mppc"]))


def test_shuffling_takes_the_shared_features_away_and_keeps_everything_else(planted):
    a, b, documents, _, summary = planted
    null = shuffled(b, 5)
    for before, after in zip(b.layers, null.layers, strict=True):
        np.testing.assert_allclose(np.sort(before.toarray(), axis=0), np.sort(after.toarray(), axis=0))
    null_columns, null_summary = compare(a, null, documents, SETTINGS)
    assert null_summary["both"]["high"] < summary["both"]["low"]
    assert np.nanmax(null_columns["mppc"]) < 0.3


def test_codes_of_other_tokens_are_refused(planted):
    a, b, documents, *_ = planted
    with pytest.raises(StudyError, match="codes of 4000 tokens, but 3999 tokens were cached"):
        compare(a, b, documents[1:], SETTINGS)


def test_all_dead_is_an_error(planted):
    a, _, documents, *_ = planted
    silent = ModelSide("silent", [0], [scipy.sparse.csr_array((N_TOKENS, 3))])
    with pytest.raises(StudyError, match="every feature is dead"):
        compare(a, silent, documents, SETTINGS)


def test_resampled_correlations_equal_a_plain_bootstrap():
    """Against building each resample token by token and numpy.corrcoef."""
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(12), rng.integers(5, 15, 12))
    x = rng.random((len(documents), 4)) * (rng.random((len(documents), 4)) < 0.5)
    y = 0.5 * x + rng.random(x.shape) * (rng.random(x.shape) < 0.3)
    index = document_index(documents)
    weights = resample_weights(12, 25, seed=4)
    sparse = sparse_sums(index, scipy.sparse.csc_array(x), scipy.sparse.csc_array(y))
    r_sparse = resampled_correlations(sparse, weights)
    r_dense = resampled_correlations(centred_sums(index, x - x.mean(0), y - y.mean(0)), weights)
    for sample, counts in enumerate(weights.astype(int)):
        tokens = np.concatenate([np.tile(np.flatnonzero(documents == d), n) for d, n in enumerate(counts)]).astype(int)
        for f in range(4):
            expected = np.corrcoef(x[tokens, f], y[tokens, f])[0, 1]
            assert r_sparse[sample, f] == pytest.approx(expected, abs=1e-9)
            assert r_dense[sample, f] == pytest.approx(expected, abs=1e-9)


def test_intervals_cover_the_true_correlation():
    """100 samples of clustered pairs with true correlation 0.6: a 90% interval should cover about 90 of them."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        common = np.repeat(rng.standard_normal((80, 2)), 5, axis=0)
        noise = rng.standard_normal((400, 2))
        mixed = np.sqrt(0.5) * common + np.sqrt(0.5) * noise
        x, y = mixed[:, :1], 0.6 * mixed[:, :1] + 0.8 * mixed[:, 1:]
        sums = centred_sums(document_index(np.repeat(np.arange(80), 5)), x - x.mean(0), y - y.mean(0))
        r = resampled_correlations(sums, resample_weights(80, 200, seed=int(rng.integers(1 << 30))))
        low, high = percentile_interval(r, 0.9)
        covered += bool(low[0] <= 0.6 <= high[0])
    # binomial: fewer than 81 or more than 97 of 100 would be beyond three standard errors
    assert scipy.stats.binom.ppf(0.001, 100, 0.9) <= covered <= scipy.stats.binom.ppf(0.999, 100, 0.9)
