"""One-to-one matching: each feature is given to at most one of the other side, so that the sum of correlations is as
large as it can be (linear assignment) on the graph of every feature's best partners."""

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

_STAYS_ALONE = 1e-9  # a weight that any real pair outdoes


def one_to_one(a: np.ndarray, b: np.ndarray, weight: np.ndarray, n_a: int, n_b: int) -> np.ndarray:
    """Partner [n_a] in b of each of a, or -1, for edges (a[k], b[k]) of positive `weight`; other edges are ignored.

    Each of a may also stay alone, by an edge of almost no weight to a partner of its own: a matching of all of a then
    exists, as scipy's algorithm for sparse graphs [Jonker & Volgenant 1987] asks for.
    """
    kept = weight > _STAYS_ALONE
    edges = scipy.sparse.coo_array((weight[kept], (a[kept], b[kept])), shape=(n_a, n_b)).tocsr()
    count = scipy.sparse.coo_array((np.ones(kept.sum()), (a[kept], b[kept])), shape=(n_a, n_b)).tocsr()
    edges.data /= count.data  # an edge that both directions name
    alone = scipy.sparse.diags_array(np.full(n_a, _STAYS_ALONE)).tocsr()
    graph = scipy.sparse.hstack([edges, alone]).tocsr()
    rows, columns = scipy.sparse.csgraph.min_weight_full_bipartite_matching(graph, maximize=True)
    partner = np.full(n_a, -1, dtype=np.int64)
    partner[rows] = np.where(columns < n_b, columns, -1)
    return partner
