"""How alike two whole representations are: x [n, p] and y [n, q], the values of two layers at the same n tokens.

    cka           ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), columns centred; in [0, 1] (linear CKA; Kornblith et al. 2019,
                  arXiv 1905.00414, eq. 3). Chance gives more than 0, the more so the more dimensions a token has.
    cka_debiased  The same with unbiased estimates of HSIC (Song et al. 2012, JMLR 13, eq. 5; Nguyen et al. 2021, arXiv
                  2010.15327, eq. 3); up to 1; independent tokens give 0 on average, so it can be negative.
    svcca         Mean canonical correlation of the leading principal directions of x and y, the fewest that hold a
                  share of the variance, but at most `max_directions`; in [0, 1] (SVCCA; Raghu et al. 2017, arXiv
                  1706.05806). Chance gives roughly sqrt(directions / n), and 1 once the directions of each alone
                  span all that n tokens can do.
    rsa           Spearman correlation, over pairs of tokens, of their dissimilarities in x and y, a dissimilarity being
                  1 - Pearson correlation of two token vectors; in [-1, 1] (RSA; Kriegeskorte et al. 2008,
                  doi 10.3389/neuro.06.004.2008).

None has a unit. All ignore isotropic scaling; the first three also rotations and shifts of all tokens, and svcca any
invertible linear map, if it keeps all the variance. NaN where undefined: a side that does not vary.

Intervals come from a bootstrap over documents (alignment.bootstrap): in a resample, each token counts as often as its
group of documents was drawn, w. No resample goes through the tokens' values again:

    cka, cka_debiased  Exact. sum_ij w_i w_j K_ij L_ij over tokens i, j with K = XX', L = YY' is W'MW over groups with
                       M_gh = <X_g'Y_g, X_h'Y_h>: products in feature space, which never hold n x n.
    svcca              Directions are held fixed at those of the full sample (as MPPC holds partners fixed); their
                       covariances, and so the canonical correlations, are exactly the resample's.
    rsa                Ranks are held fixed at those of the full sample; their correlation is exactly the resample's.

The copies of a token in a resample are two tokens to cka and svcca, by their definition; these measures' bias grows as
tokens repeat, so that their replicates lie above the value, where n is not large against the dimensions. cka_debiased
and rsa leave out the quadruples and pairs of tokens that use one token twice.

To tell what chance gives, compare x with y whose documents were moved against those of x: pass y[order] for y.
"""

import itertools
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.spatial.distance
import scipy.stats

MAX_RSA_ROWS = 1000
_BLOCK = 1 << 22  # numbers held at a time of per-group products
_CONSTANT = 1e-12  # of the largest value: a column or token vector that varies less does not vary
_UNDEFINED = 1e-10  # of the uncentred second moments: less than this is what rounding leaves of nothing


class Similarity(NamedTuple):
    """A measure on the full sample, and in each resample [R]; NaN where undefined."""

    value: float
    replicates: np.ndarray


class Sample(NamedTuple):
    """What is common to all representations of the same tokens. Row 0 of the weights is the full sample: all ones."""

    order: np.ndarray  # [n], sorts the rows by group
    index: scipy.sparse.csr_array  # [G, n], which sorted row belongs to which group
    weights: np.ndarray  # [1 + R, G]
    row_weights: np.ndarray  # [1 + R, n], of the sorted rows
    rsa_rows: np.ndarray  # [m], rows as given, not sorted
    rsa_index: scipy.sparse.csr_array  # [G, m]

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each group [G]."""
        return np.diff(self.index.indptr)


class _Kernel(NamedTuple):
    """Of K = XX': its diagonal [n]; and K w and K w^2 for each resample's weights [1 + R, n]."""

    diagonal: np.ndarray
    sums: np.ndarray
    square_sums: np.ndarray


class _Hsic(NamedTuple):
    """Each [1 + R]; NaN where undefined."""

    biased: np.ndarray
    unbiased: np.ndarray


class Representation(NamedTuple):
    """One side, with all that does not depend on the other. k `directions` hold `variance_held` of the variance."""

    values: np.ndarray  # [n, p], rows sorted by group, columns centred, mean square 1
    kernel: _Kernel
    own: _Hsic  # HSIC with itself
    directions: np.ndarray  # [n, k], principal scores, each of variance 1
    variance_held: float
    means: np.ndarray  # [1 + R, k], of the directions in each resample
    whitening: np.ndarray  # [1 + R, k, k], makes the directions' covariance the identity, or 0 where they do not vary
    rank: np.ndarray  # [1 + R], how many directions vary
    dissimilarity: np.ndarray  # [m, m], of the rows for RSA
    comparable: np.ndarray  # [m], False for a token vector that does not vary


def sample_rows(n: int, size: int, seed: int) -> np.ndarray:
    """Rows for RSA: at most `size` of n, drawn without replacement, sorted."""
    return np.sort(np.random.default_rng(seed).choice(n, size=min(n, size), replace=False))


def whole_space(
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray,
    *,
    rsa_rows: np.ndarray,
    variance_share: float = 0.99,
    max_directions: int = 64,
) -> dict[str, Similarity]:
    """All four measures of x [n, p] against y [n, q].

    `groups` [n] tells each row's group of documents, a column of `weights` [R, G], which tell how often each group is
    drawn in each resample. `rsa_rows` [m <= 1000] are the rows compared by RSA. To compare one layer with many, use
    `make_sample`, `represent` and `compare_spaces`.
    """
    sample = make_sample(groups, weights, rsa_rows)
    a, b = (represent(z, sample, variance_share, max_directions) for z in (x, y))
    return compare_spaces(a, b, sample)


def make_sample(groups: np.ndarray, weights: np.ndarray, rsa_rows: np.ndarray) -> Sample:
    """`groups` [n], `weights` [R, G] and `rsa_rows` [m] as in `whole_space`."""
    n_groups = weights.shape[1]
    if not len(groups) or groups.min() < 0 or groups.max() >= n_groups:
        raise ValueError(f"groups must be columns of the weights, 0 to {n_groups - 1}")
    if len(rsa_rows) > MAX_RSA_ROWS or len(np.unique(rsa_rows)) < len(rsa_rows):
        raise ValueError(f"RSA takes at most {MAX_RSA_ROWS} rows, each once; got {len(rsa_rows)}")
    order = np.argsort(groups, kind="stable")
    weights = np.concatenate([np.ones((1, n_groups)), weights])
    return Sample(
        order=order,
        index=_indicator(groups[order], n_groups),
        weights=weights,
        row_weights=weights[:, groups[order]],
        rsa_rows=rsa_rows,
        rsa_index=_indicator(groups[rsa_rows], n_groups),
    )


def represent(x: np.ndarray, sample: Sample, variance_share: float = 0.99, max_directions: int = 64) -> Representation:
    """One side x [n, p]. SVCCA keeps the fewest principal directions k that hold `variance_share` of the variance in
    (0, 1], but at most `max_directions`: time grows as R k^3, memory as (G + R) k^2."""
    if x.ndim != 2 or len(x) != len(sample.order) or not x.size:
        raise ValueError(f"values must be [{len(sample.order)}, features], not {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError("values must be finite")
    x = x.astype(np.float64)
    values = _centred(x)[sample.order]
    kernel = _kernel(values, sample)
    directions, variance_held = _principal_scores(values, variance_share, max_directions)
    means = _per_token(sample, sample.weights @ (sample.index @ directions))
    whitening, rank = _whitening(directions, means, sample)
    dissimilarity, comparable = _dissimilarity(x[sample.rsa_rows])
    return Representation(
        values=values,
        kernel=kernel,
        own=_own_hsic(values, kernel, sample),
        directions=directions,
        variance_held=variance_held,
        means=means,
        whitening=whitening,
        rank=rank,
        dissimilarity=dissimilarity,
        comparable=comparable,
    )


def compare_spaces(a: Representation, b: Representation, sample: Sample) -> dict[str, Similarity]:
    """All four measures between two representations of the same sample."""
    both = _hsic(_pair_products(a.values, b.values, sample), a.kernel, b.kernel, sample)
    found = {
        "cka": np.clip(both.biased / np.sqrt(a.own.biased * b.own.biased), 0, 1),
        "cka_debiased": both.unbiased / np.sqrt(a.own.unbiased * b.own.unbiased),
        "svcca": _svcca(a, b, sample),
        "rsa": _rsa(a, b, sample),
    }
    return {name: Similarity(float(values[0]), values[1:]) for name, values in found.items()}


def _indicator(groups: np.ndarray, n_groups: int) -> scipy.sparse.csr_array:
    rows = np.arange(len(groups))
    return scipy.sparse.csr_array((np.ones(len(groups)), (groups, rows)), shape=(n_groups, len(groups)))


def _centred(x: np.ndarray) -> np.ndarray:
    """Columns of mean 0, scaled together to mean square 1, so that fourth powers neither overflow nor vanish."""
    centred = x - x.mean(axis=0)
    centred[:, np.abs(centred).max(axis=0) <= _CONSTANT * np.abs(x).max(axis=0)] = 0
    mean_square = (centred**2).mean()
    return centred / np.sqrt(mean_square) if mean_square > 0 else centred


def _per_token(sample: Sample, sums: np.ndarray) -> np.ndarray:
    """Sums over the tokens of each resample [1 + R, ...] as means; 0 if a resample has no token."""
    n = np.maximum(sample.weights @ sample.sizes, 1)
    return sums / n.reshape(-1, *[1] * (sums.ndim - 1))


def _group_products(x: np.ndarray, y: np.ndarray, sample: Sample) -> np.ndarray:
    """X_g'Y_g of each group [G, p, q]."""
    bounds = sample.index.indptr
    products = np.empty((len(bounds) - 1, x.shape[1], y.shape[1]))
    for g, (start, end) in enumerate(itertools.pairwise(bounds)):
        np.matmul(x[start:end].T, y[start:end], out=products[g])
    return products


# HSIC, the inner product of two centred kernels


def _kernel(x: np.ndarray, sample: Sample) -> _Kernel:
    group_sums = sample.index @ x
    sums, square_sums = ((sample.weights**power @ group_sums) @ x.T for power in (1, 2))
    return _Kernel(np.einsum("np,np->n", x, x), sums, square_sums)


def _pair_products(x: np.ndarray, y: np.ndarray, sample: Sample) -> np.ndarray:
    """sum of K_ij L_ij over tokens i of group g, j of group h [G, G], by blocks of the columns of x."""
    n_groups = sample.index.shape[0]
    total = np.zeros((n_groups, n_groups))
    width = max(1, _BLOCK // (n_groups * y.shape[1]))
    for start in range(0, x.shape[1], width):
        products = _group_products(x[:, start : start + width], y, sample).reshape(n_groups, -1)
        total += products @ products.T
    return total


def _quadratic(left: np.ndarray, matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left' matrix right for each resample [1 + R]; left and right [1 + R, G]."""
    return np.einsum("rg,rg->r", left @ matrix, right)


def _total(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum over tokens of x y [1 + R]; x and y [1 + R, n]."""
    return np.einsum("rn,rn->r", x, y)


def _hsic(pairs: np.ndarray, a: _Kernel, b: _Kernel, sample: Sample) -> _Hsic:
    """`pairs` [G, G] as `_pair_products` gives them for the two kernels."""
    return _Hsic(_biased_hsic(pairs, a, b, sample), _unbiased_hsic(pairs, a, b, sample))


def _own_hsic(x: np.ndarray, kernel: _Kernel, sample: Sample) -> _Hsic:
    """HSIC with itself; NaN where x does not vary, so that what is divided by it is NaN too."""
    pairs = _pair_products(x, x, sample)
    n = sample.weights @ sample.sizes
    least = _UNDEFINED * _quadratic(sample.weights, pairs, sample.weights) / np.maximum(n, 1) ** 2
    return _Hsic(*(np.where(h > least, h, np.nan) for h in _hsic(pairs, kernel, kernel, sample)))


def _biased_hsic(pairs: np.ndarray, a: _Kernel, b: _Kernel, sample: Sample) -> np.ndarray:
    """||Y'X||_F^2 / n^2 with columns centred by the resample's own means: tr(KHLH) / n^2, written out."""
    w = sample.row_weights
    n = sample.weights @ sample.sizes
    n = np.where(n > 0, n, np.nan)
    joint = _quadratic(sample.weights, pairs, sample.weights)
    shared = _total(w * a.sums, b.sums)
    return joint / n**2 - 2 * shared / n**3 + _total(w, a.sums) * _total(w, b.sums) / n**4


def _unbiased_hsic(pairs: np.ndarray, a: _Kernel, b: _Kernel, sample: Sample) -> np.ndarray:
    """Mean of K_ij L_ij + K_ij L_kl - 2 K_ij L_ik over quadruples of distinct tokens of the resample; NaN if none.

    That is what the estimator of Song et al. 2012 is where all weights are 1. The sum over distinct i, j, k, l of
    w_i w_j w_k w_l times each term is its sum over all tokens less those where indices coincide. One mean for all
    three terms, not one each, for else the result would depend on where 0 is.
    """
    w, n = sample.row_weights, sample.weights @ sample.sizes
    pairs = pairs - np.diag(sample.index @ (a.diagonal * b.diagonal))
    q11, q12, q13, q22 = (
        _quadratic(sample.weights**i, pairs, sample.weights**j) for i, j in ((1, 1), (1, 2), (1, 3), (2, 2))
    )
    (k1, k2), (l1, l2) = ((z.sums - w * z.diagonal, z.square_sums - w**2 * z.diagonal) for z in (a, b))
    wk, wl = w * k1, w * l1
    over_three = (
        n * (_total(wk, l1) - q12) - (_total(wk, wl) - q22) - (_total(w * k2, l1) - q13) - (_total(wk, l2) - q13)
    )
    over_two = (n**2 - sample.weights**2 @ sample.sizes) * q11 - 4 * n * q12 + 4 * q13 + 2 * q22
    over_four = wk.sum(axis=1) * wl.sum(axis=1) - 4 * _total(wk, wl) + 2 * q22
    return (over_two + over_four - 2 * over_three) / _quadruples(sample)


def _quadruples(sample: Sample) -> np.ndarray:
    """Weight of all quadruples of distinct tokens [1 + R]; NaN for fewer than 4 tokens."""
    p1, p2, p3, p4 = (sample.weights**k @ sample.sizes for k in (1, 2, 3, 4))
    enough = (sample.weights > 0) @ sample.sizes >= 4
    return np.where(enough, p1**4 - 6 * p1**2 * p2 + 3 * p2**2 + 8 * p1 * p3 - 6 * p4, np.nan)


# SVCCA


def _principal_scores(x: np.ndarray, share: float, most: int) -> tuple[np.ndarray, float]:
    """Scores [n, k] of variance 1 on the leading principal directions, and the share of the variance they hold."""
    if not 0 < share <= 1 or most < 1:
        raise ValueError(f"the share of variance must lie in (0, 1] and directions be 1 or more, not {share}, {most}")
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    rank = int((s > s.max(initial=0) * max(x.shape) * np.finfo(np.float64).eps).sum())
    if rank == 0:
        return np.zeros((len(x), 0)), np.nan
    held = np.cumsum(s**2) / (s**2).sum()
    # Rounded, the sum may reach 1 before the last direction, or never.
    needed = rank if share == 1 else min(rank, 1 + int(np.searchsorted(held, share)))
    k = min(needed, most)
    return u[:, :k] * np.sqrt(len(x)), float(held[k - 1])


def _second_moments(x: np.ndarray, y: np.ndarray, sample: Sample) -> np.ndarray:
    """Mean of x_i y_j over the tokens of each resample [1 + R, p, q]."""
    products = _group_products(x, y, sample)
    sums = sample.weights @ products.reshape(len(products), x.shape[1] * y.shape[1])
    return _per_token(sample, sums.reshape(len(sums), *products.shape[1:]))


def _whitening(directions: np.ndarray, means: np.ndarray, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """By eigenvectors, since directions that the drawn documents do not vary in make the covariance singular."""
    second = _second_moments(directions, directions, sample)
    variance, axes = np.linalg.eigh(second - means[:, :, None] * means[:, None, :])
    varies = variance > _CONSTANT * np.trace(second, axis1=1, axis2=2)[:, None]
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)
    return axes * scale[:, None, :], varies.sum(axis=1)


def _svcca(a: Representation, b: Representation, sample: Sample) -> np.ndarray:
    """Mean canonical correlation in each resample [1 + R], over as many as the lesser rank."""
    count = np.minimum(a.rank, b.rank)
    if not count.any():
        return np.full(len(count), np.nan)
    cross = _second_moments(a.directions, b.directions, sample) - a.means[:, :, None] * b.means[:, None, :]
    whitened = a.whitening.transpose(0, 2, 1) @ cross @ b.whitening
    total = np.linalg.svd(whitened, compute_uv=False).sum(axis=1)
    return np.where(count > 0, np.clip(total / np.maximum(count, 1), 0, 1), np.nan)


# RSA


def _dissimilarity(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 - Pearson correlation between rows [m, m], and which rows have one [m] because they vary."""
    centred = x - x.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    comparable = norm > _CONSTANT * np.abs(x).max(axis=1, keepdims=True) * np.sqrt(x.shape[1])
    z = np.where(comparable, centred / np.where(comparable, norm, 1), 0)
    # Half the squared distance of standardised vectors. What they share is taken off, or 1 - r near 0 would cancel.
    z = np.where(comparable, z - z.sum(axis=0) / max(1, comparable.sum()), 0)
    gram = z @ z.T
    size = np.diagonal(gram)
    d = np.maximum((size[:, None] + size) / 2 - gram, 0)
    # Equal vectors, such as embeddings of one word, must tie in rank, but their sums can differ in the last digits.
    unit = _CONSTANT * max(d.max(initial=0), _CONSTANT)
    return np.round(d / unit) * unit, comparable[:, 0]


def _ranks(dissimilarity: np.ndarray) -> np.ndarray:
    """Ranks among all pairs [m, m], of mean 0; those of equals are averaged; the diagonal is 0."""
    ranks = scipy.stats.rankdata(dissimilarity[np.triu_indices(len(dissimilarity), 1)])
    return scipy.spatial.distance.squareform(ranks - ranks.mean())


def _rsa(a: Representation, b: Representation, sample: Sample) -> np.ndarray:
    """Correlation of the ranks over the pairs of distinct tokens in each resample [1 + R]."""
    rows = np.flatnonzero(a.comparable & b.comparable)
    if len(rows) < 3:
        return np.full(len(sample.weights), np.nan)
    x, y = (_ranks(side.dissimilarity[np.ix_(rows, rows)]) for side in (a, b))
    index = sample.rsa_index[:, rows]
    weights = sample.weights

    def total(of_pairs: np.ndarray) -> np.ndarray:
        return _quadratic(weights, index @ (index @ of_pairs).T, weights)

    n = total(1 - np.eye(len(rows)))
    n = np.where(n > 0, n, np.nan)
    mean_x, mean_y, xx, yy, xy = (total(z) / n for z in (x, y, x * x, y * y, x * y))
    var_x, var_y = xx - mean_x**2, yy - mean_y**2
    varies = (var_x > _UNDEFINED * xx) & (var_y > _UNDEFINED * yy)
    r = (xy - mean_x * mean_y) / np.sqrt(np.where(varies, var_x * var_y, np.nan))
    return np.clip(r, -1, 1)
