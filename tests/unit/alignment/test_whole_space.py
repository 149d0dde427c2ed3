import itertools
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from scipy.spatial.distance import pdist, squareform
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA

from universality.alignment.bootstrap import resample_weights
from universality.alignment.whole_space import (
    compare_spaces,
    make_sample,
    represent,
    sample_rows,
    whole_space,
)

MEASURES = ("cka", "cka_debiased", "svcca", "rsa")
N, P, Q, GROUPS = 60, 7, 5, 9


def grouped(n=N, n_groups=GROUPS, seed=0):
    """Groups of unequal sizes, their rows mixed."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.r_[np.arange(n_groups), rng.integers(0, n_groups, n - n_groups)])


def related(n=N, p=P, q=Q, seed=0, noise=1.0):
    """Two sides that share part of what they hold, far from 0, with dimensions of unequal variance."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) * np.linspace(3, 0.3, p)
    y = x @ rng.standard_normal((p, q)) + noise * rng.standard_normal((n, q))
    return x + 4, y - 2


def rotation(p, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((p, p)))[0]


def compare(x, y, groups=None, weights=None, **settings):
    groups = grouped(len(x)) if groups is None else groups
    weights = resample_weights(groups.max() + 1, 6, 0) if weights is None else weights
    return whole_space(x, y, groups, weights, **{"rsa_rows": np.arange(len(x)), **settings})


def drawn(groups, weight):
    """Rows of a resample, each as often as its group is drawn."""
    return np.repeat(np.arange(len(groups)), weight[groups].astype(int))


@pytest.fixture(scope="module")
def case():
    x, y = related()
    groups, weights = grouped(), resample_weights(GROUPS, 8, 1)
    return x, y, groups, weights, compare(x, y, groups, weights, variance_share=0.9)


def everything(found):
    return np.concatenate([[found.value], found.replicates])


# Against the plain definitions


def gram_cka(x, y):
    n = len(x)
    h = np.eye(n) - 1 / n
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def test_cka_equals_the_gram_matrix_formula_on_the_resampled_rows(case):
    x, y, groups, weights, found = case
    rows = [drawn(groups, w) for w in (np.ones(GROUPS), *weights)]
    np.testing.assert_allclose(everything(found["cka"]), [gram_cka(x[r], y[r]) for r in rows], rtol=1e-10)


def song_hsic(k, m):
    """Song et al. 2012, eq. 5, as printed."""
    n = len(k)
    k, m, one = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
    terms = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
    return terms / (n * (n - 3))


def song_cka(x, y):
    k, m = x @ x.T, y @ y.T
    return song_hsic(k, m) / np.sqrt(song_hsic(k, k) * song_hsic(m, m))


def test_debiased_cka_equals_the_formula_of_song(case):
    """Resamples that draw no group twice hold plain data sets."""
    x, y, groups, _, _ = case
    weights = np.random.default_rng(1).integers(0, 2, size=(5, GROUPS))
    assert weights.any(axis=1).all()
    rows = [drawn(groups, w) for w in (np.ones(GROUPS), *weights)]
    found = compare(x, y, groups, weights)["cka_debiased"]
    np.testing.assert_allclose(everything(found), [song_cka(x[r], y[r]) for r in rows], rtol=1e-9)


def test_debiased_cka_averages_over_quadruples_of_distinct_tokens_of_the_resampled_rows():
    x, y = related(n=7, p=3, q=2)
    groups = np.array([0, 1, 1, 2, 3, 4, 4])
    weights = np.array([[2, 1, 0, 3, 1], [0, 2, 1, 1, 1]])

    def hsic(a, b, tokens):
        tuples = [t for t in itertools.permutations(range(len(tokens)), 4) if len({*tokens[[*t]]}) == 4]
        i, j, k, l = tokens[np.array(tuples)].T  # noqa: E741
        return (a[i, j] * b[i, j] + a[i, j] * b[k, l] - 2 * a[i, j] * b[i, k]).mean()

    a, b = x @ x.T, y @ y.T
    expected = []
    for w in weights:
        tokens = drawn(groups, w)
        expected.append(hsic(a, b, tokens) / np.sqrt(hsic(a, a, tokens) * hsic(b, b, tokens)))
    np.testing.assert_allclose(compare(x, y, groups, weights)["cka_debiased"].replicates, expected, rtol=1e-8)


def leading(x, share):
    return PCA(n_components=share, svd_solver="full").fit_transform(x)


def test_svcca_equals_scipy_angles_between_the_principal_directions(case):
    x, y, groups, weights, found = case
    a, b = leading(x, 0.9), leading(y, 0.9)
    assert a.shape[1] < P
    assert b.shape[1] < Q
    expected = []
    for w in (np.ones(GROUPS), *weights):
        u, v = (z[drawn(groups, w)] for z in (a, b))
        expected.append(np.cos(scipy.linalg.subspace_angles(u - u.mean(0), v - v.mean(0))).mean())
    np.testing.assert_allclose(everything(found["svcca"]), expected, rtol=1e-9)


def test_svcca_equals_sklearn_cca(case):
    x, y, _, _, found = case
    a, b = leading(x, 0.9), leading(y, 0.9)
    count = min(a.shape[1], b.shape[1])
    u, v = CCA(n_components=count, max_iter=20_000, tol=1e-12).fit_transform(a, b)
    expected = np.mean([np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(count)])
    assert found["svcca"].value == pytest.approx(expected, abs=1e-5)


def spearman(x, y):
    return scipy.stats.spearmanr(pdist(x, metric="correlation"), pdist(y, metric="correlation")).statistic


def distinct_pairs(tokens):
    i, j = np.triu_indices(len(tokens), 1)
    i, j = tokens[i], tokens[j]
    return i[i != j], j[i != j]


def test_rsa_equals_scipy_on_the_chosen_rows(case):
    x, y, groups, weights, _ = case
    rows = sample_rows(N, 40, seed=3)
    found = compare(x, y, groups, weights, rsa_rows=rows)["rsa"]
    assert found.value == pytest.approx(spearman(x[rows], y[rows]), rel=1e-10)


def test_rsa_of_a_resample_is_the_correlation_of_ranks_over_its_pairs_of_distinct_tokens(case):
    x, y, groups, weights, _ = case
    rows = sample_rows(N, 40, seed=3)
    ranks = [squareform(scipy.stats.rankdata(pdist(z[rows], metric="correlation"))) for z in (x, y)]
    pairs = [distinct_pairs(drawn(groups[rows], w)) for w in weights]
    expected = [np.corrcoef(*(r[pair] for r in ranks))[0, 1] for pair in pairs]
    found = compare(x, y, groups, weights, rsa_rows=rows)["rsa"].replicates
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_ranking_the_resample_anew_makes_little_difference_to_rsa():
    x, y = related(n=150)
    groups, weights = grouped(150, 30), resample_weights(30, 6, 0)
    distances = [squareform(pdist(z, metric="correlation")) for z in (x, y)]
    pairs = [distinct_pairs(drawn(groups, w)) for w in weights]
    anew = [scipy.stats.spearmanr(*(d[pair] for d in distances)).statistic for pair in pairs]
    found = compare(x, y, groups, weights)["rsa"].replicates
    np.testing.assert_allclose(found, anew, atol=0.01)
    assert np.std(anew) > 0.02


# What they must and must not depend on


def test_rotations_scales_and_shifts_make_no_difference(case):
    x, y, groups, weights, found = case
    moved = compare(
        1e-3 * x @ rotation(P, 1), 50 * y @ rotation(Q, 2) + np.arange(Q), groups, weights, variance_share=0.9
    )
    for name in ("cka", "cka_debiased", "svcca"):
        np.testing.assert_allclose(everything(moved[name]), everything(found[name]), rtol=1e-8)


def test_scales_and_shifts_of_single_tokens_make_no_difference_to_rsa(case):
    x, y, groups, weights, found = case
    rng = np.random.default_rng(0)
    moved = compare(x * rng.uniform(0.5, 20, (N, 1)) + rng.standard_normal((N, 1)), 7 * y, groups, weights)
    np.testing.assert_allclose(everything(moved["rsa"]), everything(found["rsa"]), rtol=1e-9)


def test_invertible_maps_make_no_difference_to_svcca_of_all_the_variance(case):
    x, y, groups, weights, _ = case
    rng = np.random.default_rng(0)
    bent = x @ (rotation(P, 3) * 10.0 ** np.linspace(-4.5, 4.5, P)) @ rotation(P, 4)
    whole = compare(x, y, groups, weights, variance_share=1)["svcca"]
    moved = compare(bent, y @ rng.standard_normal((Q, Q)), groups, weights, variance_share=1)["svcca"]
    np.testing.assert_allclose(everything(moved), everything(whole), rtol=1e-5)


def test_sides_and_order_of_rows_make_no_difference(case):
    x, y, groups, weights, found = case
    order = np.random.default_rng(0).permutation(N)
    swapped = compare(y[order], x[order], groups[order], weights, variance_share=0.9)
    for name in MEASURES:
        np.testing.assert_allclose(everything(swapped[name]), everything(found[name]), rtol=1e-9)


def test_a_representation_is_most_like_itself(case):
    x, _, groups, weights, _ = case
    for found in compare(x, 3 * x + 1, groups, weights).values():
        np.testing.assert_allclose(everything(found), 1, rtol=1e-9)


def test_values_far_from_zero_do_not_cancel():
    x, y = related()
    far = compare(x + 1e7, y - 1e7)
    for name, found in compare(x, y).items():
        np.testing.assert_allclose(everything(far[name]), everything(found), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_fourth_powers_neither_vanish_nor_overflow(scale):
    x, y = related()
    scaled = compare(x * scale, y * scale)
    for name, found in compare(x, y).items():
        np.testing.assert_allclose(everything(scaled[name]), everything(found), rtol=1e-8)


def test_blocks_of_columns_make_no_difference(case, monkeypatch):
    x, y, groups, weights, found = case
    monkeypatch.setattr("universality.alignment.whole_space._BLOCK", GROUPS * Q * 3)
    blocked = compare(x, y, groups, weights)
    for name in ("cka", "cka_debiased"):
        np.testing.assert_allclose(everything(blocked[name]), everything(found[name]), rtol=1e-12)


def test_one_side_serves_many_comparisons(case):
    x, y, groups, weights, found = case
    sample = make_sample(groups, weights, np.arange(N))
    a, b = (represent(z, sample, variance_share=0.9) for z in (x, y))
    assert 0.9 <= a.variance_held < 1
    for name, similarity in compare_spaces(a, b, sample).items():
        np.testing.assert_array_equal(everything(similarity), everything(found[name]))
    few = represent(x, sample, max_directions=2)
    assert few.directions.shape == (N, 2)
    assert few.variance_held == pytest.approx(PCA(2).fit(x).explained_variance_ratio_.sum())


# What they find


def test_a_rotated_noisy_copy_is_recovered():
    """x isotropic, noise of variance s: CKA is 1 / (1 + s) and each canonical correlation 1 / sqrt(1 + s)."""
    rng = np.random.default_rng(0)
    n, p, s = 4000, 20, 0.5
    x = rng.standard_normal((n, p))
    y = x @ rotation(p, 0) + np.sqrt(s) * rng.standard_normal((n, p))
    groups = np.arange(n) // 40
    found = compare(x, y, groups, resample_weights(100, 50, 0), rsa_rows=sample_rows(n, 300, 0), variance_share=1)
    assert found["cka_debiased"].value == pytest.approx(1 / (1 + s), abs=0.01)
    assert found["svcca"].value == pytest.approx(1 / np.sqrt(1 + s), abs=0.01)
    assert found["rsa"].value > 0.5
    low, high = np.quantile(found["cka_debiased"].replicates, [0.005, 0.995])
    assert low < 1 / (1 + s) < high


def test_independent_sides_give_no_debiased_cka_and_no_rsa():
    """Plain CKA of as many dimensions as tokens is far from 0 by chance."""
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((400, 400)) for _ in range(2))
    found = compare(x, y, np.arange(400) // 4, resample_weights(100, 40, 0))
    assert found["cka"].value > 0.4
    for name in ("cka_debiased", "rsa"):
        assert found[name].value == pytest.approx(0, abs=0.02)
        assert found[name].replicates.mean() == pytest.approx(0, abs=0.02)


def test_documents_moved_against_each_other_tell_what_chance_gives():
    x, y = related(n=800)
    groups = np.arange(800) // 8
    weights = resample_weights(100, 40, 0)
    found, chance = (compare(x, z, groups, weights) for z in (y, np.roll(y, 80, axis=0)))
    for name in MEASURES:
        assert np.quantile(chance[name].replicates, 0.99) < np.quantile(found[name].replicates, 0.01)
    assert chance["cka_debiased"].value == pytest.approx(0, abs=0.02)


def test_spread_of_replicates_is_that_of_new_samples():
    """Documents share a component, so that tokens are not independent."""
    groups = np.arange(600) // 10

    def sides(seed):
        rng = np.random.default_rng(seed)
        x, y = (rng.standard_normal((600, 3)) + 1.5 * rng.standard_normal((60, 3))[groups] for _ in range(2))
        return x, x + y

    none = np.zeros((0, 60))
    values = [compare(*sides(seed), groups, none, rsa_rows=np.arange(100)) for seed in range(60)]
    found = [compare(*sides(seed), groups, resample_weights(60, 100, seed)) for seed in range(3)]
    for name in ("cka", "cka_debiased", "svcca"):
        true = np.std([v[name].value for v in values])
        assert np.mean([f[name].replicates.std() for f in found]) == pytest.approx(true, rel=0.35)


# Degenerate input


@pytest.fixture
def _no_warnings():
    with warnings.catch_warnings(), np.errstate(divide="raise", invalid="raise", over="raise"):
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("_no_warnings")
class TestDegenerate:
    @pytest.mark.parametrize("value", [0.0, 0.1, -1e5 / 3])
    def test_a_side_that_does_not_vary_is_like_nothing(self, value):
        x, _ = related()
        for sides in ((x, np.full((N, 4), value)), (np.tile(np.arange(3) * value, (N, 1)), x)):
            for found in compare(*sides).values():
                assert np.isnan(everything(found)).all()

    def test_constant_columns_make_no_difference(self):
        x, y = related()
        with_constants = np.concatenate([x, np.tile([0.1, 1e20 / 3], (N, 1))], axis=1)
        found, expected = compare(with_constants, y), compare(x, y)
        for name in ("cka", "cka_debiased", "svcca"):
            np.testing.assert_allclose(everything(found[name]), everything(expected[name]), rtol=1e-9)

    def test_resamples_in_which_a_side_does_not_vary_have_no_value(self):
        x, y = related()
        groups = grouped()
        x[groups != 0] = np.arange(P)  # varies in one document alone
        weights = np.random.default_rng(0).integers(1, 4, (20, GROUPS))
        weights[::2, 0] = 0
        for found in compare(x, y, groups, weights).values():
            assert np.isfinite(found.value)
            assert np.isnan(found.replicates).tolist() == [True, False] * 10

    def test_resamples_without_tokens_or_with_too_few_have_no_value(self):
        x, y = related()
        groups = np.r_[0, 0, np.full(N - 2, 2)]  # no token in group 1
        weights = np.array([[0, 3, 0], [2, 1, 0], [1, 1, 1]])
        found = compare(x, y, groups, weights)
        for name in MEASURES:
            assert np.isnan(found[name].replicates[0])
            assert found[name].replicates[2] == pytest.approx(found[name].value)
        assert np.isnan(found["cka_debiased"].replicates[1])
        assert np.isnan(found["rsa"].replicates[1])

    def test_more_dimensions_than_tokens(self):
        x, y = related(n=30, p=100, q=80)
        groups = grouped(30)
        weights = resample_weights(GROUPS, 5, 0)
        found = compare(x, y, groups, weights, variance_share=1)
        rows = [drawn(groups, w) for w in weights]
        np.testing.assert_allclose(everything(found["svcca"]), 1, rtol=1e-9)  # both span all that 30 tokens can do
        np.testing.assert_allclose(found["cka"].replicates, [gram_cka(x[r], y[r]) for r in rows], rtol=1e-9)
        assert found["cka_debiased"].value == pytest.approx(song_cka(x, y), rel=1e-8)
        assert found["rsa"].value == pytest.approx(spearman(x, y), rel=1e-9)

    def test_directions_that_the_drawn_documents_lack_do_not_count(self):
        x, y = related()
        groups = grouped()
        x = np.concatenate([x, (groups == 0)[:, None] * 50.0], axis=1)
        weights = np.array([[0, *[1] * (GROUPS - 1)]])
        found = compare(x, y, groups, weights, variance_share=1)["svcca"].replicates
        rest = groups != 0
        assert found == pytest.approx(compare(x[rest, :P], y[rest], variance_share=1)["svcca"].value, rel=1e-9)

    def test_tokens_whose_vector_does_not_vary_are_left_out_of_rsa(self):
        x, y = related()
        x[[3, 17]], y[[5]] = [[0.0], [0.3]], 1.7
        kept = np.setdiff1d(np.arange(N), [3, 5, 17])
        assert compare(x, y)["rsa"].value == pytest.approx(spearman(x[kept], y[kept]), rel=1e-10)

    @pytest.mark.parametrize("p", [1, 2])
    def test_vectors_of_one_or_two_numbers_all_correlate_alike(self, p):
        x, y = related()
        x = np.cumsum(np.abs(x[:, :p]), axis=1)  # ascending
        assert np.isnan(everything(compare(x, y)["rsa"])).all()
        assert np.isfinite(everything(compare(x, y)["cka"])).all()

    def test_single_precision_is_read_as_double(self):
        x, y = (z.astype(np.float32) for z in related())
        single, double = compare(x, y), compare(x.astype(np.float64), y.astype(np.float64))
        for name in MEASURES:
            np.testing.assert_array_equal(everything(single[name]), everything(double[name]))


def test_equal_token_vectors_tie_in_rank():
    """As embeddings of few words do; scipy ties them where distances are computed once per pair of words."""
    rng = np.random.default_rng(0)
    words_x, words_y = related(n=12, p=50, q=33)
    words = rng.integers(0, 12, 90)
    i, j = np.triu_indices(90, 1)
    distances = [squareform(pdist(z, metric="correlation"))[words[i], words[j]] for z in (words_x, words_y)]
    expected = scipy.stats.spearmanr(*distances).statistic
    assert compare(words_x[words], words_y[words])["rsa"].value == pytest.approx(expected, rel=1e-12)


def test_dissimilarities_of_nearly_parallel_tokens_do_not_cancel():
    """Correlations within 1e-9 of 1, as a common mean gives; in extended precision for comparison."""
    rng = np.random.default_rng(0)
    x = 1e4 * rng.standard_normal(20) + 0.3 * rng.standard_normal((N, 20))
    z = x.astype(np.longdouble)
    z -= z.mean(axis=1, keepdims=True)
    z /= np.sqrt((z**2).sum(axis=1, keepdims=True))
    _, y = related()
    i, j = np.triu_indices(N, 1)
    distances = ((z[i] - z[j]) ** 2).sum(axis=1).astype(float)
    assert distances.max() < 1e-7
    expected = scipy.stats.spearmanr(distances, pdist(y, metric="correlation")).statistic
    assert compare(x, y)["rsa"].value == pytest.approx(expected, abs=1e-6)


def test_what_does_not_fit_is_refused():
    x, y = related()
    weights = resample_weights(GROUPS, 3, 0)
    with pytest.raises(ValueError, match="columns of the weights, 0 to 7"):
        compare(x, y, grouped(), weights[:, 1:])
    with pytest.raises(ValueError, match=r"must be \[60, features\], not \[59, 5\]"):
        compare(x, y[1:], grouped(), weights)
    with pytest.raises(ValueError, match="finite"):
        compare(np.where(x > x.min(), x, np.nan), y)
    with pytest.raises(ValueError, match="each once"):
        compare(x, y, rsa_rows=np.array([3, 4, 3]))
    with pytest.raises(ValueError, match="at most 1000"):
        compare(x, y, rsa_rows=np.arange(1001))
    with pytest.raises(ValueError, match="share of variance"):
        compare(x, y, variance_share=0.0)


def test_sample_rows_are_distinct_and_depend_on_the_seed_alone():
    rows = sample_rows(500, 100, seed=1)
    assert len(np.unique(rows)) == 100
    assert rows.max() < 500
    assert np.array_equal(rows, sample_rows(500, 100, seed=1))
    assert not np.array_equal(rows, sample_rows(500, 100, seed=2))
    assert np.array_equal(sample_rows(30, 100, seed=1), np.arange(30))
