import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from universality.activations.shuffle import Permutation, shuffled_epochs


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000, 70_001])
def test_every_number_comes_once_and_any_stretch_is_the_same_alone(n):
    permutation = Permutation(n, [3, 1])
    whole = permutation(np.arange(n))
    assert np.array_equal(np.sort(whole), np.arange(n))
    assert np.array_equal(permutation(np.arange(n // 3, n // 2)), whole[n // 3 : n // 2])


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_order_of_a_few_is_as_likely(n):
    samples = 50 * math.factorial(n)
    counts = Counter(tuple(Permutation(n, [seed])(np.arange(n))) for seed in range(samples))
    observed = [counts[order] for order in itertools.permutations(range(n))]
    assert scipy.stats.chisquare(observed).pvalue > 0.001


def test_every_number_is_as_likely_at_every_position():
    n, keys = 40, 4000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, [7, key])(np.arange(n))] += 1
    expected = keys / n
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert scipy.stats.chi2.sf(statistic, (n - 1) ** 2) > 0.001


def test_neighbours_of_a_large_permutation_are_unrelated():
    order = Permutation(10_000_019, [0, 0])(np.arange(200_000))
    assert scipy.stats.kstest(order / 10_000_019, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01


def test_the_sequence_of_epochs_depends_neither_on_the_stretch_nor_on_where_it_is_entered():
    n, seed = 23, 5

    def taken(first, size, count):
        return np.concatenate(list(itertools.islice(shuffled_epochs(n, seed, first, size), count)))

    whole = taken(0, 7, 30)
    assert np.array_equal(whole, taken(0, 30, 7))
    assert np.array_equal(whole[50:], taken(50, 160, 1))
    epochs = whole[: 9 * n].reshape(9, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 9
    assert not np.array_equal(whole, np.concatenate(list(itertools.islice(shuffled_epochs(n, 6, 0, 7), 30))))
