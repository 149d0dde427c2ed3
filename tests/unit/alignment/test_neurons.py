import numpy as np
import pytest
import torch

from tests.conftest import write_store
from universality.activations.store import ActivationStore
from universality.alignment.bootstrap import centred_sums, document_index
from universality.alignment.neurons import Neurons, correlations, pair_sums, read_neurons
from universality.errors import StudyError

N_TOKENS = 9000  # more than two blocks


def values(seed, width):
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).standard_normal((N_TOKENS, 1))
    x = (1000 + common + rng.standard_normal((N_TOKENS, width))).astype(np.float32)
    x[:, 1] = 3.25  # never varies
    x[rng.random(N_TOKENS) < 0.4, 2] = 0
    return x


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two layers' neurons: one of two inner sites, in stores of several shards, and what they hold."""
    folder = tmp_path_factory.mktemp("neurons")
    found = []
    for name, widths in (("a", (3, 4)), ("b", (6,))):
        arrays = [values(seed, width) for seed, width in enumerate(widths, len(found))]
        sites = [f"mamba.0.{kind}" for kind in ("ssm_in", "gate")][: len(widths)]
        shards = []
        for site, array in zip(sites, arrays, strict=True):
            described = {"model": name, "site": site, "split": "evaluation"}
            shards += write_store(folder / name / site, torch.from_numpy(array), [5000, 4000], **described)
        [layer] = read_neurons(name, [0], shards)
        found.append((layer, np.concatenate(arrays, axis=1).astype(np.float64)))
    return found


def test_correlations_by_blocks_equal_numpy(sides):
    (a, x), (b, y) = sides
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.corrcoef(x, y, rowvar=False)[: x.shape[1], x.shape[1] :]
    np.testing.assert_allclose(correlations(a, b), expected, rtol=1e-9, atol=1e-11)
    assert np.isnan(correlations(a, b)[1]).all()
    assert np.isnan(correlations(a, b)[:, 1]).all()


def test_moments_by_blocks_equal_numpy(sides):
    for neurons, x in sides:
        assert neurons.shape == x.shape
        np.testing.assert_allclose(neurons.moments.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(neurons.moments.frequency, (x != 0).mean(0))
        varies = np.arange(x.shape[1]) != 1
        varies &= x.std(0) > 0
        np.testing.assert_allclose(neurons.moments.sd[varies], x.std(0)[varies], rtol=1e-9)
        assert np.isnan(neurons.moments.sd[~varies]).all()


def test_per_document_sums_by_blocks_equal_those_of_the_whole(sides):
    (a, x), (b, y) = sides
    index = document_index(np.arange(N_TOKENS) // 700)
    x_columns, y_columns = np.array([0, 2, 6, 6]), np.array([3, 3, 0, 5])
    expected = centred_sums(index, (x - x.mean(0))[:, x_columns], (y - y.mean(0))[:, y_columns])
    for found, due in zip(pair_sums(index, a, b, x_columns, y_columns), expected, strict=True):
        np.testing.assert_allclose(found, due, rtol=1e-9, atol=1e-7)


def test_where_shards_meet_makes_no_difference(tmp_path):
    array = torch.from_numpy(values(5, 4))
    parts = {"one": [N_TOKENS], "many": [1, 4095, 1, 4000, 903]}
    found = [Neurons([ActivationStore(write_store(tmp_path / name, array, sizes))]) for name, sizes in parts.items()]
    assert np.array_equal(correlations(found[0], found[0]), correlations(found[1], found[1]), equal_nan=True)


def test_layers_without_shards_and_sites_of_other_tokens_are_named(tmp_path):
    described = {"model": "a", "split": "evaluation"}
    shards = write_store(tmp_path / "x", torch.randn(40, 3), [40], site="mamba.0.ssm_in", **described)
    with pytest.raises(StudyError, match=r"no shard of a holds neurons of layer 1; given are mamba\.0\.ssm_in"):
        read_neurons("a", [0, 1], shards)
    shards += write_store(tmp_path / "y", torch.randn(30, 3), [30], site="mamba.0.gate", **described)
    with pytest.raises(StudyError, match=r"a: the shards of mamba\.0\.gate hold other tokens than those of mamba\.0"):
        read_neurons("a", [0], shards)
