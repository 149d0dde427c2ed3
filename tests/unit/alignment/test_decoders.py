import numpy as np
import pandas as pd
import pytest
import scipy.optimize

from tests.unit.alignment.test_compare import STATISTICS
from universality.alignment.decoders import write_decoders
from universality.errors import StudyError
from universality.storage import write_table, write_tensors

F, D, COMMON = 60, 24, 40


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def saes(tmp_path):
    """Two SAEs of one model, one layer; b has the first 40 of a's 60 directions, a little turned, in another order."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((F, D)) * rng.uniform(0.5, 2, (F, 1))
    order = rng.permutation(F)
    b = rng.standard_normal((F, D))
    b[order[:COMMON]] = unit(a[:COMMON]) + 0.08 * rng.standard_normal((COMMON, D))
    folders = []
    for name, W_dec in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name / "sae_weights.safetensors", {"W_dec": W_dec.astype(np.float32)})
        folders.append(tmp_path / name)
    (tmp_path / "cross").mkdir()
    table = {
        "direction": np.repeat(["a_to_b", "b_to_a"], F), "layer": np.full(2 * F, 2, dtype=np.int32),
        "feature": np.tile(np.arange(F, dtype=np.int32), 2), "dead": np.tile(np.arange(F) == 5, 2),
        "best_layer": np.full(2 * F, 2, dtype=np.int32),
        "best_feature": np.concatenate([order, np.zeros(F, int)]).astype(np.int32),
    }  # fmt: skip
    write_table(tmp_path / "cross" / "features.parquet", table)
    return folders, order, unit(a) @ unit(b).T


def matched(folders, tmp_path):
    files = tmp_path / "features.parquet", tmp_path / "shares.parquet"
    write_decoders(tmp_path / "cross", [folders[0]], [folders[1]], 4, STATISTICS, *files)
    return [pd.read_parquet(file) for file in files]


def test_planted_directions_are_matched_and_the_assignment_is_scipys(saes, tmp_path):
    folders, order, cosines = saes
    features, _ = matched(folders, tmp_path)
    for direction, r in (("a_to_b", cosines), ("b_to_a", cosines.T)):
        own = features[features.direction == direction]
        np.testing.assert_allclose(own.cosine, r.max(axis=1), atol=1e-6)
        assert (own.partner == r.argmax(axis=1)).all()
    own = features[features.direction == "a_to_b"].set_index("feature")
    assert (own.partner[:COMMON] == order[:COMMON]).all()
    assert (own.one_to_one[:COMMON] == order[:COMMON]).all()
    rows, columns = scipy.optimize.linear_sum_assignment(-cosines)
    strong = cosines[rows, columns] > 0.5
    assert (own.one_to_one.loc[rows[strong]] == columns[strong]).all()
    back = features[(features.direction == "b_to_a") & (features.one_to_one >= 0)]
    assert (own.one_to_one.loc[back.one_to_one].to_numpy() == back.feature.to_numpy()).all()


def test_shares_are_of_live_features_and_their_interval_holds_them(saes, tmp_path):
    folders, order, _ = saes
    features, shares = matched(folders, tmp_path)
    found = shares[(shares.direction == "a_to_b") & (shares.layer == -1)].set_index("statistic")
    live = features[(features.direction == "a_to_b") & ~features.dead]
    assert len(live) == F - 1
    assert found.share["one_to_one_0.7"] == pytest.approx((live.one_to_one_cosine >= 0.7).mean())
    assert found.share["same_as_mppc"] == pytest.approx((live.partner == order[live.feature]).mean())
    assert (found.low < found.share).all()
    assert (found.share <= found.high).all()


def test_decoders_of_other_spaces_and_missing_layers_are_named(saes, tmp_path):
    folders, _, _ = saes
    write_tensors(folders[1] / "sae_weights.safetensors", {"W_dec": np.ones((3, D + 1), np.float32)})
    with pytest.raises(StudyError, match="layer 2: decoders of width 24 and 25 are not of one space"):
        matched(folders, tmp_path)
    with pytest.raises(StudyError, match="has 1 layers, but 2 and 1 SAEs were given"):
        write_decoders(tmp_path / "cross", folders, folders[:1], 4, STATISTICS, tmp_path / "f", tmp_path / "s")
