import numpy as np
import pytest
import scipy.sparse

from universality.alignment.mppc import (
    Matches,
    best_matches,
    best_matches_reference,
    best_of_correlations,
    best_over_layers,
    moments,
)


def random_codes(n_tokens, n_features, density, seed):
    matrix = scipy.sparse.random_array((n_tokens, n_features), density=density, rng=np.random.default_rng(seed))
    return matrix.tocsr().astype(np.float32)


@pytest.mark.parametrize("density", [0.002, 0.05, 0.6, 1.0])
def test_sparse_equals_numpy_corrcoef(density):
    a, b = random_codes(400, 37, density, 1), random_codes(400, 53, density, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(a.toarray().astype(float), b.toarray().astype(float), rowvar=False)[:37, 37:]
    expected = best_of_correlations(r)
    found = best_matches(a, b)
    np.testing.assert_allclose(found.mppc, expected.mppc, rtol=1e-9, atol=1e-12)
    dead = np.isnan(expected.mppc)
    assert np.array_equal(found.partner < 0, dead)
    rows = np.flatnonzero(~dead)
    np.testing.assert_allclose(r[rows, found.partner[rows]], expected.mppc[rows], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        best_matches_reference(a.toarray(), b.toarray()).mppc, expected.mppc, rtol=1e-9, atol=1e-12
    )


def test_pairs_that_never_fire_together_are_counted():
    """All co-firing pairs anticorrelate here; the best partner never fires with the feature."""
    x = np.array([1.0, 1, 0, 0, 0, 0])
    y = np.array([[0.1, 0.1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1.0]]).T
    a, b = scipy.sparse.csr_array(x[:, None]), scipy.sparse.csr_array(y)
    r = [np.corrcoef(x, y[:, j])[0, 1] for j in range(2)]
    found = best_matches(a, b)
    assert found.partner[0] == int(np.argmax(r)) == 1
    assert found.mppc[0] == pytest.approx(max(r))


def test_dead_features_match_nothing_and_are_matched_by_nothing():
    a, b = (np.random.default_rng(s).random((50, 3)) for s in (0, 1))
    a[:, 1], b[:, 0] = 0, 7.5  # never fires; never varies
    found = best_matches(scipy.sparse.csr_array(a), scipy.sparse.csr_array(b))
    assert np.isnan(found.mppc[1])
    assert found.partner[1] == -1
    assert 0 not in found.partner
    nothing = best_matches(scipy.sparse.csr_array(a), scipy.sparse.csr_array(np.zeros((50, 2))))
    assert np.isnan(nothing.mppc).all()


def test_dense_features_far_from_zero_do_not_cancel():
    """A mean 10,000 times the spread: float32 sums of squares give nonsense here."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(100_000)
    x = 1e4 + shared
    y = 1e4 + shared + np.sqrt(3) * rng.standard_normal(100_000)
    a, b = (scipy.sparse.csr_array(v[:, None]) for v in (x, y))
    assert best_matches(a, b).mppc[0] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert best_matches(a, b).mppc[0] == pytest.approx(0.5, abs=0.02)


def test_moments_equal_numpy():
    codes = random_codes(300, 20, 0.1, 3)
    mean, sd = moments(codes)
    np.testing.assert_allclose(mean, codes.toarray().mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(sd, codes.toarray().astype(np.float64).std(0), rtol=1e-9, atol=1e-12)


def test_best_over_layers_takes_the_largest_and_keeps_the_dead():
    nan = np.nan
    first = Matches(np.array([0.2, 0.9, nan]), np.array([4, 5, -1]))
    second = Matches(np.array([0.7, 0.9, nan]), np.array([6, 7, -1]))
    mppc, place, feature = best_over_layers([first, second])
    np.testing.assert_array_equal(mppc, [0.7, 0.9, nan])
    assert place.tolist() == [1, 0, -1]
    assert feature.tolist() == [6, 5, -1]
